"""How much memory there is, and saying plainly what does not fit into it."""

from __future__ import annotations

from pathlib import Path

from headrace.errors import ModelError
from headrace_worker import native
from headrace_worker.model.config import ModelConfig
from headrace_worker.quantization import NARROW

_ITEM_BYTES = {"float32": 4, "bfloat16": 2}

_INT8_BYTES = 1 + 2 / 32
"""Per weight: one and a share of its group's scale; without native kernels scales take less."""
_INT4_BYTES = 0.5 + 4 / 32
"""Per weight: a half and a share of its group's scale and zero point."""

_SMALLER = {
    "bfloat16": ("bfloat16", "none"),
    "int8": ("bfloat16", "int8"),
    "int4": ("bfloat16", "int4"),
}
_HOW = {
    "bfloat16": "HEADRACE_DTYPE=bfloat16",
    "int8": "HEADRACE_DTYPE=bfloat16 and HEADRACE_QUANTIZATION=int8",
    "int4": "HEADRACE_DTYPE=bfloat16 and HEADRACE_QUANTIZATION=int4",
}
"""Options that take less memory: dtype and quantization, and the settings that choose them."""

_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")


def available_bytes() -> int | None:
    """Memory that could be taken now without swapping; None where the system does not say."""
    limits = [limit for limit in (_machine_bytes(), _cgroup_bytes()) if limit is not None]
    return min(limits) if limits else None


def _machine_bytes() -> int | None:
    try:
        for line in _MEMINFO.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None


def _cgroup_bytes() -> int | None:
    """What a container's own limit leaves (cgroup v2); reclaimable page cache counts as free."""
    try:
        limit = (_CGROUP / "memory.max").read_text().strip()
        if limit == "max":
            return None
        used = int((_CGROUP / "memory.current").read_text())
        facts = (_CGROUP / "memory.stat").read_text().split()
        used -= int(facts[facts.index("inactive_file") + 1])
        return max(0, int(limit) - used)
    except (OSError, ValueError, IndexError):
        return None


def require(needed_bytes: int, what: str, advice: str, *, free: int | None = None) -> None:
    """Raises ModelError when `what` does not fit; `advice` says what would.

    `free`: bytes of a GPU that are free; None for the host's memory.
    """
    free = available_bytes() if free is None else free
    if free is not None and needed_bytes > free:
        raise ModelError(
            f"{what} needs {_mib(needed_bytes)} MiB of memory, {_mib(free)} MiB are available: "
            f"{advice}",
            code="out_of_memory",
        )


def require_model(
    config: ModelConfig,
    largest_values: int,
    dtype: str,
    quantization: str,
    *,
    free: int | None = None,
) -> None:
    """Raises ModelError when the model does not fit, saying which options would make it fit.

    `largest_values`: numbers in the largest tensor of its files. `dtype`: "float32" or "bfloat16".
    """
    sizes = {
        option: model_bytes(config, largest_values, *settings)
        for option, settings in _SMALLER.items()
    }
    needed = model_bytes(config, largest_values, dtype, quantization)
    free = available_bytes() if free is None else free
    told = {
        option: f"{option} ({_mib(size)} MiB, {_HOW[option]})"
        for option, size in sizes.items()
        if size < needed
    }
    fitting = [text for option, text in told.items() if sizes[option] <= (free or 0)]
    if fitting:
        advice = f"it would fit as {' or '.join(fitting)}"
    elif told:
        advice = f"it would not fit as {', '.join(told.values())} either: use a smaller model"
    else:
        advice = "use a smaller model"
    form = dtype if quantization == "none" else f"{dtype} with {quantization} weights"
    require(
        needed,
        f"a model of {config.parameters / 1e6:,.0f}M parameters in {form}",
        advice,
        free=free,
    )


def model_bytes(config: ModelConfig, largest_values: int, dtype: str, quantization: str) -> int:
    """What loading the model and keeping it takes: its weights, and room to convert one."""
    itemsize = _ITEM_BYTES[dtype]
    # a tensor as read and converted; or several joined, then packed or quantized from float32
    per_joined = 2 * (1 + itemsize) if quantization == "none" else 9
    joined = config.largest_linear_values * per_joined
    working = max(largest_values * (4 + itemsize), joined)
    return weight_bytes(config, dtype, quantization) + working


def weight_bytes(config: ModelConfig, dtype: str, quantization: str) -> int:
    """What the weights take in memory; for int4 at most, since some decide themselves."""
    itemsize = _ITEM_BYTES[dtype]
    embedding = config.vocab_size * config.hidden_size
    plain = config.parameters - config.linear_values
    linear = config.linear_values
    # a tied head is the embedding itself only where it is neither packed nor quantized
    packed = dtype == "bfloat16" or native.library() is not None
    if config.tied and (quantization != "none" or packed):
        linear += embedding
    if quantization == "none":
        return (plain + linear) * itemsize
    eight = linear
    if quantization == "int4":
        narrow = config.hidden_size < NARROW
        eight = embedding + config.qkv_values + (config.gate_up_values if narrow else 0)
    return int(plain * itemsize + eight * _INT8_BYTES + (linear - eight) * _INT4_BYTES)


def _mib(size_bytes: int) -> str:
    return f"{size_bytes / 2**20:,.0f}"
