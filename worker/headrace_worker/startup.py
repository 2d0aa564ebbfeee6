"""What a worker does before it serves: reading its model, and choosing how much KV it keeps.

Invariant: every rank of a worker reads the same settings and comes to the same model; how much KV
they keep, rank 0 alone decides.
"""

from __future__ import annotations

import structlog
import torch

from headrace.errors import ModelError
from headrace.models import resolve
from headrace.types import BLOCK_TOKENS
from headrace_worker import native
from headrace_worker.device import free_bytes, resolve_device
from headrace_worker.kv.pool import KvPool
from headrace_worker.loading import LoadedModel, load_model, memory
from headrace_worker.model import ModelConfig
from headrace_worker.parallel.collective import ORDERED_STORES
from headrace_worker.parallel.links import Links
from headrace_worker.parallel.shape import Part, Shape
from headrace_worker.parallel.stages import parts_of
from headrace_worker.settings import WorkerSettings

log = structlog.get_logger()

KV_SHARE_OF_FREE_MEMORY = 0.2
KV_SHARE_OF_GPU = 0.8
"""Of what the weights leave of a GPU; steps, graphs and spare pages take the rest."""
KV_BYTES_MAX = 4 * 2**30
KV_TOKENS_MIN = 2_048
PROGRESS_PERCENT = 10
"""Loading is told of in steps of this size."""


def name_of(settings: WorkerSettings) -> str:
    """What clients call the model."""
    return settings.model_name or settings.model.rstrip("/").rsplit("/", 1)[-1]


def shape_of(settings: WorkerSettings) -> Shape:
    """Raises ModelError for more ranks than there may be."""
    return Shape(settings.tensor_parallel, settings.pipeline_parallel)


def threads_each(settings: WorkerSettings, ranks: int) -> int:
    """Cores for each of a host's `ranks`, which share what the worker may use."""
    return max(1, (settings.threads or torch.get_num_threads()) // ranks)


def shares_memory(settings: WorkerSettings) -> bool:
    """Whether ranks of one host reach each other in its memory, or as over several hosts.

    Raises ModelError where they are told to and cannot.
    """
    device = resolve_device(settings.device)
    unfit = ""
    if device.type != "cpu":
        unfit = f"HEADRACE_DEVICE={settings.device}: each rank's KV lies on its GPU"
    elif not ORDERED_STORES:
        unfit = "this processor may reorder stores"
    if unfit and settings.rank_links == "shared":
        raise ModelError(f"HEADRACE_RANK_LINKS=shared: {unfit}")
    return not unfit and settings.rank_links != "torch"


def kv_tokens_for(
    settings: WorkerSettings,
    loaded: LoadedModel,
    block_bytes: int | None = None,
    others_bytes: int | None = None,
) -> int:
    """Size of the KV pool: as told, or a share of the memory that is free now.

    A context that does not fit into that share is served as far as it does. `block_bytes`: what a
    block takes on this host, where that is not this process's alone. `others_bytes`: the least that
    is free on other ranks' GPUs.
    """
    if settings.kv_tokens:
        return settings.kv_tokens
    if block_bytes is None:
        block_bytes = KvPool.block_bytes(loaded.config, loaded.dtype, settings.kv_dtype)
    gpu_bytes = free_bytes(loaded.device)
    if gpu_bytes is not None:
        gpu_bytes = min(gpu_bytes, others_bytes or gpu_bytes)
        return max(KV_TOKENS_MIN, int(gpu_bytes * KV_SHARE_OF_GPU) // block_bytes * BLOCK_TOKENS)
    host_bytes = memory.available_bytes() or KV_BYTES_MAX
    budget_bytes = min(KV_BYTES_MAX, int(host_bytes * KV_SHARE_OF_FREE_MEMORY))
    least = min(loaded.record.context_tokens, KV_TOKENS_MIN)
    return max(least, budget_bytes // block_bytes * BLOCK_TOKENS)


def load(settings: WorkerSettings, links: Links | None = None) -> LoadedModel:
    """The model, or with `links` the part of it that their rank holds. Raises ModelError.

    The native kernels are for CPUs.
    """
    told, name = 0, name_of(settings)
    device = resolve_device(settings.device) if links is None else links.device
    native.choose(settings.kernels if device.type == "cpu" else "off")

    def progress(done: int, total: int) -> None:
        nonlocal told
        percent = 100 * done // max(1, total)
        if percent >= told + PROGRESS_PERCENT:
            told = percent
            log.info("loading weights", model=name, percent=percent)

    def part(config: ModelConfig) -> Part:
        assert links is not None, "a part is some rank's"
        return parts_of(config, links.shape)[links.rank]

    return load_model(
        resolve(settings.model),
        name,
        settings.dtype,
        settings.quantization,
        context_tokens=settings.context_tokens,
        progress=progress if links is None or not links.rank else None,
        device=device,
        part=part if links is not None else None,
        group=links.group if links is not None else None,
    )
