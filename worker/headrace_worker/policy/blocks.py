"""The block pool: who owns which 16 tokens of KV, and which freed blocks can still be found.

Invariant: every block is either referenced by at least one sequence or free, never both; a hash
names at most one block. A block whose last reference goes stays findable by its hash until it is
handed out again, so the free blocks double as the prefix cache.

They give way by one score, the lowest first: when the block was used last, and what its user's band
is worth on top. Time is counted in blocks handed out, and a band better is worth a whole pool of
them: KV that batch work used goes first, but interactive KV that nobody asks for goes as well, when
so many others have come (the aging of GreedyDual-Size, Cao and Irani, "Cost-Aware WWW Proxy
Caching Algorithms", 1997). A use by a low band never lowers a score, so a block's parent, which is
used whenever the block is, never goes before it; blocks of one sequence go tail first.

Rejected: a separate cache region with its own size, which wastes memory whenever the split is
wrong; a list for each band, whose members cannot keep what an earlier user was worth; a radix tree
over tokens, which needs node splitting to say what chained hashes say.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heappush

from headrace.types import BLOCK_KEY_BYTES, Band

KEEP_POOLS = (2, 1, 0)
"""For how many pools' worth of blocks handed out a block outlives a plain one, by Band."""
STALE_ENTRIES_MIN = 64
"""The heap is rebuilt when it has more outdated entries than live ones, and more than this."""


@dataclass(slots=True)
class CachedBlock:
    """What is known of a block with a hash. `depth` is its position in its chain, from 0.

    `band`: the best of those that used it; `tenant`: whose job computed it. `score`: see above.
    `offered`: the cache service has been offered it, or it came from there.
    """

    block: int
    hash: bytes
    parent: bytes
    depth: int
    band: Band = Band.BATCH
    tenant: str = ""
    score: int = 0
    offered: bool = False


