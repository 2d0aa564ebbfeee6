"""What workers will hold as soon as they have computed what was sent to them.

Invariant: an expectation lives between TTL_MS / 2 and TTL_MS, and ends earlier only if its worker
reports the block removed. Two generations take turns: what is expected goes into the young one, and
from time to time the old one is dropped as a whole, so that ending costs nothing. A prompt is kept
by the keys at some depths only (GRID), since a key names the whole prefix that ends there: what
matches is rounded down to the next of these depths until the reports say it exactly.

Rejected: an entry for each block with its own end, which cost more than the decision that made it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import repeat
from operator import itemgetter
from typing import NamedTuple

TTL_MS = 30_000
EXPECTED_MAX = 262_144
"""Keys in one generation; when there are more, the old one goes early."""
_STEP = 16
_SHORT = (1, 2, 3, 4, 6, 8, 12)
_WALKED = len(_SHORT)
"""Steps of the grid before the rest is bisected."""
_GRIDS_MAX = 4_096
"""Lengths of prompts whose depths are kept at hand."""
_tuple = tuple.__new__
"""Makes a NamedTuple in a third of the time."""


class Holders(NamedTuple):
    """The workers, as a bit set of slots, that hold exactly `blocks` leading blocks of a prompt."""

    blocks: int
    slots: int


def first_less(
    get: Callable[[int, int], int], keys: Sequence[int], places: Sequence[int], alive: int
) -> int:
    """How many of `places` come before the first whose key not all of `alive` hold, by bisection:
    holders only get fewer along a prompt."""
    low, high = 0, len(places)
    while low < high:
        middle = (low + high) // 2
        if get(keys[places[middle]], 0) & alive == alive:
            low = middle + 1
        else:
            high = middle
    return low


@lru_cache(_GRIDS_MAX)
def grid(blocks: int) -> tuple[int, ...]:
    """The depths at which a prompt of `blocks` blocks is kept; the first and the last are."""
    short = (depth for depth in _SHORT if depth < blocks)
    return (*short, *range(_STEP, blocks, _STEP), blocks)


class _Grid(NamedTuple):
    """A length's depths that are walked, where the keys of those behind stand, and what picks the
    keys of all: one call for all of them costs as much as indexing two."""

    walked: tuple[int, ...]
    behind: tuple[int, ...]
    pick: Callable[[Sequence[int]], tuple[int, ...]]


@lru_cache(_GRIDS_MAX)
def _grid(blocks: int) -> _Grid:
    places = tuple(depth - 1 for depth in grid(blocks))
    # of a single place it would answer no tuple
    pick = itemgetter(*places) if len(places) > 1 else itemgetter(slice(0, 1))
    return _Grid(grid(blocks)[: _WALKED + 1], places[_WALKED + 1 :], pick)


class Prompt(NamedTuple):
    """A prompt's keys, and those of them by which it is kept."""

    keys: Sequence[int]
    marks: Sequence[int]
    grid: _Grid


def prompt_of(keys: Sequence[int]) -> Prompt:
    """There is at least one key."""
    kept = _grid(len(keys))
    return _tuple(Prompt, (keys, kept.pick(keys), kept))


class Expectations:
    """Two generations of keys with the workers, as bit sets, that are expected to hold them."""

    def __init__(self, ttl_ms: int = TTL_MS, expected_max: int = EXPECTED_MAX) -> None:
        self._ttl_ms = ttl_ms
        self._expected_max = expected_max
        self._young: dict[int, int] = {}
        self._old: dict[int, int] = {}
        self._born_ms = 0
        self.generation = 0
        """What was expected in generation g is forgotten in g + 2."""

    def add(self, bit: int, prompt: Prompt, now_ms: int) -> None:
        """The worker `bit` will hold a prompt's blocks."""
        self.expire(now_ms)
        marks = prompt.marks[: self._expected_max]
        if len(self._young) + len(marks) > self._expected_max:
            self._turn(now_ms)
        young = self._young
        # most keys have one worker, and the same number serves for all of these
        for key, others in zip(marks, map(young.setdefault, marks, repeat(bit)), strict=False):
            if others is not bit:
                young[key] = others | bit

    def remove(self, bit: int, keys: Sequence[int]) -> None:
        """The worker `bit` does not hold these blocks any more."""
        for generation in (self._young, self._old):
            if generation:
                for key in keys:
                    slots = generation.get(key, 0)
                    if slots & bit:
                        generation[key] = slots ^ bit

    def expire(self, now_ms: int) -> None:
        """Let generations end whose time has come."""
        # a clock that was set back would let them live for ever
        if not 0 <= now_ms - self._born_ms < self._ttl_ms // 2:
            if abs(now_ms - self._born_ms) >= self._ttl_ms:
                self._young = {}
            self._turn(now_ms)

    def leaders(self, prompt: Prompt, live: int) -> list[Holders]:
        """As PrefixIndex.leaders, of the workers `live`, by what they are expected to hold."""
        found: list[Holders] = []
        young, old = self._young.get, self._old.get
        alive, last = live, 0
        keys, marks, (walked, behind, _) = prompt
        for depth, key in zip(walked, marks, strict=False):
            both = alive & young(key, 0)
            if both != alive:
                both |= alive & old(key, 0)
                if both != alive:
                    if last:
                        found.append(_tuple(Holders, (last, alive ^ both)))
                    alive = both
                    if not alive:
                        break
            last = depth
        if alive:
            if behind:
                self._bisect(found, keys, behind, alive, last)
            else:
                found.append(_tuple(Holders, (last, alive)))
        found.reverse()
        return found

    def _bisect(
        self,
        found: list[Holders],
        keys: Sequence[int],
        places: Sequence[int],
        alive: int,
        last: int,
    ) -> None:
        """`leaders` for what is behind the first steps: `alive` hold `last` blocks."""
        while places:
            step = first_less(self._get, keys, places, alive)
            if step:
                last = places[step - 1] + 1
            if step == len(places):
                break
            both = alive & self._get(keys[places[step]], 0)
            found.append(_tuple(Holders, (last, alive ^ both)))
            alive, last = both, places[step] + 1
            if not alive:
                return
            places = places[step + 1 :]
        found.append(_tuple(Holders, (last, alive)))

    def check_integrity(self) -> None:
        """Both generations are bounded. Raises AssertionError."""
        assert max(len(self._young), len(self._old)) <= self._expected_max

    def _get(self, key: int, default: int) -> int:
        return self._young.get(key, default) | self._old.get(key, default)

    def _turn(self, now_ms: int) -> None:
        self._old, self._young, self._born_ms = self._young, {}, now_ms
        self.generation += 1
