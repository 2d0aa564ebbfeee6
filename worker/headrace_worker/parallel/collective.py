"""What the ranks of a stage do together: add up, hand in, hand out.

Invariant: all ranks leave `all_reduce` with the same bits, whoever came first: sums are taken in
the order of the ranks. From equal activations follow equal routes through experts, so that ranks
need not tell each other of them.

`SharedGroup` is for ranks of one host. Each publishes its numbers in memory that all have mapped
and counts its turn; who sees all counts at its own turn reads what it needs. Two buffers take
turns: whoever writes a buffer again has seen everybody at the turn between, so nobody reads it any
more. A sum of few bytes is one turn, at the price of everybody reading everything; a large one over
more than two ranks is two: each adds up its share, then all read the shares.
`TorchGroup` is for ranks of several hosts, and for GPUs. Numbers in a host's memory it adds up as
`SharedGroup` does, to the bit: everybody's are gathered, or a share of them, and added up in the
order of the ranks.

Rejected: gloo on one host, whose sums of a decode step's few kilobytes take 100 to 200 us where
publishing takes 10; its own sums over hosts, whose order is none that one process has, so that a
text would depend on where ranks lie; a lock or a barrier of the operating system, which is a system
call each.
The order of stores, data before count, is what x86 guarantees; elsewhere torch's groups are used.
"""

from __future__ import annotations

import contextlib
import os
import platform
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from headrace.errors import HeadraceError

LINE_BYTES = 64
"""A rank's count stands on a cache line of its own."""
SLOT_BYTES = 1 << 20
"""What a rank publishes at a time, unless told otherwise; more takes several turns."""
ONE_TURN_BYTES_MAX = 64 << 10
"""Sums up to this size over more than two ranks are one turn."""
SPINS_MAX = 2000
"""Looks at the others' counts before sleeping between looks: some 200 us."""
SLEEP_S = 50e-6
PATIENCE_S = 5.0
"""How long a rank waits for another: below a worker's lease, so that jobs move on in time."""

ORDERED_STORES = platform.machine() in ("x86_64", "AMD64")
"""Whether this processor keeps the order of stores that SharedGroup relies on."""


class PeerError(HeadraceError):
    """Another rank did not come in time, or is gone: no step can be computed any more."""


@dataclass(slots=True)
class Counts:
    """What a rank has received from others so far, and in how many turns."""

    messages: int = 0
    bytes: int = 0

    def note(self, size_bytes: int) -> None:
        self.messages += 1
        self.bytes += size_bytes


class Group(Protocol):
    """The ranks of one stage. All call the same in the same order, with tensors of equal shape."""

    rank: int
    size: int
    counts: Counts

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum over all ranks, in place where `x` is contiguous. Raises PeerError."""
        ...

    def gather(self, x: Tensor, to: int = 0) -> list[Tensor] | None:
        """Everybody's `x`, by rank, for rank `to`; None for the others. Raises PeerError."""
        ...

    def broadcast(self, x: Tensor, source: int = 0) -> Tensor:
        """`x` of rank `source`, in place where it is contiguous. Raises PeerError."""
        ...


def minimal_bytes(size: int, size_bytes: int) -> float:
    """What a rank has to receive at least for a sum of `size_bytes` over `size` ranks.

    Source: Patarasuk and Yuan, "Bandwidth optimal all-reduce algorithms for clusters of
    workstations", 2009.
    """
    return 2 * (size - 1) / size * size_bytes


