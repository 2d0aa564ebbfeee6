"""Which of a model's blocks the cache services hold, as far as the dispatcher knows.

Invariant: a hint, bounded per service and in total. It follows the services' news; a gap in their
numbers is reported, and a snapshot with the news that came after it makes up for what was missed.
A block counts only with those before it, since a run ends at its first gap.

A set of 60-bit keys a service, some 100 bytes each. Groups of blocks lie on one service and leave
it tails first, so a look-up walks in steps of STRIDE and only then halves: 0.1 ms for 8,000 blocks.
Rejected: counts by block, which news that are netted and lost cannot keep right.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Iterable, Sequence
from itertools import islice

from headrace.types import BLOCK_KEY_BYTES, BlockNews

NODE_BLOCKS_MAX = 262_144
TOTAL_BLOCKS_MAX = 1_048_576
NODES_MAX = 64
REPLAYED_MAX = 64
"""News kept of each service, to be applied again on top of an older snapshot."""
STRIDE = 32
KEY_MASK = int.from_bytes(b"\xf0" + b"\xff" * (BLOCK_KEY_BYTES - 1), sys.byteorder)
"""What services tell of a key: they keep 60 bits."""


class _Held:
    """One service's blocks, and the news that led there."""

    def __init__(self, boot: str, sequence: int) -> None:
        self.boot = boot
        self.sequence = sequence
        self.keys: set[int] = set()
        self.recent: deque[BlockNews] = deque(maxlen=REPLAYED_MAX)


class SharedIndex:
    """Blocks by cache service."""

    def __init__(self, total_max: int = TOTAL_BLOCKS_MAX) -> None:
        self._total_max = total_max
        self._nodes: dict[str, _Held] = {}

    def __len__(self) -> int:
        """Pairs of service and block."""
        return sum(len(held.keys) for held in self._nodes.values())

    def __bool__(self) -> bool:
        """Whether any service is known."""
        return bool(self._nodes)

    @property
    def nodes(self) -> tuple[str, ...]:
        return tuple(self._nodes)

    def note(self, news: BlockNews) -> bool:
        """Blocks came and went; False when news before these were missed."""
        held = self._nodes.get(news.address)
        if held is None and len(self._nodes) >= NODES_MAX:
            return True
        complete = True
        if held is None or held.boot != news.boot:
            complete = news.sequence == 1
            held = self._nodes[news.address] = _Held(news.boot, news.sequence)
        elif news.sequence <= held.sequence:
            return True
        else:
            complete = news.sequence == held.sequence + 1
        held.sequence = news.sequence
        held.recent.append(news)
        self._apply(held, news)
        return complete

    def snapshot(self, news: BlockNews) -> bool:
        """All blocks of a service; False when it is of another incarnation than its news."""
        held = self._nodes.get(news.address)
        if held is None:
            if len(self._nodes) >= NODES_MAX:
                return True
            held = self._nodes[news.address] = _Held(news.boot, news.sequence)
        elif held.boot != news.boot:
            return False
        held.keys = set()
        held.sequence = max(held.sequence, news.sequence)
        self._apply(held, news)
        for later in held.recent:
            if later.sequence > news.sequence:
                self._apply(held, later)
        return True

    def keep_only(self, addresses: Iterable[str]) -> None:
        """The services that live; what others held is gone."""
        alive = set(addresses)
        self._nodes = {name: held for name, held in self._nodes.items() if name in alive}

    def _apply(self, held: _Held, news: BlockNews) -> None:
        held.keys.difference_update(_split(news.removed))
        held.keys.update(_split(news.stored))
        limit = min(NODE_BLOCKS_MAX, self._total_max // len(self._nodes))
        for each in self._nodes.values():
            if len(each.keys) > limit:
                # whichever come first: a set does not know which are oldest
                each.keys -= set(islice(each.keys, len(each.keys) - limit + limit // 8))

    def run_after(self, blocks: bytes, first: int) -> int:
        """How many blocks of a prompt, from its block number `first` on, are held in a row.

        `blocks` are the prompt's keys, BLOCK_KEY_BYTES each.
        """
        sets = [held.keys for held in self._nodes.values() if held.keys]
        if not sets:
            return 0
        view = memoryview(blocks).cast("Q")
        total = len(view)
        if first >= total or _first_missing(view, (first,), sets) == first:
            return 0
        strides = (*range(first + STRIDE, total, STRIDE), total - 1)
        bad = _first_missing(view, strides, sets)
        if bad is None:
            return total - first
        good = first + (bad - first - 1) // STRIDE * STRIDE
        while bad - good > 1:
            middle = (good + bad) // 2
            if _first_missing(view, (middle,), sets) is None:
                good = middle
            else:
                bad = middle
        return bad - first

    def check_integrity(self) -> None:
        assert len(self) <= self._total_max and len(self._nodes) <= NODES_MAX, "bounded"
        for held in self._nodes.values():
            assert len(held.keys) <= NODE_BLOCKS_MAX, "each service is bounded"
            assert all(news.boot == held.boot for news in held.recent), "of this incarnation"


def _first_missing(
    view: memoryview[int], places: Iterable[int], sets: Sequence[set[int]]
) -> int | None:
    """The first of `places` whose key is in none of `sets`."""
    for place in places:
        key = view[place] & KEY_MASK
        for keys in sets:
            if key in keys:
                break
        else:
            return place
    return None


def _split(keys: bytes) -> set[int]:
    """Keys as numbers, as they are: their senders have cleared what they do not keep."""
    assert len(keys) % BLOCK_KEY_BYTES == 0, "whole keys"
    return set(memoryview(keys).cast("Q")) if keys else set()
