"""Places that the service gave a writer ahead of its next batch: it begins to copy without asking.

Invariant: what is kept is used once or given back, KEPT_S after it came at the latest: what one
client has ahead, all others lack.
Rejected: places that are kept for good, one batch's for each connection: with a few dozen workers
they would be a large part of the cache, most of them idle.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from headrace.cache_entries import Entry
from headrace.frames import KEYS_MAX, NONE_AHEAD, Reserved

KEPT_S = 1.0

BATCH_BYTES_MIN = 1024 * 1024
"""A smaller batch is not worth places ahead: they are filled before the service is asked, also with
what it has already."""


@dataclass(frozen=True, slots=True)
class Ahead:
    """Places of `size_bytes` each, for entries of `tenant`."""

    ticket: int
    places: tuple[int, ...]
    size_bytes: int
    tenant: str

    def fits(self, entries: Sequence[Entry]) -> int:
        """How many of `entries`, from the first on, may be written there."""
        count = 0
        for entry, _ in zip(entries, self.places, strict=False):
            if entry.size_bytes != self.size_bytes or entry.tenant != self.tenant:
                break
            count += 1
        return count


def wish_of(entries: Sequence[Entry]) -> tuple[int, int]:
    """How many places of what size to ask for ahead of the next batch, if it is like this one."""
    size_bytes, tenant = entries[0].size_bytes, entries[0].tenant
    if len(entries) * size_bytes < BATCH_BYTES_MIN:
        return NONE_AHEAD
    if any(each.size_bytes != size_bytes or each.tenant != tenant for each in entries):
        return NONE_AHEAD
    return min(len(entries), KEYS_MAX), size_bytes


class Kept:
    """What one connection has ahead, if anything. Belongs to its event loop."""

    def __init__(self, give_back: Callable[[int], None]) -> None:
        """`give_back` is told of tickets that are not used."""
        self._give_back = give_back
        self._answer: asyncio.Future[Reserved | None] | None = None
        """To who asked last for places ahead."""
        self._ahead: Ahead | None = None
        self._timer: asyncio.TimerHandle | None = None

    def take(self, entries: Sequence[Entry]) -> Ahead | None:
        """The places, if the first of `entries` fits them; they are the caller's then."""
        ahead = self._ahead
        if ahead is None or not ahead.fits(entries[:1]):
            return None
        if sum(entry.size_bytes for entry in entries) < BATCH_BYTES_MIN:
            return None
        self._forget()
        return ahead

    def wants(self, wish: tuple[int, int], tenant: str) -> bool:
        """Whether to ask for what is wished for: not where it is here, or asked for already.

        One batch's places do for two that are under way: when the second begins, the first has
        named its own, and the answer to that brought others.
        """
        ahead = self._ahead
        here = ahead is not None and (ahead.size_bytes, ahead.tenant) == (wish[1], tenant)
        asked = self._answer is not None and not self._answer.done()
        return wish != NONE_AHEAD and not here and not asked

    def note_asked(self, answer: asyncio.Future[Reserved | None]) -> None:
        """Places are asked for; `answer` is done when that ends, whatever comes of it."""
        self._answer = answer

    def keep(self, answer: Reserved, wish: tuple[int, int], tenant: str) -> None:
        """Keep what `answer` brought for `wish`, instead of what was kept so far."""
        if not answer.ahead:
            return
        self.drop()
        self._ahead = Ahead(answer.ahead, answer.ahead_places, wish[1], tenant)
        self._timer = asyncio.get_running_loop().call_later(KEPT_S, self.drop)

    def drop(self) -> None:
        """Give back what is kept."""
        ahead = self._ahead
        self._forget()
        if ahead is not None:
            self._give_back(ahead.ticket)

    def _forget(self) -> None:
        self._ahead = None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
