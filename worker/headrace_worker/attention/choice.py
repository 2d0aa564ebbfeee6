"""Which attention backend a worker takes, with the pool that it reads.

Invariant: one that is named is taken or refused with the reason, never replaced in silence; `auto`
says what it took and why. On a CPU those are the native kernels, or torch's SDPA, over the pool of
blocks; on a GPU the pool
of pages, read by flash-attn, or by torch's SDPA where flash-attn is not installed or cannot.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import structlog
import torch

from headrace.errors import SettingsError
from headrace_worker import native
from headrace_worker.attention.buckets import buckets_up_to
from headrace_worker.attention.flash import FlashBackend
from headrace_worker.attention.flash_kernels import Kernels, find_kernels
from headrace_worker.attention.interface import AttentionBackend
from headrace_worker.attention.page_sdpa import PageSdpa
from headrace_worker.attention.sdpa import SdpaBackend
from headrace_worker.decode_graphs import CudaRecorder, DecodeGraphs
from headrace_worker.device import CPU, free_bytes
from headrace_worker.kv.paged import PagedKvPool
from headrace_worker.kv.payload import KvDtype
from headrace_worker.kv.pool import KvPool
from headrace_worker.model import Decoder, ModelConfig
from headrace_worker.native.attention import NativeBackend, supports

log = structlog.get_logger()

AttentionName = Literal["auto", "sdpa", "flash"]


@dataclass(frozen=True, slots=True)
class Wanted:
    """What an engine asks of attention. `running_max`: sequences that are computed at a time."""

    blocks: int
    kv_dtype: KvDtype = "auto"
    name: AttentionName = "auto"
    running_max: int = 64


@dataclass(frozen=True, slots=True)
class Machine:
    """A pool, the backend over it, and recorded decode steps where there are some."""

    pool: KvPool | PagedKvPool
    backend: AttentionBackend
    graphs: DecodeGraphs | None = None


def attention_over(pool: KvPool, config: ModelConfig) -> AttentionBackend:
    """The faster one over a pool in the host's memory: the native kernels, where they are."""
    library = native.library()
    if library is not None and supports(config, pool.dtype):
        return NativeBackend(library, pool, config)
    return SdpaBackend(pool, config)


def make_attention(
    model: Decoder,
    config: ModelConfig,
    dtype: torch.dtype,
    wanted: Wanted,
    device: torch.device = CPU,
) -> Machine:
    """The pool and the backend. Raises SettingsError where what is wanted cannot work."""
    kernels = _choose(config, dtype, wanted, device)
    if kernels is None:
        pool = KvPool(config, wanted.blocks, dtype, wanted.kv_dtype)
        if wanted.name == "auto":
            return Machine(pool, attention_over(pool, config))
        return Machine(pool, SdpaBackend(pool, config))
    paged = _paged(config, dtype, wanted, device, kernels)
    backend = FlashBackend(paged, config, kernels)
    log.info("attention", backend=kernels.name, page_tokens=kernels.page_tokens)
    graphs = None
    recorded = device.type == "cuda" and not isinstance(kernels, PageSdpa)
    if recorded and model.first and model.last:
        buckets = buckets_up_to(wanted.running_max)
        recorder = CudaRecorder(device)
        graphs = DecodeGraphs(model, backend, buckets, config.context_tokens, recorder)
    return Machine(paged, backend, graphs)


def _paged(
    config: ModelConfig, dtype: torch.dtype, wanted: Wanted, device: torch.device, kernels: Kernels
) -> PagedKvPool:
    page_tokens, spare = kernels.page_tokens, wanted.running_max
    size = PagedKvPool.size_bytes(
        config, wanted.blocks, dtype, page_tokens=page_tokens, spare_pages=spare
    )
    free = free_bytes(device)
    if free is not None and size > free:
        raise SettingsError(
            f"a KV cache of {wanted.blocks} blocks takes {size >> 20:,} MiB of {device}, "
            f"{free >> 20:,} MiB are free: lower HEADRACE_KV_TOKENS"
        )
    return PagedKvPool(
        config, wanted.blocks, dtype, page_tokens=page_tokens, spare_pages=spare, device=device
    )


def _choose(
    config: ModelConfig, dtype: torch.dtype, wanted: Wanted, device: torch.device
) -> Kernels | None:
    """What reads pages; None for SDPA over blocks in the host's memory. Raises SettingsError."""
    if device.type == "cpu" and wanted.name != "flash":
        return None
    if wanted.kv_dtype != "auto":
        raise SettingsError(
            f"HEADRACE_KV_DTYPE={wanted.kv_dtype}: flash-attn reads keys and values in the model's "
            "dtype, and to expand all of them in every step would cost more than it saves"
        )
    if wanted.name == "sdpa":
        return PageSdpa()
    kernels, reason = _flash(config, dtype, device)
    if kernels is None and wanted.name == "flash":
        raise SettingsError(f"HEADRACE_ATTENTION=flash: {reason}")
    if kernels is None:
        log.warning("attention without flash-attn", reason=reason)
    return kernels or PageSdpa()


def _flash(
    config: ModelConfig, dtype: torch.dtype, device: torch.device
) -> tuple[Kernels | None, str]:
    """A version of flash-attn that can compute this, or why there is none."""
    if config.head_dim % 8:
        return None, f"heads of {config.head_dim} numbers: flash-attn wants a multiple of 8"
    found, missing = find_kernels()
    for kernels in found:
        unfit = _unfit(kernels, config, dtype, device)
        if not unfit:
            return kernels, ""
        missing.append(f"{kernels.name}: {unfit}")
    return None, f"no flash-attn that works here ({'; '.join(missing)})"


def _unfit(kernels: Kernels, config: ModelConfig, dtype: torch.dtype, device: torch.device) -> str:
    """Why these kernels cannot compute this; empty where they can."""
    if device.type not in kernels.devices:
        return f"it computes on {' and '.join(kernels.devices)}, not on {device.type}"
    if dtype not in kernels.dtypes:
        names = " and ".join(str(each).removeprefix("torch.") for each in kernels.dtypes)
        return f"it computes in {names}, not in {str(dtype).removeprefix('torch.')}"
    if config.head_dim > kernels.head_dim_max:
        return f"heads of {config.head_dim} numbers, {kernels.head_dim_max} at most"
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        if major not in kernels.capabilities:
            return f"not made for compute capability {major}.{minor}"
    return ""
