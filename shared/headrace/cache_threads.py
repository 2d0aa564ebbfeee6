"""Copying and checking a batch of entries, beside the event loop where it takes long.

Invariant: nothing is left running when the wait ends, even where it is cancelled: a thread may be
writing to a place that is given back next.
Rejected: two threads for a batch. They take turns at Python's lock, entry by entry, and each turn
waits for the other to wake up: together they were slower than one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import TypeVar

INLINE_BYTES_MAX = 1024 * 1024
"""What is checked or copied in the event loop: a tenth of a millisecond; more is for threads."""

T = TypeVar("T")


async def in_thread(work: Callable[[int, int], list[T]], sizes: Sequence[int]) -> list[T]:
    """`work(first, last)` on a batch of entries of `sizes`, in a thread if they are large."""
    if sum(sizes) <= INLINE_BYTES_MAX:
        return work(0, len(sizes))
    task = asyncio.ensure_future(asyncio.to_thread(work, 0, len(sizes)))
    try:
        return await asyncio.shield(task)
    finally:
        if not task.done():
            await asyncio.wait({task})
