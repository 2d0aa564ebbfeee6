"""What each wanted row of a step needs of its logits, where the vocabulary lies on several ranks.

Invariant: a wish says all that choosing the row's token depends on besides its logits, or that the
whole row is wanted. It travels with the step, so that every rank knows at once what to hand in.

A row is wanted whole where its job changes logits (grammar, bias, bans, penalties), asks for log
probabilities, scores its prompt, or filters by typical_p alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from headrace.types import Sampling
from headrace_worker.sampling.draw import FAN
from headrace_worker.sampling.sampler import Row, numbers_of
from headrace_worker.sampling.uniform import NUMBERS

CANDIDATES = 256
"""How many of the highest logits a rank hands in for a row that filters by probability."""


class Need(IntEnum):
    WHOLE = 0
    PEAK = 1
    """The first of the highest logits: greedy."""
    TOP = 2
    """The highest logits, and how much weight there is besides: top_k, min_p, top_p."""
    SUMS = 3
    """Sums of weights, by groups of the tree that draws: temperature without filters."""


@dataclass(frozen=True, slots=True)
class Wishes:
    """One for each of the M wanted rows.

    `needs` uint8 [M]. Of the D rows that draw (TOP and SUMS), in their order, `options` float64
    [D, 5]: temperature, top_k, top_p, min_p, typical_p; and `numbers` float64 [D, NUMBERS]: what
    they draw by.
    """

    needs: NDArray[np.uint8]
    options: NDArray[np.float64]
    numbers: NDArray[np.float64]

    def pack(self) -> tuple[bytes, bytes]:
        return self.needs.tobytes(), np.hstack((self.options, self.numbers)).tobytes()

    def sampling(self, drawn: int) -> Sampling:
        """The options of the drawn row of this number."""
        temperature, top_k, top_p, min_p, typical_p = self.options[drawn].tolist()
        return Sampling(1, temperature, top_p, round(top_k), min_p=min_p, typical_p=typical_p)

    @classmethod
    def unpack(cls, packed: Sequence[bytes]) -> Wishes:
        """The wishes that `pack` was called on. Raises ValueError for what it did not make."""
        needs, drawn = packed
        found = np.frombuffer(needs, np.uint8)
        table = np.frombuffer(drawn, np.float64).reshape(-1, _OPTIONS + NUMBERS)
        if len(table) != np.count_nonzero(found >= Need.TOP) or (found > Need.SUMS).any():
            raise ValueError(f"{len(found)} rows and {len(table)} options are no wishes")
        return cls(found, table[:, :_OPTIONS], table[:, _OPTIONS:])


_OPTIONS = 5


def wishes_of(rows: Sequence[Row | None], vocab_size: int) -> Wishes:
    """`rows`: for each wanted row whose token to choose; None where it is scored."""
    needs = np.array([Need.WHOLE if row is None else need_of(row, vocab_size) for row in rows])
    drawn = [row for row, need in zip(rows, needs, strict=True) if row and need >= Need.TOP]
    options = [
        (s.temperature, s.top_k, s.top_p, s.min_p, s.typical_p)
        for s in (row.choosing.sampling for row in drawn)
    ]
    numbers = [made for made in numbers_of(drawn) if made is not None]
    return Wishes(
        needs.astype(np.uint8),
        np.array(options, np.float64).reshape(-1, _OPTIONS),
        np.array(numbers, np.float64).reshape(-1, NUMBERS),
    )


def need_of(row: Row, vocab_size: int) -> Need:
    """What choosing the row's token takes."""
    choosing = row.choosing
    s = choosing.sampling
    if row.edits or choosing.wants_logprobs or vocab_size <= FAN:
        return Need.WHOLE
    if s.temperature <= 0:
        return Need.PEAK
    if choosing.unfiltered:
        return Need.SUMS
    if takes_few(s):
        return Need.TOP
    return Need.WHOLE if s.typical_p < 1 or 0 < s.top_k < vocab_size else Need.TOP


def takes_few(sampling: Sampling) -> bool:
    """Whether top_k leaves no more tokens than each rank hands in."""
    return 0 < sampling.top_k <= CANDIDATES
