"""Which device a worker computes on, and how much memory that has.

Invariant: a worker has one device, chosen at start; a name that cannot be used stops the start and
says why. Tensors of a step are made on it, its weights and its KV pool lie there; sampling reads
logits on the host.
"""

from __future__ import annotations

import torch

from headrace.errors import ModelError

CPU = torch.device("cpu")
CAPABILITY_MIN = (8, 0)
"""Of GPUs: bfloat16 from Ampere on."""


def resolve_device(name: str) -> torch.device:
    """From `auto` (a GPU where there is one), `cpu`, `cuda` or `cuda:N`. Raises ModelError."""
    if name == "auto":
        return torch.device("cuda", 0) if torch.cuda.is_available() else CPU
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ModelError(f"device {name!r} is none of auto, cpu, cuda and cuda:N") from error
    if device.type == "cpu":
        return CPU
    if device.type != "cuda":
        raise ModelError(f"device {name!r} is none of auto, cpu, cuda and cuda:N")
    if not torch.cuda.is_available():
        built = "this torch is built without CUDA" if not torch.version.cuda else ""
        raise ModelError(f"HEADRACE_DEVICE={name}: {built or 'no GPU can be used here'}")
    index = device.index or 0
    if index >= torch.cuda.device_count():
        raise ModelError(f"HEADRACE_DEVICE={name}: there are {torch.cuda.device_count()} GPUs")
    return _capable(torch.device("cuda", index))


def rank_device(name: str, local_rank: int, ranks_here: int) -> torch.device:
    """Where the `local_rank`-th of a host's ranks computes: each on a GPU of its own, or all on the
    CPU. Raises ModelError, also for fewer GPUs than ranks.
    """
    device = resolve_device(name)
    if device.type == "cpu":
        return CPU
    if torch.device("cuda" if name == "auto" else name).index is not None:
        raise ModelError(f"HEADRACE_DEVICE={name}: ranks take a GPU each, say cuda")
    count = torch.cuda.device_count()
    if ranks_here > count:
        raise ModelError(
            f"{ranks_here} ranks on this host need a GPU each and there are {count}; "
            "HEADRACE_DEVICE=cpu computes on CPUs"
        )
    return _capable(torch.device("cuda", local_rank))


def _capable(device: torch.device) -> torch.device:
    capability = torch.cuda.get_device_capability(device)
    if capability < CAPABILITY_MIN:
        raise ModelError(
            f"{torch.cuda.get_device_name(device)} has compute capability "
            f"{capability[0]}.{capability[1]}, 8.0 is needed"
        )
    return device


def free_bytes(device: torch.device) -> int | None:
    """Memory of a GPU that could be taken now; None for the host, whose memory.py knows."""
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    return int(free)


def collectives_for(device: torch.device) -> str:
    """The torch.distributed backend for ranks on such devices: NCCL between GPUs, gloo else."""
    return "nccl" if device.type == "cuda" else "gloo"
