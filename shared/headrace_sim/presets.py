"""Cost models to start from where nobody has calibrated a worker.

Invariant: these are assumptions, not measurements, and their names say so; whoever plans capacity
runs `headrace bench calibrate` on the machine in question and passes the file. Each figure is
derived below, so that it can be argued with.
"""

from __future__ import annotations

from pathlib import Path

from headrace.errors import SettingsError
from headrace.policy.cost_model import CostModel

CPU_SMALL = CostModel(
    # SmolLM2-135M in float32 on 2 cores: some 5 ms a step for Python and memory traffic of 540 MB
    # at about 20 GB/s, 270 MFLOP a token at 100 GFLOP/s, 47 KB of KV a token
    step_ms=30.0,
    prefill_token_ms=2.7,
    decode_row_ms=3.0,
    decode_context_ms=2.5,
    prefill_context_ms=15.0,
    kv_tokens=16_384,
    max_jobs=16,
    step_tokens=512,
    name="assumed-smollm2-135m-2-cores",
)
GPU_8B = CostModel(
    # Llama-3-8B in bfloat16 on an H100: weights of 16 GB at 3.35 TB/s and launches make 6 ms a
    # step; 16 GFLOP a token at half of 990 TFLOP/s; 131 KB of KV a token at 3 TB/s; attention of
    # 0.5 MFLOP a pair of tokens at 400 TFLOP/s; 56 GB of the 80 are left for KV
    step_ms=6.0,
    prefill_token_ms=0.033,
    decode_row_ms=0.035,
    decode_context_ms=0.044,
    prefill_context_ms=1.3,
    kv_tokens=430_080,
    max_jobs=256,
    step_tokens=8_192,
    name="assumed-llama-8b-h100",
)
PRESETS = {"cpu-small": CPU_SMALL, "gpu-8b": GPU_8B}


def cost_model(name_or_file: str) -> CostModel:
    """A preset by name, or the cost model in a file. Raises SettingsError."""
    if name_or_file in PRESETS:
        return PRESETS[name_or_file]
    path = Path(name_or_file)
    try:
        return CostModel.from_json(path.read_text())
    except FileNotFoundError as error:
        raise SettingsError(
            f"{name_or_file!r} is neither a preset ({', '.join(PRESETS)}) nor a file"
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path}: cannot be read: {error}") from error
