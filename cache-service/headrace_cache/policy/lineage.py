"""Which entries come after which in their chains, from what each says of its parent.

Pure. Invariant: nothing is taken for a descendant that is not linked to its ancestor, block by
block or as part of a whole group (`headrace.policy.hashing`): every block of a group comes after
the group's first one, so whoever has any block of it knows where it belongs.
Rejected: following chains from each entry upwards, which needs parents that have left long ago.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import NamedTuple

from headrace.policy.hashing import GROUP_BLOCKS, group_of, place_of

Link = tuple[bytes, bytes]
"""An entry's hash and its parent's, empty for none."""


class Below(NamedTuple):
    """Entries by their chains: what is the block `first` or comes after it, and whole `groups`."""

    first: bytes
    groups: frozenset[bytes] = frozenset()

    def of(self, links: Collection[Link]) -> set[bytes]:
        """Hashes of all that is meant among `links`, in whatever order they are."""
        found = descendants([self.first], links)
        if self.groups:
            inside = [hash_ for hash_, _ in links if group_of(hash_) in self.groups]
            found |= descendants(inside, links)
        return found


class Crossings(NamedTuple):
    """Where chains go from group to group, as one node knows it.

    `heads`: the first blocks of groups, with their parents. `ends`: the last blocks of groups that
    come after the block that was asked about.
    """

    heads: Sequence[Link]
    ends: Sequence[bytes]


def descendants(roots: Iterable[bytes], links: Iterable[Link]) -> set[bytes]:
    """`roots` and all that comes after one of them."""
    children: dict[bytes, list[bytes]] = {}
    for hash_, parent in links:
        if parent:
            children.setdefault(parent, []).append(hash_)
    found = set(roots)
    left = list(found)
    while left:
        for child in children.pop(left.pop(), ()):
            if child not in found:
                found.add(child)
                left.append(child)
    return found


def crossings(first: bytes, links: Collection[Link]) -> Crossings:
    """What `links` say of the ways between groups, and of those that lead away from `first`."""
    heads = {link: None for link in links if link[1] and not place_of(link[0])}
    after = descendants([first], links)
    return Crossings(
        list(heads), [hash_ for hash_ in sorted(after) if place_of(hash_) == GROUP_BLOCKS - 1]
    )
