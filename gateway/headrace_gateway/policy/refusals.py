"""Which sizes fit nowhere, so that a full fleet is looked through in the time of what has changed.

Invariant: a refusal says that at one moment no worker had room for a size; since a peak grows with
both of its parts, what is as large in both finds room only where something has changed since, or
where a breaker alone stood in the way. A level keeps SIZES_MAX refusals, none of which says less
than another. Rejected: one size a level, which says nothing of a longer prompt with a shorter
output, so that in a mixed load each second look went through the whole fleet.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

SIZES_MAX = 8
"""Refusals of a level; the one that was found out first goes."""
NAMED_MAX = 32
"""Workers that are named; where more may have room, looking at all finds one as soon."""


_Refusal = tuple[int, int, int, tuple[str, ...]]
"""(held, remaining, moment, unsure): at that moment nobody had room for the size but, perhaps, the
unsure. A plain tuple, since each decision takes several apart."""


class Maybe(NamedTuple):
    """All others refused (held, remaining); `workers` None: they are more than NAMED_MAX."""

    held: int
    remaining: int
    workers: list[str] | None


_tuple = tuple.__new__
"""Makes a NamedTuple in a third of the time."""


class Refusals:
    """What was refused by all workers, by level, and who has changed since."""

    def __init__(self, levels: int) -> None:
        self._levels: list[list[_Refusal]] = [[] for _ in range(levels)]
        self._changed: dict[str, int] = {}
        """The moment of each worker's last change, the latest last."""
        self._moment = 0

    def changed(self, worker: str) -> None:
        """What did not fit on `worker` may fit now."""
        self._moment += 1
        self._changed.pop(worker, None)
        self._changed[worker] = self._moment

    def forget(self, worker: str) -> None:
        """`worker` takes no jobs any more."""
        if self._changed.pop(worker, None) is not None:
            for level, refusals in enumerate(self._levels):
                self._levels[level] = [
                    (held, remaining, moment, tuple(w for w in unsure if w != worker))
                    for held, remaining, moment, unsure in refusals
                ]

    def maybe(self, level: int, held: int, remaining: int) -> Maybe | None:
        """The only workers that may have room for a size; None where nothing is known of it."""
        since = -1
        for each in self._levels[level]:
            if each[0] <= held and each[1] <= remaining and each[2] > since:
                known_held, known_remaining, since, unsure = each
        if since < 0:
            return None
        found = [*unsure] if len(unsure) <= NAMED_MAX else None
        if found is not None:
            for worker, moment in reversed(self._changed.items()):
                if moment <= since:
                    break
                if worker not in unsure:
                    found.append(worker)
                    if len(found) > NAMED_MAX:
                        found = None
                        break
        return _tuple(Maybe, (known_held, known_remaining, found))

    def refused(self, level: int, held: int, remaining: int, unsure: Collection[str]) -> None:
        """All workers have been asked for a size and have no room, except perhaps the `unsure`."""
        kept = [each for each in self._levels[level] if each[0] < held or each[1] < remaining]
        kept.append((held, remaining, self._moment, tuple(unsure)))
        self._levels[level] = kept[-SIZES_MAX:]

    def known(self, level: int) -> list[tuple[int, int, list[str]]]:
        """Each size that is refused, with the workers that may have room for it after all."""
        return [
            (held, remaining, [*unsure, *self._since(moment)])
            for held, remaining, moment, unsure in self._levels[level]
        ]

    def check_integrity(self) -> None:
        """Moments are in order and refusals bounded. Raises AssertionError."""
        moments = list(self._changed.values())
        assert moments == sorted(set(moments)) and max(moments, default=0) <= self._moment
        for refusals in self._levels:
            assert len(refusals) <= SIZES_MAX, "a level keeps few refusals"
            for at, (held, remaining, *_) in enumerate(refusals):
                later = refusals[at + 1 :]
                assert all(each[0] > held or each[1] > remaining for each in later)

    def _since(self, moment: int) -> list[str]:
        return [worker for worker, at in self._changed.items() if at > moment]
