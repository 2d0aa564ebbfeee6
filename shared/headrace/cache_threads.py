"""Copying and checking a batch of entries, beside the event loop where it takes long.

Invariant: nothing is left running when the wait ends, even where it is cancelled: a thread may be
writing to a place that is given back next.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import TypeVar

INLINE_BYTES_MAX = 1024 * 1024
"""What is checked or copied in the event loop: a tenth of a millisecond; more is for threads."""

THREADS = 2
"""For one batch: while one copies, which holds Python's lock, another computes a checksum."""

T = TypeVar("T")


async def in_threads(work: Callable[[int, int], list[T]], sizes: Sequence[int]) -> list[T]:
    """`work(first, last)` on parts of a batch of entries of `sizes`; the results in order."""
    if sum(sizes) <= INLINE_BYTES_MAX:
        return work(0, len(sizes))
    each = -(-len(sizes) // THREADS)
    tasks = [
        asyncio.ensure_future(asyncio.to_thread(work, at, min(at + each, len(sizes))))
        for at in range(0, len(sizes), each)
    ]
    try:
        parts = await asyncio.gather(*(asyncio.shield(task) for task in tasks))
    finally:
        if not all(task.done() for task in tasks):
            await asyncio.wait(tasks)
    return [result for part in parts for result in part]
