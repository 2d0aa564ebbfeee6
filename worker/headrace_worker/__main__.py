"""`python -m headrace_worker`: load the model, join the fleet, serve until told to stop."""

from __future__ import annotations

import asyncio
import signal
import sys

import structlog
import torch

from headrace import logs, telemetry
from headrace.cache_directory import open_cache
from headrace.clock import SystemClock
from headrace.config import load_or_exit
from headrace.errors import ModelError
from headrace.models import resolve
from headrace.types import BLOCK_TOKENS
from headrace_worker import metrics
from headrace_worker.allocator import keep_freed_memory
from headrace_worker.cache_link import CacheLink
from headrace_worker.consumer import Consumer
from headrace_worker.engine import Engine, EngineConfig
from headrace_worker.kv.pool import KvPool
from headrace_worker.loading import LoadedModel, load_model, memory
from headrace_worker.membership import Capacity
from headrace_worker.settings import WorkerSettings

log = structlog.get_logger()

KV_SHARE_OF_FREE_MEMORY = 0.2
KV_BYTES_MAX = 4 * 2**30
KV_TOKENS_MIN = 2_048
PROGRESS_PERCENT = 10
"""Loading is told of in steps of this size."""


def kv_tokens_for(settings: WorkerSettings, loaded: LoadedModel) -> int:
    """Size of the KV pool: as told, or a share of the memory that is free now.

    A context that does not fit into that share is served as far as it does.
    """
    if settings.kv_tokens:
        return settings.kv_tokens
    block_bytes = KvPool.block_bytes(loaded.config, loaded.dtype, settings.kv_dtype)
    free_bytes = memory.available_bytes() or KV_BYTES_MAX
    budget_bytes = min(KV_BYTES_MAX, int(free_bytes * KV_SHARE_OF_FREE_MEMORY))
    least = min(loaded.record.context_tokens, KV_TOKENS_MIN)
    return max(least, budget_bytes // block_bytes * BLOCK_TOKENS)


def _load(settings: WorkerSettings, name: str) -> LoadedModel:
    """Raises ModelError."""
    told = 0

    def progress(done: int, total: int) -> None:
        nonlocal told
        percent = 100 * done // max(1, total)
        if percent >= told + PROGRESS_PERCENT:
            told = percent
            log.info("loading weights", model=name, percent=percent)

    return load_model(
        resolve(settings.model),
        name,
        settings.dtype,
        settings.quantization,
        context_tokens=settings.context_tokens,
        progress=progress,
    )


def build(settings: WorkerSettings) -> Consumer:
    """Everything but the event loop. Raises ModelError."""
    threads = settings.threads or torch.get_num_threads()
    torch.set_num_threads(1)  # this thread's; the engine's has its own, see engine_thread.py
    clock = SystemClock()
    name = settings.model_name or settings.model.rstrip("/").rsplit("/", 1)[-1]
    loaded = _load(settings, name)
    kv_tokens = kv_tokens_for(settings, loaded)
    config = EngineConfig(
        kv_tokens=kv_tokens,
        max_running=settings.max_jobs,
        step_tokens_max=settings.step_tokens,
        lower_prefill_ms=settings.lower_prefill_ms,
        calm_ms=settings.calm_ms,
        offer_blocks=bool(settings.cache_url),
        speculation=settings.speculation == "ngram",
        kv_dtype=settings.kv_dtype,
    )
    log.info(
        "model loaded",
        model=name,
        dtype=str(loaded.dtype),
        quantization=loaded.quantization,
        weight_mib=loaded.weight_bytes >> 20,
        kv_tokens=kv_tokens,
    )
    capacity = Capacity(kv_tokens, settings.max_jobs, settings.role)
    engine = Engine(loaded, config, clock)
    cache = _link(settings, engine) if settings.cache_url else None
    return Consumer(settings, engine, engine.record, capacity, clock, cache, threads=threads)


def _link(settings: WorkerSettings, engine: Engine) -> CacheLink:
    timeout_s = settings.cache_timeout_ms / 1000
    client = open_cache(settings.cache_url, settings.redis_url, timeout_s=timeout_s)
    return CacheLink(
        client,
        layout=engine.layout,
        block_bytes=engine.block_bytes,
        limit_ms=settings.cache_timeout_ms,
    )


async def serve(settings: WorkerSettings) -> None:
    consumer = build(settings)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, consumer.drain)
    stop_metrics = None
    if settings.metrics_port:
        stop_metrics = metrics.serve(
            settings.metrics_port, consumer.model, consumer.status, consumer.counts
        )
    try:
        await consumer.run()
    finally:
        if stop_metrics is not None:
            stop_metrics()


def main() -> None:
    settings = load_or_exit(WorkerSettings)
    keep_freed_memory()
    logs.setup("worker", level=settings.log_level, json=settings.log_json)
    telemetry.setup("worker", settings.otlp_endpoint, settings.worker_id)
    try:
        asyncio.run(serve(settings))
    except ModelError as error:
        print(f"headrace worker: {error.message}", file=sys.stderr)
        raise SystemExit(2) from error
    finally:
        telemetry.shutdown()


if __name__ == "__main__":
    main()