class BlockPool:
    """`total` blocks with reference counts. Pure bookkeeping: it holds no KV."""

    def __init__(self, total: int) -> None:
        assert total > 0, "a pool has at least one block"
        self.total = total
        self._references = [0] * total
        self._blank = dict.fromkeys(reversed(range(total)))
        """Free blocks that nobody can find, the next to be handed out last."""
        self._kept: dict[int, tuple[int, int]] = {}
        """Free blocks that can be found: their score and a number that breaks ties."""
        self._heap: list[tuple[int, int, int]] = []
        """(score, number, block); an entry that `_kept` does not confirm is outdated."""
        self._numbers = 0
        self._handed_out = 0
        self._cached: dict[int, CachedBlock] = {}
        self._by_hash: dict[bytes, int] = {}
        self._evicted: list[CachedBlock] = []
        self._news: dict[bytes, bool] = {}

    @property
    def free_count(self) -> int:
        """Blocks that could be allocated now, cached ones included."""
        return len(self._blank) + len(self._kept)

    def can_allocate(self, count: int) -> bool:
        return count <= self.free_count

    def allocate(self, count: int) -> list[int]:
        """`count` blocks with one reference each; the cached ones with the lowest scores go."""
        assert self.can_allocate(count), "allocate only what can_allocate allows"
        blocks = [self._next_free() for _ in range(count)]
        for block in blocks:
            self._references[block] = 1
        self._handed_out += count
        return blocks

    def _next_free(self) -> int:
        if self._blank:
            return self._blank.popitem()[0]
        while True:
            score, number, block = heappop(self._heap)
            if self._kept.get(block) == (score, number):
                del self._kept[block]
                self._evicted.append(self._unname(block))
                return block

    def _unname(self, block: int) -> CachedBlock:
        cached = self._cached.pop(block)
        del self._by_hash[cached.hash]
        self._tell(cached.hash, False)
        return cached

    def take_evicted(self) -> tuple[CachedBlock, ...]:
        """The cached blocks that gave way since the last call; their KV stands until written."""
        evicted = tuple(self._evicted)
        self._evicted.clear()
        return evicted

    def take_news(self) -> dict[bytes, bool]:
        """Block keys that came (True) or went (False) since the last call, the newest last."""
        news, self._news = self._news, {}
        return news

    def _tell(self, block_hash: bytes, came: bool) -> None:
        key = block_hash[:BLOCK_KEY_BYTES]
        self._news.pop(key, None)
        self._news[key] = came

    def contains(self, block_hash: bytes) -> bool:
        """Whether a block with this hash is resident. Safe from any thread."""
        return block_hash in self._by_hash

    def match_prefix(self, hashes: Iterable[bytes]) -> list[int]:
        """The blocks of the longest resident prefix of `hashes`; takes no reference."""
        blocks: list[int] = []
        for block_hash in hashes:
            block = self._by_hash.get(block_hash)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def unreferenced(self, blocks: Iterable[int]) -> int:
        """How many of `blocks` are free: what acquiring them takes from the free ones."""
        return sum(self._references[block] == 0 for block in blocks)

    def freed_by(self, blocks: Iterable[int]) -> int:
        """How many of `blocks` would become free if one reference to each went."""
        return sum(self._references[block] == 1 for block in blocks)

    def acquire(self, blocks: Iterable[int]) -> None:
        """One more reference to each of these resident blocks."""
        for block in blocks:
            if self._references[block] == 0:
                del self._kept[block]
            self._references[block] += 1

    def release(self, blocks: Sequence[int], band: Band) -> None:
        """One reference less to each, given head first; `band` is their user's."""
        for block in reversed(blocks):
            assert self._references[block] > 0, "released more often than acquired"
            self._references[block] -= 1
            self._note_use(block, band)
            if self._references[block] == 0:
                self._free(block)

    def _note_use(self, block: int, band: Band) -> None:
        cached = self._cached.get(block)
        if cached is not None:
            cached.band = min(cached.band, band)
            cached.score = max(cached.score, self._handed_out + KEEP_POOLS[band] * self.total)

    def _free(self, block: int) -> None:
        """Puts an unreferenced block where it belongs."""
        cached = self._cached.get(block)
        if cached is None:
            self._kept.pop(block, None)
            self._blank[block] = None
            return
        self._numbers += 1
        self._kept[block] = (cached.score, self._numbers)
        heappush(self._heap, (cached.score, self._numbers, block))
        if len(self._heap) > 2 * len(self._kept) + STALE_ENTRIES_MIN:
            self._heap = [(*facts, block) for block, facts in self._kept.items()]
            heapify(self._heap)

    def register(
        self,
        block: int,
        block_hash: bytes,
        parent: bytes,
        depth: int,
        band: Band = Band.STANDARD,
        tenant: str = "",
    ) -> None:
        """`block` is full and holds the KV that `block_hash` names, computed for `tenant`'s job.

        When another block holds the same already, that one stays the findable one.
        """
        assert self._references[block] > 0, "only an owned block can have been computed"
        assert block not in self._cached, "a block is registered once"
        if block_hash not in self._by_hash:
            self._by_hash[block_hash] = block
            self._cached[block] = CachedBlock(block, block_hash, parent, depth, band, tenant)
            self._tell(block_hash, True)

    def adopt(self, block_hash: bytes, parent: bytes, depth: int, band: Band, tenant: str) -> int:
        """A free block that from now on is cached under `block_hash`; the caller fills it."""
        assert block_hash not in self._by_hash, "adopt only what is missing"
        [block] = self.allocate(1)
        self.register(block, block_hash, parent, depth, band, tenant)
        self._cached[block].offered = True
        self.release([block], band)
        return block

    def forget(self, blocks: Iterable[int]) -> None:
        """Makes `blocks` unfindable: what they hold cannot be trusted."""
        for block in blocks:
            if block in self._cached:
                self._unname(block)
                if self._references[block] == 0:
                    self._free(block)

    def is_free(self, block: int) -> bool:
        return self._references[block] == 0

    def cached(self, block: int) -> CachedBlock | None:
        """What `block` is cached as, if it is."""
        return self._cached.get(block)

    def check_integrity(self, owned: Iterable[Sequence[int]] | None = None) -> None:
        """Free + referenced = total; with `owned` block tables, counts equal those tables'."""
        zero = {block for block, count in enumerate(self._references) if count == 0}
        assert min(self._references) >= 0, "a reference count fell below zero"
        assert zero == self._blank.keys() | self._kept.keys(), "free blocks and counts disagree"
        assert not self._blank.keys() & self._cached.keys(), "a findable block counts as blank"
        assert self._kept.keys() <= self._cached.keys(), "a kept block cannot be found"
        live = {(*facts, block) for block, facts in self._kept.items()}
        assert live <= set(self._heap), "a kept block can never give way"
        named = {cached.hash: block for block, cached in self._cached.items()}
        assert named == self._by_hash, "hash map and cached blocks disagree"
        if owned is not None:
            counts = [0] * self.total
            for table in owned:
                for block in table:
                    counts[block] += 1
            assert counts == self._references, "references without an owner"
