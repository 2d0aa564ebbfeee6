"""Copying and checking a batch of entries, beside the event loop where it takes long.

Invariant: nothing is left running when the wait ends, even where it is cancelled: a thread may be
writing to a place that is given back next.
A batch is shared out entry by entry among the process's copiers: one core alone does not use up the
memory's bandwidth. There are only as many as that takes, as more of them push each other's entries
out of the CPU's caches between copy and check.
Rejected: the event loop's own executor. It starts a thread for each batch in flight, and each
hand-over takes three futures and a copy of the context.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from queue import SimpleQueue
from typing import Any, Protocol, TypeVar

from headrace.checksum import checksum
from headrace.copying import Copies, copy_checked
from headrace.frames import Buffer

COPIERS = 2
"""Threads in a process; two saturate what a few cores share of the memory."""

COPIERS_ASIDE = COPIERS if (os.cpu_count() or 1) > COPIERS else 1
"""That copy while others have work: on two cores, one of them is for the service."""

INLINE_BYTES_MAX = 1024 * 1024
"""What is checked or copied in the event loop: a fifth of a millisecond; more is for threads."""

TURN_BYTES_MAX = 2 * 1024 * 1024
"""Copied in the event loop by turns, which last a quarter of a millisecond then. On two cores a
thread would be woken where the service computes, and wait for that."""

T = TypeVar("T")


class _Share(Protocol):
    """Work that several threads do together, each taking what nobody else has begun."""

    def run(self) -> None: ...

    def stop(self) -> None:
        """Whoever runs begins nothing more."""
        ...


async def in_threads(
    work: Callable[[int], T], sizes: Sequence[int], turn: asyncio.Lock | None = None
) -> list[T]:
    """`work(number)` for each entry of `sizes`, by the copiers if they are large.

    `turn` is `copy_all`'s: the calls are made in the event loop then, where that has copies made.
    Raises what one of the calls raises; the others may not have been made then.
    """
    if sum(sizes) <= INLINE_BYTES_MAX:
        return [work(number) for number in range(len(sizes))]
    if turn is not None and _in_loop(sizes):
        results: list[T] = []
        await _by_turns(lambda *part: results.extend(map(work, range(*part))), sizes, turn)
        return results
    calls = _Calls(work, len(sizes))
    await _together(calls, len(sizes))
    return calls.results


async def copy_all(
    targets: Sequence[memoryview | None],
    sources: Sequence[Buffer],
    turn: asyncio.Lock | None = None,
) -> list[int]:
    """Copy each of `sources` to its target, if it has one; the CRC-32C of each.

    `turn`: the caller's process and the service have work to do meanwhile; if it is copied in the
    event loop it is when that is had. Raises ValueError where a target has another length.
    """
    copies = Copies.of(targets, sources)
    sizes = list(map(len, sources))
    if copies is None:

        def work(number: int) -> int:
            target = targets[number]
            return (
                checksum(sources[number])
                if target is None
                else copy_checked(target, sources[number])
            )

        return await in_threads(work, sizes)
    if sum(sizes) <= INLINE_BYTES_MAX:
        copies.run()
    elif turn is not None and _in_loop(sizes):
        await _by_turns(copies.run_part, sizes, turn)
    else:
        await _together(copies, len(sizes), aside=turn is not None)
    return copies.crcs


def _in_loop(sizes: Sequence[int]) -> bool:
    """Whether that is copied in the event loop, where others have work to do meanwhile."""
    return COPIERS_ASIDE == 1 and max(sizes) <= TURN_BYTES_MAX


async def _by_turns(
    run_part: Callable[[int, int], None], sizes: Sequence[int], turn: asyncio.Lock
) -> None:
    """Copy in the event loop, which does something else every TURN_BYTES_MAX.

    `run_part(first, last)` copies the entries from `first` up to `last`; `turn` is had meanwhile.
    """
    async with turn:
        first, size_bytes = 0, 0
        for number, size in enumerate(sizes):
            if size_bytes + size > TURN_BYTES_MAX:
                run_part(first, number)
                first, size_bytes = number, 0
                await asyncio.sleep(0)
            size_bytes += size
        run_part(first, len(sizes))


async def _together(share: _Share, count: int, *, aside: bool = False) -> None:
    """Have the copiers do `share`, of `count` parts. Raises what one of them raised."""
    batch = _Batch(share)
    _copiers().begin(batch, min(COPIERS_ASIDE if aside else COPIERS, count))
    try:
        await asyncio.shield(batch.done)
    finally:
        if not batch.done.done():
            batch.stop()
            await asyncio.wait({batch.done})
    if batch.errors:
        raise batch.errors[0]


class _Calls:
    """A function called for number after number, and what came out."""

    def __init__(self, work: Callable[[int], Any], count: int) -> None:
        self.results: list[Any] = [None] * count
        self._work = work
        # taking its next number is one step under Python's lock
        self._numbers: Iterator[int] = iter(range(count))

    def run(self) -> None:
        try:
            for number in self._numbers:
                self.results[number] = self._work(number)
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        for _ in self._numbers:
            pass


class _Batch:
    """A share of work while threads do it; `done` when none is at it any more."""

    def __init__(self, share: _Share) -> None:
        self._loop = asyncio.get_running_loop()
        self.done = self._loop.create_future()
        self.errors: list[BaseException] = []
        self._share = share
        self._lock = threading.Lock()
        self._running = 0
        self._over = False

    def run(self) -> None:
        """Called by each thread that helps. The last to find nothing more to do tells the loop."""
        with self._lock:
            if self._over:
                return
            self._running += 1
        try:
            self._share.run()
        except BaseException as error:  # handed on: whoever waits is told
            self.errors.append(error)
        with self._lock:
            self._running -= 1
            last = self._running == 0
            self._over = last
        if last:
            self._loop.call_soon_threadsafe(self._finish)

    def stop(self) -> None:
        """Begin nothing more; `done` once nothing is being worked on."""
        self._share.stop()
        with self._lock:
            idle = self._running == 0
            self._over = self._over or idle
        if idle:
            self._finish()

    def _finish(self) -> None:
        if not self.done.done():
            self.done.set_result(None)


class _Copiers:
    """The threads. Daemons: what waits for them holds the process up, they themselves do not."""

    def __init__(self) -> None:
        self._batches: SimpleQueue[_Batch] = SimpleQueue()
        for number in range(COPIERS):
            name = f"headrace-copier-{number}"
            threading.Thread(target=self._work_for_ever, name=name, daemon=True).start()

    def begin(self, batch: _Batch, helpers: int) -> None:
        for _ in range(helpers):
            self._batches.put(batch)

    def _work_for_ever(self) -> None:
        while True:
            self._batches.get().run()


_started: list[_Copiers] = []


def _copiers() -> _Copiers:
    if not _started:
        _started.append(_Copiers())
    return _started[0]


# a forked process has none of its parent's threads
os.register_at_fork(after_in_child=_started.clear)
