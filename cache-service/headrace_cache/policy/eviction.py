"""Which entries leave when room is needed: what a policy is told, and what it answers.

Invariants for every policy: an entry with a resident child is never a victim, since a chain is read
from its head and a tail without its head is of no use; a pinned entry is none before its pin ends,
so its ancestors are none either; a policy holds facts, never bytes.
Entries are named by slots (small whole numbers, reused), so that policies keep arrays of numbers.
Rejected: names of 32 bytes, which cost a policy 200 bytes an entry for the dictionary alone.
"""

from __future__ import annotations

from collections.abc import Callable, MutableMapping, Sequence
from typing import NamedTuple, Protocol

from headrace.types import Band

NO_SLOT = -1

NOT_PINNED = -1

Spare = MutableMapping[int, int]
"""Bytes that each tenant may lose now; who is not in it loses nothing. Counted down by `victims`,
which takes a tenant's entry while anything is left of its share: at most one entry too much."""


class Facts(NamedTuple):
    """What the policy is told of an entry.

    `size_bytes` is what it takes from the budget. `parent` is the slot of the entry before it,
    whether or not that one is resident, NO_SLOT for none; links never form a ring (the index sees
    to that). `cost_us` is what computing it again takes, 0 if nobody knows. `name` are 64 bits of
    its hash, by which a policy may recognize what it lost before. `tenant` is a small number.
    """

    size_bytes: int
    band: Band
    parent: int = NO_SLOT
    tenant: int = 0
    cost_us: int = 0
    depth: int = 0
    name: int = 0


class Victim(NamedTuple):
    """An entry that has to leave, and why it rather than another.

    `text` is a template for `values`, as most victims leave without being asked for their reason.
    """

    slot: int
    size_bytes: int
    score: float
    text: str
    values: tuple[float | str, ...] = ()

    @property
    def reason(self) -> str:
        return self.text.format(*self.values)


class EvictionPolicy(Protocol):
    """Decides who leaves. The store tells it all and obeys."""

    def admit(self, slot: int, facts: Facts, now_ms: int) -> None:
        """A new entry came in. It may be a victim at once: then it was worth less than the rest."""
        ...

    def admit_all(self, slots: Sequence[int], facts: Sequence[Facts], now_ms: int) -> None:
        """As `admit` for each, parents first, and nobody leaves meanwhile."""
        ...

    def touch(self, slot: int, now_ms: int, band: Band | None = None) -> None:
        """A resident entry was used, by a request of `band` if that is known."""
        ...

    def touch_all(self, slots: Sequence[int], now_ms: int, band: Band | None = None) -> None:
        """As `touch` for each, in order."""
        ...

    def renew(self, slot: int, band: Band) -> None:
        """A resident entry was written again, for a request of `band`: nobody has used it by that.

        Who computed it anyway, or kept it, tells nothing of what the cache was good for.
        """
        ...

    def remove(self, slot: int) -> None:
        """A resident entry left for a reason of its own, not as a victim."""
        ...

    def victims(
        self,
        size_bytes: int,
        now_ms: int,
        allowed: Callable[[int], bool] | None = None,
        spare: Spare | None = None,
    ) -> list[Victim]:
        """Take out entries until at least `size_bytes` are free, or no more may leave; in order.

        `allowed` says of a slot whether it may leave now (no reader holds it); `spare` limits whose
        entries leave, None: anybody's.
        """
        ...

    def pin(self, slot: int, until_ms: int) -> bool:
        """Keep a resident entry until `until_ms`; False if all pins together would hold too much.

        Its resident ancestors stay with it and count too. A later pin of the same slot replaces
        the earlier one.
        """
        ...

    def unpin(self, slot: int) -> None:
        """End the pin of `slot` if it has one."""
        ...

    def pinned_until_ms(self, slot: int) -> int:
        """When the pin of `slot` itself ends; NOT_PINNED if it has none."""
        ...

    @property
    def pinned_bytes(self) -> int:
        """What pinned entries and their ancestors take."""
        ...

    def check_integrity(self) -> None:
        """Assert that all indexes agree. Takes time in all entries."""
        ...
