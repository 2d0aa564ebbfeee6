"""When what was used is used again: learned online from a sample of all uses.

Invariant: what is learned does not depend on what the cache keeps, as the sample watches names
whether or not they are resident; so it holds for a cache of any size, and needs no tuning to one.
The answer is an index for each class and age: the most hits per time of waiting that keeping such
an entry promises, over all times that one may decide to wait. Keeping what has the highest index
is optimal for independent entries of equal size (J. C. Gittins, "Bandit processes and dynamic
allocation indices", JRSS B 1979); hit density as a rank is from N. Beckmann et al., "LHD: Improving
cache hit rate by maximizing hit density", NSDI 2018; sampling by hash from C. Waldspurger et al.,
"Efficient MRC construction with SHARDS", FAST 2015; survivors are counted as by Kaplan and Meier,
JASA 1958.
Rejected: counts over evicted entries alone, which never see a reuse that the cache is too small
for; one constant that trades recency for use, which is right for one size of cache only.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence

BUCKETS = 40
"""Ages are told apart by half octaves, from YOUNG uses on."""

YOUNG_BITS = 6
YOUNG = 1 << YOUNG_BITS

WATCHED_MAX = 16_384
HORIZON = 8
"""Names are watched for this many times as many uses as the cache has entries."""

CLASSES_MAX = 64
CLASS_BITS = 6

PRIOR_WEIGHT = 20.0
"""What is assumed of a class counts like this many of its entries."""

PRIOR_HAZARD = 0.04
"""Chance of a reuse in a half octave, for each use so far, as long as nothing else is known; the
first bucket is as wide as several."""

REFRESH_USES_MIN = 1024
REFRESH_USES_MAX = 16_384


_class_of = (CLASSES_MAX - 1).__and__


def bucket_of(age: int) -> int:
    """The bucket of an age in uses."""
    if age < YOUNG:
        return 0
    octave = age.bit_length() - 1
    return min(BUCKETS - 1, 2 * (octave - YOUNG_BITS) + (age >> (octave - 1) & 1) + 1)


def start_of(bucket: int) -> int:
    """The lowest age in `bucket`."""
    if bucket == 0:
        return 0
    octave, upper = divmod(bucket - 1, 2)
    return (YOUNG << octave) + upper * (YOUNG << octave >> 1)


STARTS = [start_of(bucket) for bucket in range(BUCKETS + 1)]
WIDTHS = [STARTS[bucket + 1] - STARTS[bucket] for bucket in range(BUCKETS)]


class ReuseModel:
    """Counts reuses by class and age, and turns them into `index`.

    Classes are numbers below CLASSES_MAX; `families[c]` names those that class c borrows from
    where it has seen little, and `strengths[f]` how often members of family f were used already.
    Ages and `clock` are in uses of the cache.
    """

    def __init__(self, families: list[int], strengths: list[int]) -> None:
        assert len(families) <= CLASSES_MAX, "a class fits beside the clock"
        self.clock = 0
        self._families = families
        self._strengths = strengths
        self._watched: dict[int, int] = {}
        self._shift = 64
        self._learned_at = 0
        self.due_at = REFRESH_USES_MIN
        self._reused = [[0.0] * BUCKETS for _ in families]
        self._given_up = [[0.0] * BUCKETS for _ in families]
        self.index: list[list[float]] = []
        self._learn()

    def used(self, name: int, class_: int) -> None:
        """`name` (64 even bits) was used, and is of `class_` from this use on."""
        self.clock += 1
        if name >> self._shift:
            return
        seen = self._watched.pop(name, None)
        if seen is not None:
            age = self.clock - (seen >> CLASS_BITS)
            self._reused[seen & (CLASSES_MAX - 1)][bucket_of(age)] += 1.0
        self._watched[name] = self.clock << CLASS_BITS | class_
        if len(self._watched) > WATCHED_MAX:
            self._give_up(next(iter(self._watched)))

    def used_all(self, names: Sequence[int], classes: Sequence[int]) -> None:
        """As `used` for each, in order."""
        clock, shift, watched = self.clock, self._shift, self._watched
        for name, class_ in zip(names, classes, strict=True):
            clock += 1
            if name >> shift:
                continue
            seen = watched.pop(name, None)
            if seen is not None:
                age = clock - (seen >> CLASS_BITS)
                self._reused[seen & (CLASSES_MAX - 1)][bucket_of(age)] += 1.0
            watched[name] = clock << CLASS_BITS | class_
            if len(watched) > WATCHED_MAX:
                self.clock = clock
                self._give_up(next(iter(watched)))
        self.clock = clock

    def _give_up(self, name: int) -> None:
        """Stop watching the name that was used longest ago."""
        seen = self._watched.pop(name)
        age = self.clock - (seen >> CLASS_BITS)
        self._given_up[seen & (CLASSES_MAX - 1)][bucket_of(age)] += 1.0

    @property
    def due(self) -> bool:
        """Enough happened since the last `refresh`."""
        return self.clock >= self.due_at

    def refresh(self, entries: int) -> None:
        """Learn from what was seen; the cache has `entries` now. Takes a few milliseconds."""
        uses = min(max(REFRESH_USES_MIN, entries // 4), REFRESH_USES_MAX)
        kept = 0.5 ** ((self.clock - self._learned_at) / (HORIZON * max(entries, uses)))
        self.due_at, self._learned_at = self.clock + uses, self.clock
        self._sample(entries)
        self._learn()
        for counts in (*self._reused, *self._given_up):
            counts[:] = [kept * count for count in counts]

    def _sample(self, entries: int) -> None:
        """Watch one name in 2^n, so that WATCHED_MAX of them last for the horizon."""
        wanted = HORIZON * entries / WATCHED_MAX
        shift = 64 - max(0, math.ceil(math.log2(wanted)) if wanted > 1 else 0)
        if shift < self._shift:
            self._shift = shift
            watched = self._watched.items()
            self._watched = {name: seen for name, seen in watched if not name >> shift}

    def waiting(self) -> list[list[float]]:
        """How many watched names, by class and age, were not used again so far."""
        waiting = [[0.0] * BUCKETS for _ in self._families]
        # the longest unused comes first, so each bucket's names stand together
        watched, last = list(self._watched.values()), len(self._watched)
        for bucket in range(BUCKETS):
            youngest = self.clock - STARTS[bucket + 1] if bucket < BUCKETS - 1 else -1
            first = bisect_left(watched, youngest + 1 << CLASS_BITS)
            for class_, count in Counter(map(_class_of, watched[first:last])).items():
                waiting[class_][bucket] += count
            last = first
        return waiting

    def _learn(self) -> None:
        ended = [
            [gone + still for gone, still in zip(*each, strict=True)]
            for each in zip(self._given_up, self.waiting(), strict=True)
        ]
        families: dict[int, tuple[list[float], list[float]]] = {}
        for class_, family in enumerate(self._families):
            reused, gone = families.setdefault(family, ([0.0] * BUCKETS, [0.0] * BUCKETS))
            for bucket in range(BUCKETS):
                reused[bucket] += self._reused[class_][bucket]
                gone[bucket] += ended[class_][bucket]
        usual = {}
        for family, (reused, gone) in families.items():
            assumed = PRIOR_HAZARD * self._strengths[family]
            usual[family] = hazards(reused, gone, [min(0.5, 4 * assumed), min(0.5, assumed)])
        self.index = [
            best_rates(hazards(self._reused[class_], ended[class_], usual[family]))
            for class_, family in enumerate(self._families)
        ]

    def check_integrity(self) -> None:
        """Assert that the sample is bounded, in order, and of the names it shall have."""
        assert len(self._watched) <= WATCHED_MAX, "the sample is bounded"
        times = [seen >> CLASS_BITS for seen in self._watched.values()]
        assert times == sorted(times), "the longest unused comes first"
        assert not any(name >> self._shift for name in self._watched), "sampled by name"


def hazards(reused: list[float], ended: list[float], assumed: list[float]) -> list[float]:
    """Chance of a reuse in each bucket for what got there, drawn towards what is `assumed`.

    `ended`: how many are in each bucket unused, or were when we stopped watching them; half of them
    are taken to get through it. Where `assumed` ends, each bucket is assumed to be like the one
    before it: what was not seen beyond some age is not taken to begin there.
    """
    at_risk, beyond = [0.0] * BUCKETS, 0.0
    for bucket in range(BUCKETS - 1, -1, -1):
        at_risk[bucket] = beyond + reused[bucket] + ended[bucket] / 2
        beyond += reused[bucket] + ended[bucket]
    chances: list[float] = []
    for bucket in range(BUCKETS):
        usual = assumed[bucket] if bucket < len(assumed) else chances[-1]
        drawn = reused[bucket] + PRIOR_WEIGHT * usual
        chances.append(drawn / (at_risk[bucket] + PRIOR_WEIGHT))
    return chances


def best_rates(chances: list[float]) -> list[float]:
    """The most hits per use waited, from each bucket on, over all buckets to give up after.

    From the last bucket to the first: whoever waits for one bucket goes on to what is behind it as
    long as that promises more than what he has so far. What is behind is kept in blocks, each with
    its hits, its waiting and the chance to get through it, that are waited for as a whole.
    """
    rates = [0.0] * BUCKETS
    blocks: list[tuple[float, float, float, float]] = []
    for bucket in range(BUCKETS - 1, -1, -1):
        chance = chances[bucket]
        hits, waited, left = chance, (1.0 - chance / 2) * WIDTHS[bucket], 1.0 - chance
        rate = hits / waited
        while blocks and blocks[-1][0] > rate:
            _, more_hits, more_waited, passes = blocks.pop()
            hits, waited, left = hits + left * more_hits, waited + left * more_waited, left * passes
            rate = hits / waited
        blocks.append((rate, hits, waited, left))
        rates[bucket] = rate
    return rates
