"""What the store grants: loans to readers, reservations to writers, and why an entry got none."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

NOWHERE = -1


class Outcome(StrEnum):
    """What became of an entry that was put."""

    KEPT = "kept"
    PRESENT = "present"
    BUSY = "busy"
    """Somebody else is writing it."""
    TOO_LARGE = "too_large"
    OUTRANKED = "outranked"
    """Worth less than all that would have to leave, or than what may leave."""
    SKIPPED = "skipped"
    """Too much is being written already, or a place had ahead is not for such an entry."""


@dataclass(frozen=True, slots=True)
class Loan:
    """The leading run found for a list of keys, lent.

    `more`: cut short by the caller's limit. `saved_us` is what computing it would take; `tiers`
    (RAM or DISK) where its entries lay, if not all in RAM.
    """

    lease: int
    places: tuple[int, ...]
    sizes: tuple[int, ...]
    crcs: tuple[int, ...]
    more: bool
    saved_us: int
    tiers: tuple[int, ...] = ()

    @property
    def bytes(self) -> int:
        return sum(self.sizes)


@dataclass(frozen=True, slots=True)
class Reservation:
    """A place for each entry, NOWHERE for those that are not to be written, and why."""

    ticket: int
    places: tuple[int, ...]
    outcomes: tuple[Outcome, ...]
