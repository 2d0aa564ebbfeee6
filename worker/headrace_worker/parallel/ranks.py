"""Rank 0's side of a worker of several ranks: it starts them, tells them steps, and hears tokens.

Invariant: whatever is told to one rank is told to all, in one order; the engine's thread alone
does it, once the worker serves. After a step that raised on any rank, no rank knows where the
others are: `RankError` says that this worker is at its end.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from headrace.errors import HeadraceError, ModelError
from headrace.supervisor import die_with_parent
from headrace_worker import native
from headrace_worker.attention.choice import Wanted, attention_over, make_attention
from headrace_worker.executor import Executor
from headrace_worker.kv.parts import PartedKv
from headrace_worker.kv.pool import KvDtype, KvPool
from headrace_worker.loading import LoadedModel
from headrace_worker.native.program import Split
from headrace_worker.parallel import commands
from headrace_worker.parallel.distant import DistantKv
from headrace_worker.parallel.links import ANSWER_RING_BYTES, Links, SharedLinks
from headrace_worker.parallel.shape import Part, Shape
from headrace_worker.parallel.shared import SharedMemory
from headrace_worker.parallel.stage import Stage
from headrace_worker.parallel.stages import parts_of, vocab_runs
from headrace_worker.parallel.vocabulary import Verdict
from headrace_worker.parallel.watch import Loss, Pulse, Watch
from headrace_worker.parallel.wishes import Need
from headrace_worker.step_inputs import StepInputs

END_S = 2.0
"""How long ranks that were told to leave may take."""
LOAD_S_MAX = 1800.0
"""How long a rank may read its weights."""
STEP_S_MAX = 60.0
"""How long a step that has been begun may take in the other stages."""


class RankError(HeadraceError):
    """The ranks are out of step, or one is gone: nothing can be computed any more."""


@dataclass(slots=True)
class _Step:
    """A step that has been begun, of which at most `answer_bytes` will be heard."""

    answer_bytes: int
    heard: bool = False
    verdict: Verdict | None = None


def _answer_bytes(inputs: StepInputs, vocab_size: int) -> int:
    """What the last stage says at most of a step."""
    if inputs.wishes is None:
        return 0
    # a row that draws may turn out to be needed whole
    whole = int(np.count_nonzero(inputs.wishes.needs != Need.PEAK))
    return 8 * inputs.wanted_rows + 4 * vocab_size * whole


class Ranks:
    """All ranks of a worker as rank 0 sees them: `Steps` to its engine."""

    def __init__(
        self,
        links: Links,
        children: Sequence[subprocess.Popen[bytes]] = (),
        *,
        ranks_here: int | None = None,
    ) -> None:
        """`ranks_here`: how many have their KV in one memory; None for all of them."""
        self.links, self.shape = links, links.shape
        self.ranks_here = ranks_here or links.shape.ranks
        self.free_bytes: int | None = None
        """What the fullest of the other ranks' GPUs has left; None on CPUs."""
        self._children = list(children)
        self._pulse = Pulse(links.beat)
        self._pulse.start()
        self._watch: Watch | None = None
        self._stage: Stage | None = None
        self._under_way: deque[_Step] = deque()
        self._vocab = 0

    @classmethod
    def spawn(cls, shape: Shape, env: Mapping[str, str]) -> Ranks:
        """Starts the other ranks on this host, as children that never outlive this process.

        `env`: their settings. Belongs into the main thread. Raises ModelError.
        """
        links = SharedLinks.create(shape)
        children = [_start(links.memory, rank, env) for rank in range(1, shape.ranks)]
        return cls(links, children)

    @property
    def pids(self) -> list[int]:
        """Of the ranks that are this process's children."""
        return [child.pid for child in self._children]

    def watch(self, on_loss: Callable[[Loss], None], *, hang_ms: int) -> None:
        """From now on `on_loss` is called, in a thread of its own, when a rank is lost."""
        self._watch = Watch(self.links.beats, self._children, on_loss, hang_ms=hang_ms)
        self._watch.start()

    def await_loaded(self, fingerprint: str) -> int:
        """Bytes of all other ranks' weights, once they are there.

        Raises ModelError for a rank that did not load, loaded another model, or computes it in
        another way: what ranks say to each other within a step would not fit.
        """
        size = 0
        for rank in range(1, self.shape.ranks):
            loaded = commands.unpack_loaded(self._answer_of(rank, LOAD_S_MAX))
            if loaded.fingerprint != fingerprint:
                raise ModelError(f"rank {rank} has loaded another model than rank 0")
            if loaded.kernels != native.isa():
                raise ModelError(
                    f"rank {rank} on {loaded.host} computes with native kernels: {loaded.kernels}, "
                    f"rank 0 with {native.isa()}; HEADRACE_KERNELS=off on all of them makes them "
                    "alike"
                )
            size += loaded.weight_bytes
            if loaded.free_bytes is not None:
                self.free_bytes = min(loaded.free_bytes, self.free_bytes or loaded.free_bytes)
        return size

    def _answer_of(self, rank: int, limit_s: float) -> bytes:
        answer = self.links.next_answer(rank, limit_s)
        if answer is None:
            raise ModelError(f"rank {rank} did not answer within {limit_s:g} s")
        return answer.tobytes()

    def block_bytes(self, loaded: LoadedModel, kv_dtype: KvDtype) -> int:
        """What a KV block takes on the ranks of the host where that is most."""
        sizes = [
            KvPool.block_bytes(part.config, loaded.dtype, kv_dtype) for part in self._parts(loaded)
        ]
        here = self.ranks_here
        return max(sum(sizes[at : at + here]) for at in range(0, len(sizes), here))

    def _parts(self, loaded: LoadedModel) -> list[Part]:
        assert loaded.part is not None, "rank 0 has loaded a part"
        return parts_of(loaded.part.whole, self.shape)

    @property
    def share_memory(self) -> bool:
        """Whether rank 0 reaches the others' KV."""
        return isinstance(self.links, SharedLinks)

    def open(self, loaded: LoadedModel, wanted: Wanted) -> PartedKv | DistantKv:
        """Makes the KV pools of all ranks; afterwards steps can be computed.

        Raises ModelError, SettingsError.
        """
        parts, dtype, kv_dtype = self._parts(loaded), loaded.dtype, wanted.kv_dtype
        whole, config = parts[0].whole, parts[0].config
        kv: PartedKv | DistantKv
        if isinstance(self.links, SharedLinks):
            pools = self._shared_pools(self.links, parts, dtype, wanted)
            backend = attention_over(pools[0], config)
            kv = PartedKv(list(zip(parts, pools, strict=True)), whole, dtype, kv_dtype)
        else:
            # before the others are told, who would meet the same refusal
            machine = make_attention(loaded.model, config, dtype, wanted, loaded.device)
            self.links.command(commands.pack_open(commands.Open(wanted)))
            backend = machine.backend
            kv = DistantKv(machine.pool, whole, dtype, kv_dtype, self.links.command)
        split = Split(parts, self.links.group)
        executor = Executor(loaded.model, backend, loaded.device, split=split)
        self._stage = Stage(executor, parts[0], vocab_runs(parts), self.links)
        self._vocab = whole.vocab_size
        for rank in range(1, self.shape.ranks):
            self._answer_of(rank, LOAD_S_MAX)
        if self._watch is not None:
            self._watch.note_serving()
        return kv

    @staticmethod
    def _shared_pools(
        links: SharedLinks,
        parts: Sequence[Part],
        dtype: torch.dtype,
        wanted: Wanted,
    ) -> list[KvPool]:
        """Everybody's pool, in memory that everybody has."""
        blocks, kv_dtype = wanted.blocks, wanted.kv_dtype
        sizes = [(blocks + 1) * KvPool.block_bytes(part.config, dtype, kv_dtype) for part in parts]
        starts = [links.memory.grow(size) for size in sizes]
        links.command(commands.pack_open(commands.Open(wanted, tuple(starts))))
        return [
            KvPool(part.config, blocks, dtype, kv_dtype, memory=links.memory.map(start, size))
            for part, start, size in zip(parts, starts, sizes, strict=True)
        ]

    # steps

    @property
    def depth(self) -> int:
        return self.shape.pipeline

    @property
    def choosing_vocab(self) -> int:
        return self._vocab

    draws = False

    def submit(self, inputs: StepInputs) -> None:
        """Tells everybody of the step and takes rank 0's turn. Raises RankError."""
        assert self._stage is not None, "steps come after `open`"
        assert len(self._under_way) < self.depth, "collect first"
        try:
            # the last stage is not to wait for this thread, which may wait for it below
            while sum(self._unheard_bytes()) > ANSWER_RING_BYTES // 2:
                self._hear(next(step for step in self._under_way if not step.heard))
            self.links.command(commands.pack_step(inputs.pack()))
            step = _Step(_answer_bytes(inputs, self._vocab))
            self._under_way.append(step)
            verdict = self._stage.run(inputs)
            if self.shape.pipeline == 1:
                step.verdict, step.heard = verdict, True
        except Exception as error:
            raise RankError(f"a step failed: {type(error).__name__}: {error}") from error

    def _unheard_bytes(self) -> list[int]:
        return [step.answer_bytes for step in self._under_way if not step.heard]

    def _hear(self, step: _Step) -> None:
        """What the last stage says of `step`, the oldest that has not been heard of."""
        last = self.shape.stage_ranks(self.shape.pipeline - 1).start
        step.verdict = commands.unpack_verdict(self._answer_of(last, STEP_S_MAX))
        step.heard = True

    def collect(self) -> Verdict | None:
        """The oldest step's tokens; None where no row was wanted. Raises RankError."""
        step = self._under_way.popleft()
        try:
            if not step.heard:
                self._hear(step)
        except Exception as error:
            raise RankError(f"a step failed: {type(error).__name__}: {error}") from error
        assert step.verdict is not None, "the last stage says something of every step"
        return step.verdict if len(step.verdict.tokens) else None

    def close(self) -> None:
        """Ends the other ranks."""
        if self._watch is not None:
            self._watch.stop()
        self._pulse.stop()
        with contextlib.suppress(Exception):  # they may be gone: the end is the same
            self.links.command(commands.pack(commands.Kind.END))
        for child in self._children:
            try:
                child.wait(END_S)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()


def _start(memory: SharedMemory, rank: int, env: Mapping[str, str]) -> subprocess.Popen[bytes]:
    argv = [sys.executable, "-m", "headrace_worker.parallel.rank", str(memory.fd), str(rank)]
    return subprocess.Popen(
        argv,
        env={**os.environ, **env},
        stdin=subprocess.DEVNULL,
        pass_fds=(memory.fd,),
        preexec_fn=die_with_parent(),
    )