class SharedGroup:
    """Ranks with common memory. Belongs to one thread of each.

    The native kernels take turns in it too, within a step: see csrc/sums.cpp, which does what
    `all_reduce` does.
    """

    def __init__(
        self,
        memory: NDArray[np.uint8],
        rank: int,
        size: int,
        *,
        patience_s: float = PATIENCE_S,
    ) -> None:
        """`memory`, zeroed at the start, is the same for all ranks: see `bytes_needed`."""
        assert ORDERED_STORES, "this processor may reorder stores"
        assert 0 <= rank < size, "no such rank"
        slot = (len(memory) // LINE_BYTES - size) // (2 * size) * LINE_BYTES
        assert slot >= LINE_BYTES, "too little memory for a group"
        self.rank, self.size, self.counts = rank, size, Counts()
        self.patience_s = patience_s
        self.slot_bytes = slot
        self.turn = 0
        """How many this rank has taken."""
        self._others = [other for other in range(size) if other != rank]
        head = size * LINE_BYTES
        self.memory = memory
        self._flags = memoryview(memory.data)[:head].cast("Q")
        slots = torch.from_numpy(memory)[head : head + 2 * size * slot].view(2, size, slot)
        self._slots = slots
        self._views: dict[torch.dtype, list[list[Tensor]]] = {}

    @staticmethod
    def bytes_needed(size: int, slot_bytes: int = SLOT_BYTES) -> int:
        """Memory for a group of `size` that publishes up to `slot_bytes` at a time."""
        lines = -(-slot_bytes // LINE_BYTES)
        return size * LINE_BYTES * (1 + 2 * lines)

    def all_reduce(self, x: Tensor) -> Tensor:
        x = x.contiguous()
        for run in self._runs(x):
            if _by_shares(run, self.size):
                self._sum_by_shares(run)
            else:
                published = self._publish(run)
                self._await()
                self.counts.note((self.size - 1) * run.nbytes)
                _sum(published, run)
        return x

    def _sum_by_shares(self, run: Tensor) -> None:
        """Two turns: my share of everybody's numbers, then everybody's share."""
        bounds = _bounds(len(run), self.size)
        mine = slice(bounds[self.rank], bounds[self.rank + 1])
        published = self._publish(run)
        self._await()
        share = run[mine]
        self.counts.note((self.size - 1) * share.nbytes)
        _sum([slot[mine] for slot in published], share)
        published = self._publish(share, len(run) // self.size + 1)  # shares differ by one
        self._await()
        self.counts.note(run.nbytes - share.nbytes)
        for other in self._others:
            part = run[bounds[other] : bounds[other + 1]]
            part.copy_(published[other][: len(part)])

    def gather(self, x: Tensor, to: int = 0) -> list[Tensor] | None:
        x = x.contiguous()
        found = [torch.empty_like(x) for _ in range(self.size)] if self.rank == to else None
        runs = [self._runs(whole) for whole in found or ()]
        for run in self._runs(x):
            published = self._publish(run)
            if found is None:
                continue
            self._await()
            self.counts.note((self.size - 1) * run.nbytes)
            for slot, target in zip(published, runs, strict=True):
                next(target).copy_(slot)
        return found

    def broadcast(self, x: Tensor, source: int = 0) -> Tensor:
        x = x.contiguous()
        for run in self._runs(x):
            if self.rank == source:
                self._publish(run)
                continue
            published = self._publish(run[:0], len(run))
            self._await([source])
            self.counts.note(run.nbytes)
            run.copy_(published[source])
        return x

    def _runs(self, x: Tensor) -> Iterator[Tensor]:
        """`x` as runs that fit a slot; views."""
        flat = x.view(-1)
        if flat.nbytes <= self.slot_bytes:
            return iter((flat,))
        step = self.slot_bytes // x.itemsize
        return (flat[start : start + step] for start in range(0, len(flat), step))

    def _publish(self, run: Tensor, count: int | None = None) -> list[Tensor]:
        """Takes the next turn with `run`; the first `count` numbers of all ranks' slots."""
        # who writes a buffer again waits until nobody reads it: all are at the turn between
        self._await()
        self.turn += 1
        views = self._views.get(run.dtype)
        if views is None:
            made = self._slots.view(run.dtype)
            views = self._views[run.dtype] = [list(half.unbind(0)) for half in made.unbind(0)]
        slots = views[self.turn & 1]
        count = len(run) if count is None else count
        if len(run):
            slots[self.rank][: len(run)].copy_(run)
        self._flags[self.rank * (LINE_BYTES // 8)] = self.turn
        return [slot[:count] for slot in slots]

    def _await(self, ranks: list[int] | None = None) -> None:
        """Until `ranks` (None: all others) have come to my turn."""
        flags, turn = self._flags, self.turn
        for other in self._others if ranks is None else ranks:
            at = other * (LINE_BYTES // 8)
            if flags[at] >= turn:
                continue
            self._wait_for(other, at, turn)

    def _wait_for(self, other: int, at: int, turn: int) -> None:
        flags, started = self._flags, 0.0
        for spin in range(SPINS_MAX):
            if flags[at] >= turn:
                return
            if spin % 16 == 15:
                os.sched_yield()  # it may be waiting for this very processor
                time.sleep(0)  # or, in a thread, for this interpreter
        started = time.monotonic()
        while flags[at] < turn:
            if time.monotonic() - started > self.patience_s:
                raise PeerError(f"rank {other} did not come within {self.patience_s:g} s")
            time.sleep(SLEEP_S)

    def check_integrity(self) -> None:
        """Nobody is more than a turn ahead of me, or I of the buffers."""
        for other in self._others:
            ahead = self._flags[other * (LINE_BYTES // 8)] - self.turn
            assert -1 <= ahead <= 1, f"rank {other} is {ahead} turns ahead"


def _by_shares(run: Tensor, size: int) -> bool:
    """Whether a sum is so large that each rank had better add up a share of it."""
    return size > 2 and run.nbytes > ONE_TURN_BYTES_MAX and len(run) >= size


def _bounds(count: int, size: int) -> list[int]:
    """Where the ranks' shares of `count` numbers begin, and the end."""
    return [count * i // size for i in range(size + 1)]


def _sum(parts: list[Tensor], out: Tensor) -> None:
    """Adds up in float32, in the order of the list, but four that are in float32 themselves two by
    two, as csrc/sums.cpp does; `out` is none of them."""
    if len(parts) == 2:
        torch.add(parts[0], parts[1], out=out)
        return
    if out.dtype is torch.float32:
        if len(parts) == 4:
            torch.add(parts[0] + parts[1], parts[2] + parts[3], out=out)
            return
        torch.add(parts[0], parts[1], out=out)
        for part in parts[2:]:
            out.add_(part)
        return
    total = parts[0].float()
    for part in parts[1:]:
        total.add_(part)
    out.copy_(total)


class TorchGroup:
    """Ranks in a torch.distributed group (gloo or NCCL), over any network.

    NCCL's all-reduce passes each share's finished sum on, so that on GPUs too all get the same
    bits, in an order of its own.
    """

    def __init__(self, group: dist.ProcessGroup, host: dist.ProcessGroup | None = None) -> None:
        """`host`: the same ranks, for tensors in the host's memory, where `group` is NCCL's."""
        self._group, self._host = group, host or group
        self.rank, self.size, self.counts = group.rank(), group.size(), Counts()

    def _for(self, x: Tensor) -> dist.ProcessGroup:
        return self._host if x.device.type == "cpu" else self._group

    def all_reduce(self, x: Tensor) -> Tensor:
        x = x.contiguous()
        with _told_as_peer_error():
            if x.device.type != "cpu":
                dist.all_reduce(x, group=self._group)
                self.counts.note(int(minimal_bytes(self.size, x.nbytes)))
            elif _by_shares(run := x.view(-1), self.size):
                self._sum_by_shares(run)
            else:
                _sum(self._gathered(run), run)
        return x

    def _gathered(self, run: Tensor) -> list[Tensor]:
        """Everybody's numbers, by rank, on every rank."""
        found = list(run.new_empty(self.size, len(run)).unbind(0))
        dist.all_gather(found, run, group=self._host)
        self.counts.note((self.size - 1) * run.nbytes)
        return found

    def _sum_by_shares(self, run: Tensor) -> None:
        """Two turns: my share of everybody's numbers, then everybody's share."""
        bounds = _bounds(len(run), self.size)
        lengths = [bounds[i + 1] - bounds[i] for i in range(self.size)]
        mine = lengths[self.rank]
        parts = run.new_empty(self.size, mine)
        dist.all_to_all_single(parts.view(-1), run, [mine] * self.size, lengths, group=self._host)
        self.counts.note((self.size - 1) * mine * run.itemsize)
        share = run.new_zeros(max(lengths))  # of equal length on all ranks
        _sum(list(parts.unbind(0)), share[:mine])
        for other, part in enumerate(self._gathered(share)):
            run[bounds[other] : bounds[other + 1]] = part[: lengths[other]]

    def gather(self, x: Tensor, to: int = 0) -> list[Tensor] | None:
        x = x.contiguous()
        found = [torch.empty_like(x) for _ in range(self.size)] if self.rank == to else None
        with _told_as_peer_error():
            dist.gather(x, found, group=self._for(x), group_dst=to)
        if found is not None:
            self.counts.note((self.size - 1) * x.nbytes)
        return found

    def broadcast(self, x: Tensor, source: int = 0) -> Tensor:
        x = x.contiguous()
        with _told_as_peer_error():
            dist.broadcast(x, group=self._for(x), group_src=source)
        if self.rank != source:
            self.counts.note(x.nbytes)
        return x


@contextlib.contextmanager
def _told_as_peer_error() -> Iterator[None]:
    """What torch raises when a peer is gone or late, in our words."""
    try:
        yield
    except RuntimeError as error:  # torch's DistError is one too
        raise PeerError(f"a rank is gone or late: {error}") from error
