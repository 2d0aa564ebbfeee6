"""Which cache service keeps which blocks, where there are several.

Invariant: a group's order of nodes depends on its name and the set of nodes alone, so all who know
the same nodes agree, and a node that comes or goes moves its own share of the groups and no more. A
group is GROUP_BLOCKS consecutive blocks of a chain (policy/hashing.py): a run of them is one
request to one node, and a long chain spreads. It lies on the first node of its order that can be
had; a hot one on the second as well. A wrong choice costs a miss, never more.

Source: Thaler and Ravishankar, "A name-based mapping scheme for rendezvous", 1996; weights by
-w / ln(u) as in Schindelhauer and Schomaker, "Weighted distributed hash tables", 2005.
Rejected: whole chains on one node, as a document of 100,000 tokens would fill it; single blocks,
as a run would then cost a request to every node; a second copy of everything, which halves memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from itertools import groupby
from typing import NamedTuple

from headrace.policy.hashing import group_of, hash64

NODES_MAX = 64
ORDERS_MAX = 16_384
"""Groups whose order is remembered."""
COPIES_MAX = 2
"""Nodes that a hot group lies on."""
HOT_READS = 8.0
"""Reads of a group by one client, each worth half after HALF_LIFE_MS, that make it hot."""
HALF_LIFE_MS = 30_000
HEAT_GROUPS_MAX = 8_192
COPIED_MAX = 8_192

_EVEN = 1.0 / (1 << 64)


class Node(NamedTuple):
    """A cache service: its address, and how much of the whole it takes."""

    name: str
    weight: float = 1.0


class Part(NamedTuple):
    """Blocks `first` up to `last` of a list: one group's, to be had from `node`.

    `copy`: that is not the group's first node, which has it if this one has not.
    """

    node: str
    group: bytes
    first: int
    last: int
    copy: bool = False


class Placement:
    """Nodes in the order in which a group would have them."""

    def __init__(self, nodes: Iterable[Node]) -> None:
        """At most NODES_MAX; of one name the first counts."""
        known: dict[str, float] = {}
        for node in nodes:
            known.setdefault(node.name, max(node.weight, 1e-9))
        self.nodes = tuple(Node(name, known[name]) for name in sorted(known)[:NODES_MAX])
        self._orders: dict[bytes, tuple[str, ...]] = {}

    def order(self, group: bytes) -> tuple[str, ...]:
        """All nodes, the group's first one first."""
        order = self._orders.get(group)
        if order is None:
            if len(self._orders) >= ORDERS_MAX:
                self._orders.clear()
            order = self._orders[group] = self._rank(group)
        return order

    def _rank(self, group: bytes) -> tuple[str, ...]:
        scored = []
        for name, weight in self.nodes:
            even = (hash64(group + name.encode()) + 0.5) * _EVEN
            scored.append((weight / -math.log(even) if even < 1 else math.inf, name))
        return tuple(name for _, name in sorted(scored, reverse=True))


class Heat:
    """How much each group was read lately. Bounded: the group that was not read for longest goes.

    A count is halved every HALF_LIFE_MS, so HOT_READS needs a read every few seconds to stay.
    """

    def __init__(self) -> None:
        self._counts: dict[bytes, tuple[float, int]] = {}

    def note(self, group: bytes, now_ms: int) -> bool:
        """A client read `group`; whether it is hot now."""
        count = self.of(group, now_ms) + 1
        self._counts.pop(group, None)
        self._counts[group] = (count, now_ms)
        if len(self._counts) > HEAT_GROUPS_MAX:
            del self._counts[next(iter(self._counts))]
        return count >= HOT_READS

    def of(self, group: bytes, now_ms: int) -> float:
        count, since_ms = self._counts.get(group, (0.0, now_ms))
        elapsed_ms = max(0, now_ms - since_ms)
        return float(count * 0.5 ** (elapsed_ms / HALF_LIFE_MS))

    def is_hot(self, group: bytes, now_ms: int) -> bool:
        return self.of(group, now_ms) >= HOT_READS

    def check_integrity(self) -> None:
        assert len(self._counts) <= HEAT_GROUPS_MAX, "heat is bounded"


class Chooser:
    """Picks nodes for groups, by what this client knows. `can_ask` says who may be asked now."""

    def __init__(self, nodes: Iterable[Node] = ()) -> None:
        self._placement = Placement(nodes)
        self.heat = Heat()
        self._copied: dict[bytes, None] = {}
        """Groups of which this client knows a second copy."""
        self._turn = 0

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(node.name for node in self._placement.nodes)

    def set_nodes(self, nodes: Iterable[Node]) -> bool:
        """Replace the nodes; whether they changed. Where copies are is not known any more then."""
        fresh = Placement(nodes)
        if fresh.nodes == self._placement.nodes:
            return False
        self._placement = fresh
        self._copied.clear()
        return True

    def homes(self, group: bytes, can_ask: Callable[[str], bool]) -> tuple[str, ...]:
        """The COPIES_MAX first nodes of `group` that may be asked."""
        found: list[str] = []
        for name in self._placement.order(group):
            if can_ask(name):
                found.append(name)
                if len(found) == COPIES_MAX:
                    break
        return tuple(found)

    def read_parts(self, hashes: Sequence[bytes], can_ask: Callable[[str], bool]) -> list[Part]:
        """Where to read the run of `hashes` from, up to the first group that nobody can give."""
        self._turn += 1
        parts: list[Part] = []
        for group, first, last in groups(hashes):
            homes = self.homes(group, can_ask)
            if not homes:
                break
            copy = group in self._copied and len(homes) > 1 and self._turn % COPIES_MAX > 0
            parts.append(Part(homes[copy], group, first, last, copy))
        return parts

    def write_nodes(
        self, group: bytes, can_ask: Callable[[str], bool], now_ms: int
    ) -> tuple[str, ...]:
        """Where to write blocks of `group`: one node, two where it is hot; none if none is left."""
        homes = self.homes(group, can_ask)
        if len(homes) > 1 and (group in self._copied or self.heat.is_hot(group, now_ms)):
            return homes
        return homes[:1]

    def is_copied(self, group: bytes) -> bool:
        return group in self._copied

    def note_copied(self, group: bytes) -> None:
        """`group` lies on its second node as well."""
        self._copied.pop(group, None)
        self._copied[group] = None
        if len(self._copied) > COPIED_MAX:
            del self._copied[next(iter(self._copied))]

    def note_lost(self, group: bytes) -> None:
        """The second node of `group` does not have it."""
        self._copied.pop(group, None)

    def check_integrity(self) -> None:
        assert len(self._copied) <= COPIED_MAX, "what is known of copies is bounded"
        self.heat.check_integrity()


def groups(hashes: Sequence[bytes]) -> list[tuple[bytes, int, int]]:
    """The groups of consecutive `hashes`: each one's name, its first place and the one behind."""
    found: list[tuple[bytes, int, int]] = []
    first = 0
    for group, members in groupby(map(group_of, hashes)):
        last = first + sum(1 for _ in members)
        found.append((group, first, last))
        first = last
    return found
