"""A simulated worker's KV: what running sequences hold and which prefix blocks can be reused.

Invariant: `private` + `shared` + `idle` tokens never exceed `total`. Private tokens belong to one
sequence; a prefix block that was computed is shared, with a count of its holders, and stays idle
when the last one goes, until its space is needed. Idle ones give way by the score of the worker's
own block pool (headrace_worker/policy/blocks.py): last use, and what the user's band is worth on
top. Blocks here are the trace's (512 tokens, say), so a long prompt costs a few operations; the
reports that leave the worker name them in the service's own blocks. A thousand workers have a
million blocks: one small object and one table entry each.
"""

from __future__ import annotations

from collections.abc import Sequence
from heapq import heapify, heappop, heappush

from headrace.types import BLOCK_TOKENS
from headrace_worker.policy.blocks import KEEP_POOLS, STALE_ENTRIES_MIN

PrefixBlock = tuple[int, int]
"""(id, tokens): the last block of a prompt may be short. Ids below 0 are nobody else's."""


def round_up(tokens: int) -> int:
    """`tokens` in whole KV blocks."""
    return -(-tokens // BLOCK_TOKENS) * BLOCK_TOKENS


class _Block:
    """A block that is here; idle if it has no `holders`, and then `number` is its heap entry's."""

    __slots__ = ("holders", "number", "score", "tokens")

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens
        self.holders = 1
        self.score = 0
        self.number = 0


class KvCache:
    """`total` tokens of KV. `plain`: least recently used, whatever the band.

    With `reports`, it remembers what it gained and lost.
    """

    __slots__ = (
        "_blocks",
        "_gained",
        "_handed_out",
        "_heap",
        "_idle_blocks",
        "_keep",
        "_lost",
        "_numbers",
        "_reports",
        "idle",
        "private",
        "shared",
        "total",
    )

    def __init__(self, total: int, *, plain: bool = False, reports: bool = True) -> None:
        self.total = total
        self._keep = tuple(0 if plain else pools * total for pools in KEEP_POOLS)
        self.private = 0
        self.shared = 0
        self.idle = 0
        self._blocks: dict[int, _Block] = {}
        self._idle_blocks = 0
        self._heap: list[tuple[int, int, int]] = []
        """(score, number, block); an entry that the block does not confirm is outdated."""
        self._numbers = 0
        self._handed_out = 0
        self._reports = reports
        self._gained: dict[int, int] = {}
        self._lost: dict[int, int] = {}

    @property
    def available(self) -> int:
        """Tokens that could be handed out now, idle blocks given up."""
        return self.total - self.private - self.shared

    def match(self, blocks: Sequence[PrefixBlock]) -> tuple[int, int, int]:
        """(blocks, tokens) of the longest prefix that is here, and how many of the tokens are idle.

        Takes no hold.
        """
        count = tokens = idle = 0
        get = self._blocks.get
        for name, _ in blocks:
            block = get(name)
            if block is None:
                break
            count += 1
            tokens += block.tokens
            if not block.holders:
                idle += block.tokens
        return count, tokens, idle

    def hold(self, blocks: Sequence[PrefixBlock]) -> None:
        """One more holder for each of these blocks, which are here."""
        for name, size in blocks:
            block = self._blocks[name]
            if not block.holders:
                block.number = 0
                self._idle_blocks -= 1
                self.idle -= size
                self.shared += size
            block.holders += 1

    def reserve(self, tokens: int) -> None:
        """`tokens` more are somebody's own; idle blocks give way."""
        self.private += tokens
        self._handed_out += tokens
        while self.private + self.shared + self.idle > self.total:
            assert self._idle_blocks, "reserve only what is available"
            _, number, name = heappop(self._heap)
            block = self._blocks.get(name)
            if block is not None and block.number == number:
                del self._blocks[name]
                self._idle_blocks -= 1
                self.idle -= block.tokens
                self._note(name, block.tokens, self._lost, self._gained)

    def give_back(self, tokens: int) -> None:
        self.private -= tokens

    def computed(self, block: PrefixBlock) -> None:
        """A sequence's own tokens turned out to be `block`: it holds that from now on."""
        name, size = block
        self.private -= size
        if name in self._blocks:
            self.hold((block,))
            return
        self._blocks[name] = _Block(size)
        self.shared += size
        self._note(name, size, self._gained, self._lost)

    def keep(self, name: int, tokens: int, band: int) -> None:
        """`tokens` that were somebody's own stay as an idle block, which nobody is told of."""
        self.private -= tokens
        self.shared += tokens
        self._blocks[name] = _Block(tokens)
        self.release(((name, tokens),), band)

    def release(self, blocks: Sequence[PrefixBlock], band: int) -> None:
        """One holder less for each, given head first; `band` is that holder's."""
        score = self._handed_out + self._keep[band]
        heap, number, released = self._heap, self._numbers, 0
        for name, size in reversed(blocks):
            block = self._blocks[name]
            if block.score < score:
                block.score = score
            block.holders -= 1
            if not block.holders:
                number += 1
                block.number = number
                heappush(heap, (block.score, number, name))
                released += size
        self._idle_blocks += number - self._numbers
        self._numbers = number
        self.shared -= released
        self.idle += released
        if len(heap) > 2 * self._idle_blocks + STALE_ENTRIES_MIN:
            self._heap = [
                (block.score, block.number, name)
                for name, block in self._blocks.items()
                if not block.holders
            ]
            heapify(self._heap)

    def held_alone(self, blocks: Sequence[PrefixBlock]) -> int:
        """Tokens of those of `blocks` that have a single holder."""
        return sum(size for name, size in blocks if self._blocks[name].holders == 1)

    def _note(self, name: int, size: int, here: dict[int, int], there: dict[int, int]) -> None:
        """News for `here`, unless it takes back what is `there`."""
        if self._reports and name >= 0 and there.pop(name, None) is None:
            here[name] = size

    def take_news(self) -> tuple[list[PrefixBlock], list[PrefixBlock]]:
        """Blocks gained and blocks lost since the last call."""
        gained, lost = list(self._gained.items()), list(self._lost.items())
        self._gained.clear()
        self._lost.clear()
        return gained, lost

    def check_integrity(self) -> None:
        assert min(self.private, self.shared, self.idle) >= 0, "a count fell below zero"
        assert self.private + self.shared + self.idle <= self.total, "more KV than there is"
        held = [block for block in self._blocks.values() if block.holders]
        idle = {name: block for name, block in self._blocks.items() if not block.holders}
        assert self._idle_blocks == len(idle), "idle blocks are counted"
        assert all(block.holders > 0 and not block.number for block in held), "held is not idle"
        entries = set(self._heap)
        assert all((block.score, block.number, name) in entries for name, block in idle.items()), (
            "whatever is idle can give way"
        )
        assert self.idle == sum(block.tokens for block in idle.values()), "idle tokens add up"
        assert self.shared == sum(block.tokens for block in held), "shared tokens add up"
        assert not self._gained.keys() & self._lost.keys(), "news are what is left on balance"
