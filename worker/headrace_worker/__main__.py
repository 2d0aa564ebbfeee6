"""`python -m headrace_worker`: load the model, join the fleet, serve until told to stop."""

from __future__ import annotations

import asyncio
import os
import signal
import sys

import structlog
import torch

from headrace import logs, loops, telemetry, turns
from headrace.cache_directory import open_cache
from headrace.clock import SystemClock
from headrace.config import load_or_exit
from headrace.errors import ModelError, SettingsError
from headrace.garbage import settle_memory
from headrace.types import WorkerRole
from headrace_worker import metrics, native, startup, step_log
from headrace_worker.allocator import keep_freed_memory
from headrace_worker.cache_link import CacheLink
from headrace_worker.consumer import Consumer
from headrace_worker.engine import Engine
from headrace_worker.engine_config import EngineConfig
from headrace_worker.membership import Capacity
from headrace_worker.parallel import rank
from headrace_worker.parallel.ranks import Ranks
from headrace_worker.parallel.shape import Shape
from headrace_worker.parallel.torch_links import (
    end_with_starter,
    join,
    launch,
    ranks_here,
    started_by_torchrun,
)
from headrace_worker.parallel.watch import HANG_LEASE_PERCENT, Loss
from headrace_worker.settings import WorkerSettings

log = structlog.get_logger()

KERNELS_CHARS_MAX = 200
"""Of the reason why there are none."""


def build(settings: WorkerSettings) -> tuple[Consumer, Ranks | None]:
    """Everything but the event loop; the ranks beside this one. Raises ModelError."""
    shape = startup.shape_of(settings)
    threads = threads_of(settings, shape)
    torch.set_num_threads(1)  # this thread's; the engine's has its own, see engine_thread.py
    ranks = _start_ranks(settings, shape) if shape.ranks > 1 else None
    loaded = startup.load(settings, None if ranks is None else ranks.links)
    weight_bytes, block_bytes, others_bytes = loaded.weight_bytes, None, None
    if ranks is not None:
        weight_bytes += ranks.await_loaded(loaded.record.fingerprint)
        block_bytes = ranks.block_bytes(loaded, settings.kv_dtype)
        others_bytes = ranks.free_bytes
    kv_tokens = startup.kv_tokens_for(settings, loaded, block_bytes, others_bytes)
    config = EngineConfig(
        kv_tokens=kv_tokens,
        max_running=settings.max_jobs,
        step_tokens_max=settings.step_tokens,
        lower_prefill_ms=settings.lower_prefill_ms,
        calm_ms=settings.calm_ms,
        step_stretch=settings.step_stretch,
        offer_blocks=bool(settings.cache_url) and (ranks is None or ranks.share_memory),
        speculation=settings.speculation == "ngram",
        kv_dtype=settings.kv_dtype,
        attention=settings.attention,
    )
    log.info(
        "model loaded",
        model=loaded.record.name,
        dtype=str(loaded.dtype),
        device=str(loaded.device),
        quantization=loaded.quantization,
        weight_mib=weight_bytes >> 20,
        kv_tokens=kv_tokens,
        ranks=shape.ranks,
        kernels=native.state(),
    )
    clock = SystemClock()
    kernels = native.state()[:KERNELS_CHARS_MAX]
    capacity = Capacity(
        kv_tokens,
        settings.max_jobs,
        settings.role,
        kernels=kernels,
        precision=loaded.precision,
    )
    if settings.step_log:
        steps = step_log.open_log(settings, step_log.about(settings, loaded, kv_tokens, threads))
        engine: Engine = step_log.LoggedEngine(loaded, config, clock, ranks, log=steps)
    else:
        engine = Engine(loaded, config, clock, ranks)
    cache = None
    if settings.cache_url and ranks is not None and not ranks.share_memory:
        log.warning("ranks without common memory keep their KV: the cache service is not used")
    elif settings.cache_url:
        cache = _link(settings, engine)
    consumer = Consumer(settings, engine, engine.record, capacity, clock, cache, threads=threads)
    return consumer, ranks


def _start_ranks(settings: WorkerSettings, shape: Shape) -> Ranks:
    """The other ranks: processes of this one, or those that torchrun started beside it."""
    own = {"OMP_NUM_THREADS": str(threads_of(settings, shape))}
    if not started_by_torchrun() and startup.shares_memory(settings):
        ranks = Ranks.spawn(shape, own)
    else:
        if settings.role is not WorkerRole.BOTH:
            raise ModelError(
                f"HEADRACE_ROLE={settings.role}: ranks without common memory keep their KV, and "
                "such a worker does both"
            )
        if settings.cache_url and started_by_torchrun():
            raise ModelError(
                "a worker whose ranks torchrun starts keeps its KV to itself: leave "
                "HEADRACE_CACHE_URL empty"
            )
        children = [] if started_by_torchrun() else launch(shape, own)
        links = join(shape, settings.device)
        in_one_memory = ranks_here() if links.device.type == "cpu" else 1
        ranks = Ranks(links, children, ranks_here=in_one_memory)
    ranks.watch(_end_at_once, hang_ms=settings.lease_ms * HANG_LEASE_PERCENT // 100)
    return ranks


def threads_of(settings: WorkerSettings, shape: Shape) -> int:
    here = ranks_here() if started_by_torchrun() else shape.ranks
    return startup.threads_each(settings, here)


def _end_at_once(loss: Loss) -> None:
    """A part of the model is gone: the lease ends by itself, and jobs move on."""
    log.error("a rank is lost, this worker ends", reason=loss.reason)
    sys.stderr.flush()
    os._exit(loss.exit_code)


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
    consumer, ranks = build(settings)
    settle_memory()
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
        if ranks is not None:
            ranks.close()


def main() -> None:
    settings = load_or_exit(WorkerSettings)
    keep_freed_memory()
    logs.setup("worker", level=settings.log_level, json=settings.log_json)
    if started_by_torchrun():
        end_with_starter()
        if os.environ["RANK"] != "0":
            rank.follow_over_torch(settings)
    telemetry.setup("worker", settings.otlp_endpoint, settings.worker_id)
    turns.ask(turns.SHORT_NS)  # of what answers; the engine's threads take the usual ones
    try:
        loops.run(serve(settings))
    except (ModelError, SettingsError) as error:
        print(f"headrace worker: {error.message}", file=sys.stderr)
        raise SystemExit(2) from error
    finally:
        telemetry.shutdown()
    if started_by_torchrun():
        # gloo's threads may be letting go of tensors; the interpreter's end would abort them
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


if __name__ == "__main__":
    main()
