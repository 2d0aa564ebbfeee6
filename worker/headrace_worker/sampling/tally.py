"""How often each token has come out: ids and counts as arrays, kept up to date token by token.

Invariant: each id stands once. A draft is counted and taken back within one call, so what a
rejected draft said never stays. Rejected: counts of the whole vocabulary for each job, and counting
anew at each step, which grow with the vocabulary or with the text where a step adds one token.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from headrace_worker.sampling.ranking import Indices

_ROOM = 64


class Tally:
    """Counts of an output's tokens; `known` tokens, those of a prompt, count 0 at first."""

    __slots__ = ("_counts", "_ids", "_places", "_size")

    def __init__(self, known: Sequence[int] = ()) -> None:
        ids = np.unique(np.asarray(known, dtype=np.int64))
        self._size = len(ids)
        self._ids = np.concatenate([ids, np.empty(_ROOM, np.int64)])
        self._counts = np.zeros(len(self._ids), np.float64)
        self._places = {token: place for place, token in enumerate(ids.tolist())}

    def add(self, tokens: Iterable[int]) -> None:
        for token in tokens:
            place = self._places.setdefault(token, self._size)
            if place == self._size:
                self._append(token)
            self._counts[place] += 1

    def with_draft(self, draft: Sequence[int]) -> tuple[Indices, NDArray[np.float64]]:
        """(token ids [n], their counts [n]), `draft` included; copies."""
        before = self._size
        self.add(draft)
        ids, counts = self._ids[: self._size].copy(), self._counts[: self._size].copy()
        for token in draft:
            self._counts[self._places[token]] -= 1
        for token in self._ids[before : self._size].tolist():
            del self._places[token]
        self._size = before
        return ids, counts

    def _append(self, token: int) -> None:
        if self._size == len(self._ids):
            self._ids = np.concatenate([self._ids, np.empty_like(self._ids)])
            self._counts = np.concatenate([self._counts, np.zeros_like(self._counts)])
        self._ids[self._size] = token
        self._size += 1
