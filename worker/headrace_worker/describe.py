"""`python -m headrace_worker.describe MODEL`: a model's shape as JSON, from its config alone.

Invariant: it is read by what a worker would load it with, and no weight is: a folder needs its
config.json only. `headrace plan` runs this as a process of its own, since reading needs torch.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from headrace.errors import ModelError
from headrace.models import resolve
from headrace.policy.model_shape import ModelShape
from headrace_worker.loading.gguf_file import GgufSource
from headrace_worker.loading.hf_config import read_config
from headrace_worker.model import ModelConfig

CONFIG_BYTES_MAX = 16 * 2**20
_SANDWICHED = "gemma3_text"
"""The family that has a norm after attention and MLP, too."""


def shape_of(config: ModelConfig) -> ModelShape:
    """The planner's view of a configuration."""
    experts = config.experts
    return ModelShape(
        architecture=config.architecture,
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        layers=config.layers,
        heads=config.heads,
        kv_heads=config.kv_heads,
        head_dim=config.head_dim,
        context_tokens=config.context_tokens,
        tied=config.tied,
        windows=config.windows,
        qkv_bias=config.qkv_bias,
        out_bias=config.out_bias,
        mlp_bias=config.mlp_bias,
        qk_norm=config.qk_norm,
        norms=4 if config.architecture == _SANDWICHED else 2,
        expert_layers=experts.layers if experts else (),
        experts=experts.count if experts else 0,
        experts_per_token=experts.per_token if experts else 0,
        expert_size=experts.intermediate_size if experts else 0,
    )


def read_shape(model: str) -> ModelShape:
    """Of an alias, a Hugging Face id that is here, a GGUF file, a folder or a config.json itself.

    Raises ModelError.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        path = path / "config.json"
    elif path.suffix != ".json":
        path = resolve(model)
        if path.is_dir():
            path = path / "config.json"
    if path.suffix == ".gguf":
        return shape_of(GgufSource(path).config)
    return shape_of(read_config(_facts(path)).model)


def _facts(path: Path) -> dict[str, object]:
    try:
        with path.open("rb") as file:
            facts = json.loads(file.read(CONFIG_BYTES_MAX))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read as a model's configuration: {error}") from error
    if not isinstance(facts, dict):
        raise ModelError(f"{path} does not hold an object")
    return facts


def main() -> None:
    try:
        [model] = sys.argv[1:]
        print(json.dumps(read_shape(model).facts()))
    except ModelError as error:
        print(error.message, file=sys.stderr)
        raise SystemExit(2) from error


if __name__ == "__main__":
    main()
