"""A simulated worker's KV: what running sequences hold and which prefix blocks can be reused.

Invariant: `private` + `shared` + `idle` tokens never exceed `total`. Private tokens belong to one
sequence; a prefix block that was computed is shared, with a count of its holders, and stays idle
when the last one goes, until its space is needed. Idle ones give way by the score of the worker's
own block pool (headrace_worker/policy/blocks.py): last use, and what the user's band is worth on
top. Blocks here are the trace's (512 tokens, say), so a long prompt costs a few operations; the
reports that leave the worker name them in the service's own blocks.
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


class KvCache:
    """`total` tokens of KV. `plain`: least recently used, whatever the band.

    With `reports`, it remembers what it gained and lost.
    """

    def __init__(self, total: int, *, plain: bool = False, reports: bool = True) -> None:
        self.total = total
        self._keep = tuple(0 if plain else pools * total for pools in KEEP_POOLS)
        self.private = 0
        self.shared = 0
        self.idle = 0
        self._holders: dict[int, int] = {}
        self._tokens: dict[int, int] = {}
        self._idle: dict[int, tuple[int, int]] = {}
        self._heap: list[tuple[int, int, int]] = []
        """(score, number, block); an entry that `_idle` does not confirm is outdated."""
        self._scores: dict[int, int] = {}
        self._numbers = 0
        self._handed_out = 0
        self._reports = reports
        self._news: dict[int, tuple[bool, int]] = {}

    @property
    def available(self) -> int:
        """Tokens that could be handed out now, idle blocks given up."""
        return self.total - self.private - self.shared

    def match(self, blocks: Sequence[PrefixBlock]) -> tuple[int, int, int]:
        """(blocks, tokens) of the longest prefix that is here, and how many of the tokens are idle.

        Takes no hold.
        """
        count = tokens = idle = 0
        for block, _ in blocks:
            size = self._tokens.get(block)
            if size is None:
                break
            count += 1
            tokens += size
            if block in self._idle:
                idle += size
        return count, tokens, idle

    def hold(self, blocks: Sequence[PrefixBlock]) -> None:
        """One more holder for each of these blocks, which are here."""
        for block, size in blocks:
            holders = self._holders.get(block, 0)
            if not holders:
                del self._idle[block]
                self.idle -= size
                self.shared += size
            self._holders[block] = holders + 1

    def reserve(self, tokens: int) -> None:
        """`tokens` more are somebody's own; idle blocks give way."""
        self.private += tokens
        self._handed_out += tokens
        while self.private + self.shared + self.idle > self.total:
            assert self._idle, "reserve only what is available"
            score, number, block = heappop(self._heap)
            if self._idle.get(block) == (score, number):
                del self._idle[block], self._scores[block]
                size = self._tokens.pop(block)
                self.idle -= size
                self._note(block, size, gained=False)

    def give_back(self, tokens: int) -> None:
        self.private -= tokens

    def computed(self, block: PrefixBlock) -> None:
        """A sequence's own tokens turned out to be `block`: it holds that from now on."""
        name, size = block
        self.private -= size
        if name in self._tokens:
            self.hold([block])
            return
        self._tokens[name] = size
        self._holders[name] = 1
        self._scores[name] = 0
        self.shared += size
        self._note(name, size, gained=True)

    def keep(self, block: int, tokens: int, band: int) -> None:
        """`tokens` that were somebody's own stay as an idle block, which nobody is told of."""
        self.private -= tokens
        self.shared += tokens
        self._tokens[block], self._holders[block], self._scores[block] = tokens, 1, 0
        self.release([(block, tokens)], band)

    def release(self, blocks: Sequence[PrefixBlock], band: int) -> None:
        """One holder less for each, given head first; `band` is that holder's."""
        score = self._handed_out + self._keep[band]
        for block, size in reversed(blocks):
            self._scores[block] = max(self._scores[block], score)
            holders = self._holders[block] - 1
            if holders:
                self._holders[block] = holders
                continue
            del self._holders[block]
            self._numbers += 1
            self._idle[block] = (self._scores[block], self._numbers)
            heappush(self._heap, (self._scores[block], self._numbers, block))
            self.shared -= size
            self.idle += size
        if len(self._heap) > 2 * len(self._idle) + STALE_ENTRIES_MIN:
            self._heap = [(*facts, block) for block, facts in self._idle.items()]
            heapify(self._heap)

    def held_alone(self, blocks: Sequence[PrefixBlock]) -> int:
        """Tokens of those of `blocks` that have a single holder."""
        return sum(size for block, size in blocks if self._holders[block] == 1)

    def _note(self, block: int, size: int, *, gained: bool) -> None:
        if not self._reports or block < 0:
            return
        if block in self._news and self._news[block][0] is not gained:
            del self._news[block]  # gained and lost, or lost and gained: no news
        else:
            self._news[block] = (gained, size)

    def take_news(self) -> tuple[list[PrefixBlock], list[PrefixBlock]]:
        """Blocks gained and blocks lost since the last call."""
        gained = [(block, size) for block, (new, size) in self._news.items() if new]
        lost = [(block, size) for block, (new, size) in self._news.items() if not new]
        self._news.clear()
        return gained, lost

    def check_integrity(self) -> None:
        assert min(self.private, self.shared, self.idle) >= 0, "a count fell below zero"
        assert self.private + self.shared + self.idle <= self.total, "more KV than there is"
        assert not self._holders.keys() & self._idle.keys(), "held blocks are not idle"
        assert self._tokens.keys() == self._holders.keys() | self._idle.keys(), "a block got lost"
        assert self._tokens.keys() == self._scores.keys(), "every block has a score"
        listed = {block for _, _, block in self._heap}
        assert self._idle.keys() <= listed, "whatever is idle can give way"
        assert self.idle == sum(self._tokens[b] for b in self._idle), "idle tokens add up"
        assert self.shared == sum(self._tokens[b] for b in self._holders), "shared tokens add up"
