"""`python -m headrace_worker.parallel.rank FD RANK`: a rank that computes what rank 0 tells it.

Invariant: it decides nothing and outlives nobody. Signals that ask a worker to stop are for rank 0,
which finishes what runs and needs all ranks for that; this process ends when it is told to, when
rank 0 dies (the kernel sees to that), or in an error, which ends the worker.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
from collections.abc import Callable
from functools import partial
from typing import NoReturn

import structlog
import torch

from headrace import logs
from headrace.config import load_or_exit
from headrace.errors import ModelError
from headrace_worker import native, startup
from headrace_worker.allocator import keep_freed_memory
from headrace_worker.attention.choice import attention_over, make_attention
from headrace_worker.attention.interface import AttentionBackend
from headrace_worker.device import free_bytes
from headrace_worker.executor import Executor
from headrace_worker.kv.paged import PagedKvPool
from headrace_worker.kv.pool import KvPool
from headrace_worker.loading import LoadedModel
from headrace_worker.native.program import Split
from headrace_worker.parallel import commands
from headrace_worker.parallel.commands import Kind, Loaded
from headrace_worker.parallel.links import Links, SharedLinks
from headrace_worker.parallel.shared import SharedMemory
from headrace_worker.parallel.stage import Stage
from headrace_worker.parallel.stages import parts_of, vocab_runs
from headrace_worker.parallel.torch_links import join, ranks_here
from headrace_worker.parallel.watch import (
    BAD_SETTING_EXIT,
    HANG_LEASE_PERCENT,
    LOST_EXIT,
    Loss,
    Pulse,
    Watch,
)
from headrace_worker.settings import WorkerSettings
from headrace_worker.step_inputs import StepInputs

log = structlog.get_logger()


class Follower:
    """Carries out rank 0's commands with one part of the model."""

    def __init__(
        self,
        links: Links,
        loaded: LoadedModel,
        memory: SharedMemory | None,
        on_open: Callable[[], None] | None = None,
    ) -> None:
        """`memory`: what this host's ranks share, if they do. `on_open`: called when it serves."""
        self._links, self._loaded, self._memory = links, loaded, memory
        self._on_open = on_open
        self._kv: KvPool | PagedKvPool | None = None
        self._stage: Stage | None = None

    def run(self) -> None:
        """Until told to leave. Raises what a step raises."""
        loaded = self._loaded
        fingerprint = loaded.record.fingerprint
        told = Loaded(
            loaded.weight_bytes,
            fingerprint,
            socket.gethostname(),
            free_bytes(loaded.device),
            kernels=native.isa(),
        )
        self._links.answer(commands.pack_loaded(told))
        while True:
            message = self._links.next_command()
            body = message[1:].data
            match Kind(message[0]):
                case Kind.STEP:
                    self._step(StepInputs.unpack(body))
                case Kind.OPEN:
                    self._open(commands.unpack_open(body))
                case Kind.ZERO:
                    assert self._kv is not None, "blocks are zeroed once there are some"
                    self._kv.zero_blocks(commands.unpack_blocks(body))
                case Kind.END:
                    return

    def _open(self, opening: commands.Open) -> None:
        loaded, rank, wanted = self._loaded, self._links.rank, opening.wanted
        assert loaded.part is not None, "a rank has loaded a part"
        backend: AttentionBackend
        if self._memory is None:
            machine = make_attention(
                loaded.model, loaded.part.config, loaded.dtype, wanted, loaded.device
            )
            self._kv, backend = machine.pool, machine.backend
        else:
            config = loaded.part.config
            size = KvPool.block_bytes(config, loaded.dtype, wanted.kv_dtype) * (wanted.blocks + 1)
            memory = self._memory.map(opening.starts[rank], size)
            pool = KvPool(config, wanted.blocks, loaded.dtype, wanted.kv_dtype, memory=memory)
            self._kv, backend = pool, attention_over(pool, config)
        parts = parts_of(loaded.part.whole, self._links.shape)
        split = Split(parts, self._links.group)
        executor = Executor(loaded.model, backend, loaded.device, split=split)
        self._stage = Stage(executor, loaded.part, vocab_runs(parts), self._links)
        if self._on_open is not None:
            self._on_open()
        self._links.answer(b"")

    def _step(self, inputs: StepInputs) -> None:
        assert self._stage is not None, "steps come after `open`"
        verdict = self._stage.run(inputs)
        if verdict is not None:
            self._links.answer(commands.pack_verdict(verdict))


def serve(
    links: Links,
    settings: WorkerSettings,
    memory: SharedMemory | None,
    on_open: Callable[[], None] | None = None,
) -> int:
    """Follows rank 0 to the end; the exit code."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    pulse = Pulse(links.beat)
    pulse.start()
    here = ranks_here() if memory is None else links.shape.ranks
    torch.set_num_threads(startup.threads_each(settings, here))
    try:
        Follower(links, startup.load(settings, links), memory, on_open).run()
    except ModelError as error:
        print(f"headrace worker, rank {links.rank}: {error.message}", file=sys.stderr)
        return BAD_SETTING_EXIT
    except Exception as error:
        log.error("a rank failed", rank=links.rank, error=repr(error), exc_info=error)
        return LOST_EXIT
    finally:
        pulse.stop()
    return 0


def follow_over_torch(settings: WorkerSettings) -> NoReturn:
    """What a process that torchrun started as another rank than 0 does to its end."""
    try:
        links = join(startup.shape_of(settings), settings.device)
    except ModelError as error:
        print(f"headrace worker: {error.message}", file=sys.stderr)
        raise SystemExit(BAD_SETTING_EXIT) from error
    hang_ms = settings.lease_ms * HANG_LEASE_PERCENT // 100
    # no kernel ends it when rank 0's host is gone
    watch = Watch(
        links.beats, (), partial(_end_at_once, links.rank), own=links.rank, hang_ms=hang_ms
    )
    watch.start()
    code = serve(links, settings, None, watch.note_serving)
    sys.stderr.flush()
    os._exit(code)


def _end_at_once(rank: int, loss: Loss) -> None:
    log.error("a rank is lost, this one ends", rank=rank, reason=loss.reason)
    sys.stderr.flush()
    os._exit(loss.exit_code)


def main() -> None:
    fd, rank = int(sys.argv[1]), int(sys.argv[2])
    settings = load_or_exit(WorkerSettings)
    keep_freed_memory()
    logs.setup("worker", level=settings.log_level, json=settings.log_json)
    memory = SharedMemory(fd)
    links = SharedLinks(memory, rank, startup.shape_of(settings))
    code = serve(links, settings, memory)
    sys.stderr.flush()
    os._exit(code)  # rank 0 waits for it: no clean-up of gigabytes


if __name__ == "__main__":
    main()
