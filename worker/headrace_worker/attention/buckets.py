"""Batch sizes that decode graphs are recorded for, and filling a step up to one of them.

Invariant: a step of n sequences runs in the smallest bucket that holds it; rows that pad it read
one token of a page that belongs to nobody, and write there. Steps beyond the largest bucket run
without a graph. Buckets follow those of vLLM and SGLang: 1, 2, 4, then every 8, so that at most a
third of the rows above 16 are padding; larger steps of 16 from 64 on, as padding weighs less there.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

BUCKET_MAX = 512


def buckets_up_to(running_max: int) -> tuple[int, ...]:
    """The sizes for an engine that computes `running_max` sequences at a time."""
    most = min(running_max, BUCKET_MAX)
    sizes = [*(1, 2, 4), *range(8, 64, 8), *range(64, BUCKET_MAX + 1, 16)]
    below = [size for size in sizes if size < most]
    return (*below, most)


def bucket_for(count: int, buckets: Sequence[int]) -> int | None:
    """The smallest bucket for `count` sequences; None where all are too small."""
    index = bisect_left(buckets, count)
    return buckets[index] if index < len(buckets) else None


@dataclass(frozen=True, slots=True)
class Filled:
    """A step of a bucket's size. `tokens`, `positions`, `slots`, `lengths` [bucket]; `tables`
    [bucket, width]; `starts` [bucket + 1]: sums of lengths."""

    tokens: NDArray[np.int64]
    positions: NDArray[np.int64]
    slots: NDArray[np.int64]
    lengths: NDArray[np.int32]
    tables: NDArray[np.int32]
    starts: NDArray[np.int32]


def fill(
    bucket: int,
    tokens: Sequence[int] | NDArray[np.int64],
    positions: Sequence[int] | NDArray[np.int64],
    slots: Sequence[int] | NDArray[np.int64],
    lengths: Sequence[int],
    tables: NDArray[np.int32],
    *,
    padding_page: int,
    page_tokens: int,
) -> Filled:
    """n sequences of one row each, filled up to `bucket`; `tables` int32 [n, width].

    All padding rows write the same slot of `padding_page`: what stands there does not matter.
    """
    count = len(lengths)
    assert count <= bucket, "a step fits its bucket"

    def wide(numbers: Sequence[int] | NDArray[np.int64], rest: int) -> NDArray[np.int64]:
        filled = np.full(bucket, rest, np.int64)
        filled[:count] = numbers
        return filled

    pages = np.full((bucket, tables.shape[1]), padding_page, np.int32)
    pages[:count] = tables
    held = wide(np.asarray(lengths, np.int64), 1)
    return Filled(
        wide(tokens, 0),
        wide(positions, 0),
        wide(slots, padding_page * page_tokens),
        held.astype(np.int32),
        pages,
        np.concatenate(([0], np.cumsum(held))).astype(np.int32),
    )
