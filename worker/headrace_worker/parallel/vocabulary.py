"""Choosing tokens where each rank has the logits of a run of the vocabulary.

Invariant: the token is the one that `sampling` chooses from the whole row, always. What ranks hand
in either settles that beyond any doubt that rounding leaves, or the whole row is fetched. So a job
draws the same text whatever the number of ranks, and its promises are those of one process.

A greedy row takes a logit and a token id from each rank. A row that filters takes its highest
logits (as many as top_k, or CANDIDATES) and the weight of all its logits. A row that draws without
filters takes sums over groups of tokens, the first level of the tree by which `draw` goes (a 32nd
of the vocabulary), and then the logits of the one group that was drawn. Weights are relative to a
rank's own highest logit; who adds them up knows the highest of all.

`MARGIN` is more than sums taken so can be from those of one process: an addition of float32 loses
6e-8 of its sum, some dozens follow each other, exponents of a few tens lose as much, and weights
are rounded to GRID beside another best one.

Rejected: gathering all logits (a step of 64 rows and 128,000 tokens is 32 MB); drawing from
the gathered sums whatever they round to, which makes the text depend on the number of ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from headrace.types import Sampling
from headrace_worker.native.abi import Library
from headrace_worker.native.draws import weigh_by
from headrace_worker.parallel.collective import Group
from headrace_worker.parallel.wishes import CANDIDATES, Need, Wishes, takes_few
from headrace_worker.sampling.draw import FAN, draw, grouped, place
from headrace_worker.sampling.filters import keep
from headrace_worker.sampling.ranking import Floats, Indices, leading
from headrace_worker.sampling.uniform import NUMBERS
from headrace_worker.sampling.weights import TEMPERATURE_MIN, total, weigh

MARGIN = 2e-5
"""Of a sum of weights: an edge that is nearer than that to what is looked for is fetched."""

OPEN, NOTHING = -1, -2
"""In `Verdict.tokens`: the whole row is there instead; the row has no finite maximum."""

_SETTLED, _WHOLE = -2, -1
"""Requests; all others are groups of the tree."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What came of a step's M wanted rows.

    `tokens` int64 [M]: token ids, OPEN or NOTHING. `whole`: the logits of the OPEN rows, in their
    order, float32 [W, vocab].
    """

    tokens: NDArray[np.int64]
    whole: Tensor


class Vocabulary:
    """The runs of a vocabulary, and one rank's side of choosing."""

    def __init__(self, runs: Sequence[range], group: Group, library: Library | None = None) -> None:
        """`runs`: of each rank, in order. `library`: kernels that weigh, if there are some."""
        self._library = library
        self._runs, self._group = runs, group
        self._run, self._size = runs[group.rank], runs[-1].stop
        self._widest = max(map(len, runs))
        self._fold = -(-self._size // FAN)  # groups of the first level
        assert self._size < 1 << 24, "token ids are handed in as float32"

    def choose(self, logits: Tensor, wishes: Wishes) -> Verdict | None:
        """From this rank's `logits`, float32 [M, run]; None on all ranks but the first.

        All ranks of the group call it, with the same wishes.
        """
        values: Floats = np.ascontiguousarray(logits.numpy(force=True))
        with np.errstate(over="ignore", under="ignore", invalid="ignore"):
            handed = self._group.gather(torch.from_numpy(self.hand_in(values, wishes)))
            if handed is None:
                if len(wishes.options):
                    self._answer(values, wishes)
                return None
            reader = _Reader(self, [part.numpy() for part in handed], wishes)
            tokens, requests = reader.decide()
            rows = np.flatnonzero(wishes.needs == Need.WHOLE).tolist()
            whole = {row: reader.whole(row) for row in rows}
            if len(requests):
                self._finish(values, wishes, requests, reader.best, tokens, whole)
        rows = np.flatnonzero(tokens == OPEN).tolist()
        found = np.stack([whole[row] for row in rows]) if rows else np.empty((0, self._size))
        return Verdict(tokens, torch.from_numpy(found.astype(np.float32, copy=False)))

    def _finish(
        self,
        values: Floats,
        wishes: Wishes,
        requests: Indices,
        best: dict[int, np.float32],
        tokens: NDArray[np.int64],
        whole: dict[int, Floats],
    ) -> None:
        """Fetches what is needed besides, and sets `tokens` and `whole` by it."""
        fetched = self._ask(values, wishes, requests)
        drawn = np.flatnonzero(wishes.needs >= Need.TOP).tolist()
        for number, (row, request) in enumerate(zip(drawn, requests.tolist(), strict=True)):
            if request == _WHOLE:
                whole[row] = fetched[number]
            elif request != _SETTLED:
                tokens[row] = self._of_group(request, fetched[number], best[row], wishes, number)

    def sizes(self, wishes: Wishes) -> list[int]:
        """How many numbers each row takes of what a rank hands in."""
        found, drawn = [], 0
        for need in wishes.needs.tolist():
            if need == Need.WHOLE:
                found.append(self._widest)
            elif need == Need.PEAK:
                found.append(2)
            else:
                counts = (3 + 2 * _candidates(wishes.sampling(drawn)), 1 + self._fold)
                found.append(counts[need == Need.SUMS])
                drawn += 1
        return found

    def hand_in(self, values: Floats, wishes: Wishes) -> Floats:
        """What the first rank needs of this rank's logits, [sum of `sizes`]."""
        tops = values.argmax(axis=1)
        peaks = values[np.arange(len(values)), tops]
        parts, drawn = [], 0
        for row, need in enumerate(wishes.needs.tolist()):
            peak = peaks[row]
            if need == Need.WHOLE:
                parts.append(_padded(values[row], self._widest))
            elif need == Need.PEAK:
                parts.append(np.array([peak, tops[row] + self._run.start], np.float32))
            else:
                sampling = wishes.sampling(drawn)
                if need == Need.TOP:
                    parts += self._top(values[row], peak, sampling)
                else:
                    parts += self._sums(values[row], peak, sampling)
                drawn += 1
        return np.concatenate(parts) if parts else np.empty(0, np.float32)

    def _top(self, row: Floats, peak: np.float32, sampling: Sampling) -> list[Floats]:
        """Peak, weight, whether there is more; the highest logits and their token ids."""
        count = _candidates(sampling)
        if not np.isfinite(peak):  # -inf: nothing of weight is here; else nothing is drawn at all
            return [np.array([peak, 0, 0], np.float32), np.full(2 * count, -np.inf, np.float32)]
        weights = weigh_by(self._library, row, peak, sampling.temperature, np.empty_like(row))
        mass = total(weights)
        ids = leading(row, count)
        more = len(ids) == count < len(row)
        return [
            np.array([peak, mass, more], np.float32),
            _padded(row[ids], count),
            _padded((ids + self._run.start).astype(np.float32), count),
        ]

    def _sums(self, row: Floats, peak: np.float32, sampling: Sampling) -> list[Floats]:
        """Peak, and this rank's share of the sums of the first level's groups."""
        head = np.array([peak], np.float32)
        if not np.isfinite(peak):
            return [head, np.zeros(self._fold, np.float32)]
        before = self._run.start % self._fold
        folds = -(-(before + len(row)) // self._fold)
        room = np.zeros(folds * self._fold, np.float32)
        mine = room[before : before + len(row)]
        weigh_by(self._library, row, peak, sampling.temperature, mine)
        return [head, room.reshape(folds, -1).sum(axis=0)]

    def _answer(self, values: Floats, wishes: Wishes) -> None:
        """Hands in what the first rank could not settle without."""
        requests = torch.empty(len(wishes.options), dtype=torch.int64)
        asked = self._group.broadcast(requests).numpy()
        if (asked != _SETTLED).any():
            self._group.gather(torch.from_numpy(self._fetch(values, wishes, asked)))

    def _ask(self, values: Floats, wishes: Wishes, requests: Indices) -> list[Floats]:
        """For each drawn row what `requests` say of it, of all ranks together."""
        self._group.broadcast(torch.from_numpy(requests))
        if not (requests != _SETTLED).any():
            return []
        mine = torch.from_numpy(self._fetch(values, wishes, requests))
        parts = self._group.gather(mine)
        assert parts is not None, "only the first rank asks"
        arrays, at, found = [part.numpy() for part in parts], 0, []
        for request in requests.tolist():
            size = self._answer_size(request)
            pieces = [array[at : at + size] for array in arrays]
            found.append(self._joined(pieces) if request == _WHOLE else np.max(pieces, axis=0))
            at += size
        return found

    def _answer_size(self, request: int) -> int:
        return {_SETTLED: 0, _WHOLE: self._widest}.get(request, FAN)

    def _fetch(self, values: Floats, wishes: Wishes, requests: Indices) -> Floats:
        parts = [np.empty(0, np.float32)]
        rows = np.flatnonzero(wishes.needs >= Need.TOP)
        for row, request in zip(rows, requests.tolist(), strict=True):
            if request == _WHOLE:
                parts.append(_padded(values[row], self._widest))
            elif request != _SETTLED:
                places = request + self._fold * np.arange(FAN) - self._run.start
                mine = (places >= 0) & (places < len(self._run))
                found = np.full(FAN, -np.inf, np.float32)
                found[mine] = values[row][places[mine]]
                parts.append(found)
        return np.concatenate(parts)

    def _of_group(
        self, index: int, logits: Floats, best: np.float32, wishes: Wishes, drawn: int
    ) -> int:
        """The token that is drawn from a group of the first level: exactly as `draw` does it."""
        inside = logits[: len(range(index, self._size, self._fold))]
        weights = weigh(inside, best, wishes.sampling(drawn).temperature, None)
        number = wishes.numbers[drawn][len(_levels(np.empty(self._fold)))]
        return index + self._fold * place(weights, float(number))

    def _joined(self, pieces: Sequence[Floats]) -> Floats:
        """A whole row of its ranks' padded runs."""
        return np.concatenate([p[: len(run)] for p, run in zip(pieces, self._runs, strict=True)])


class _Reader:
    """What the first rank makes of what all handed in."""

    def __init__(self, vocabulary: Vocabulary, parts: Sequence[Floats], wishes: Wishes) -> None:
        self._vocabulary, self._parts, self._wishes = vocabulary, parts, wishes
        sizes = vocabulary.sizes(wishes)
        self._starts = np.concatenate(([0], np.cumsum(sizes))).astype(np.int64).tolist()
        self.best: dict[int, np.float32] = {}
        """Highest logits of the rows that draw."""

    def _of(self, row: int) -> list[Floats]:
        return [part[self._starts[row] : self._starts[row + 1]] for part in self._parts]

    def whole(self, row: int) -> Floats:
        return self._vocabulary._joined(self._of(row))

    def decide(self) -> tuple[NDArray[np.int64], Indices]:
        """Tokens [M], and for each row that draws what else is needed."""
        wishes = self._wishes
        tokens = np.full(len(wishes.needs), OPEN, np.int64)
        requests = np.full(len(wishes.options), _SETTLED, np.int64)
        drawn = 0
        for row, need in enumerate(wishes.needs.tolist()):
            if need == Need.WHOLE:
                continue
            found = self._of(row)
            peaks = np.array([part[0] for part in found])
            which = int(peaks.argmax())  # the first of equal ones has the lower ids
            best = self.best[row] = peaks[which]
            if not np.isfinite(best):
                tokens[row] = NOTHING
            elif need == Need.PEAK:
                tokens[row] = int(found[which][1])
            elif need == Need.TOP:
                token = _token_of_top(
                    found, best, wishes.sampling(drawn), wishes.numbers[drawn], self._size
                )
                tokens[row], requests[drawn] = (
                    (OPEN, _WHOLE) if token is None else (token, _SETTLED)
                )
            else:
                index = _group_of_sums(found, best, wishes.sampling(drawn), wishes.numbers[drawn])
                requests[drawn] = _WHOLE if index is None else index
            drawn += need >= Need.TOP
        return tokens, requests

    @property
    def _size(self) -> int:
        return self._vocabulary._size


def _candidates(sampling: Sampling) -> int:
    return sampling.top_k if takes_few(sampling) else CANDIDATES


def _padded(values: Floats, size: int) -> Floats:
    room = np.full(size, -np.inf, np.float32)
    room[: len(values)] = values
    return room


def _total(
    peaks: Sequence[float], masses: Sequence[float], best: float, temperature: float
) -> float:
    """The weight of all logits, relative to `best`."""
    scale = max(temperature, TEMPERATURE_MIN)
    shares = [m * np.exp((p - best) / scale) for p, m in zip(peaks, masses, strict=True) if m]
    return float(sum(shares))


def _token_of_top(
    found: Sequence[Floats],
    best: np.float32,
    sampling: Sampling,
    numbers: NDArray[np.float64],
    size: int,
) -> int | None:
    """The token of a row that filters; None where what was handed in does not settle it."""
    count = _candidates(sampling)
    values = np.concatenate([part[3 : 3 + count] for part in found])
    ids = np.concatenate([part[3 + count :] for part in found])
    owners = np.repeat(np.arange(len(found)), count)
    there = values > -np.inf
    order = np.lexsort((ids[there], -values[there]))
    values, owners = values[there][order], owners[there][order]
    ids = ids[there][order].astype(np.int64)
    certain = len(values)
    for rank, part in enumerate(found):
        if part[2]:  # what it did not hand in comes after its last one
            certain = min(certain, int(np.flatnonzero(owners == rank)[-1]) + 1)
    complete = not any(part[2] for part in found)
    kept = _kept(values[:certain], found, best, sampling, complete)
    if kept is None:
        return None
    row = np.full(size, -np.inf, np.float32)
    row[ids[: kept.count]] = values[: kept.count]
    room = np.empty(size, np.float32)
    if kept.final:
        return draw(weigh(row, best, sampling.temperature, room), numbers.tolist())
    chosen, weights = keep(row, best, sampling, room)
    if chosen is not None:
        room.fill(0)
        room[chosen] = weights
        weights = room
    return draw(weights, numbers.tolist())


@dataclass(frozen=True, slots=True)
class _Kept:
    """The first `count` candidates hold all that is left; `final`: they are what is left."""

    count: int
    final: bool = False


def _kept(
    values: Floats, found: Sequence[Floats], best: np.float32, sampling: Sampling, complete: bool
) -> _Kept | None:
    """Which of `values`, in their order, certain to be the highest; None where that is open."""
    if complete:
        return _Kept(len(values))
    if takes_few(sampling):
        enough = len(values) >= sampling.top_k
        return _Kept(sampling.top_k) if enough else None
    weights = weigh(values, best, sampling.temperature, None)
    if sampling.min_p > 0:
        # a filter by probability of what is left follows, on the same tokens as ever
        return _Kept(len(values)) if weights[-1] < sampling.min_p * (1 - MARGIN) else None
    peaks, masses = [float(p[0]) for p in found], [float(p[1]) for p in found]
    target = sampling.top_p * _total(peaks, masses, float(best), sampling.temperature)
    sums = np.cumsum(weights, dtype=np.float64)
    needed = int(np.searchsorted(sums, target)) + 1
    if needed > len(sums) or sums[needed - 1] < target * (1 + MARGIN):
        return None
    if needed > 1 and sums[needed - 2] > target * (1 - MARGIN):
        return None
    return _Kept(needed, final=True)


def _levels(first: NDArray[np.float64]) -> list[NDArray[np.float64]]:
    """The levels of the tree above the tokens, from the `first` one up, as `draw` builds them."""
    levels = [first]
    while len(levels[-1]) > FAN and len(levels) + 1 < NUMBERS:
        levels.append(grouped(levels[-1]))
    return levels


def _group_of_sums(
    found: Sequence[Floats],
    best: np.float32,
    sampling: Sampling,
    numbers: NDArray[np.float64],
) -> int | None:
    """The group of the first level that is drawn; None where that is open."""
    scale = max(sampling.temperature, TEMPERATURE_MIN)
    first = np.zeros(len(found[0]) - 1)
    for part in found:
        if np.isfinite(part[0]):
            first += part[1:] * np.exp((float(part[0]) - float(best)) / scale)
    levels = _levels(first)
    index = 0
    for at, level in enumerate(reversed(levels)):
        width = len(levels[-at]) if at else 1
        chosen = _certain_place(level[index::width], float(numbers[at]))
        if chosen is None:
            return None
        index += width * chosen
    return index


def _certain_place(weights: NDArray[np.float64], number: float) -> int | None:
    """Which of `weights`, by inverse CDF; None where an edge is too near."""
    sums = np.cumsum(weights)
    wanted, margin = number * sums[-1], MARGIN * sums[-1]
    at = int(np.searchsorted(sums, wanted, side="right"))
    if at == len(sums) or sums[at] - wanted < margin:
        return None
    if at and wanted - sums[at - 1] < margin:
        return None
    return at
