"""The block pool: who owns which 16 tokens of KV, and which freed blocks can still be found.

Invariant: every block is either referenced by at least one sequence or stands in the free list,
never both; a hash names at most one block. A block whose last reference goes stays findable by
its hash until it is handed out again, so the free list doubles as the prefix cache and its order
(least recently used first) is the eviction order. Blocks of one sequence are freed tail first,
so that heads, which more requests share, live longer.

Rejected: a separate cache region with its own size, which wastes memory whenever the split is
wrong; a radix tree over tokens, which needs node splitting to say what chained hashes say.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(slots=True)
class CachedBlock:
    """What is known of a block with a hash. `depth` is its position in its chain, from 0.

    `offered`: the cache service has been offered it, or it came from there.
    """

    block: int
    hash: bytes
    parent: bytes
    depth: int
    offered: bool = False


class BlockPool:
    """`total` blocks with reference counts. Pure bookkeeping: it holds no KV."""

    def __init__(self, total: int) -> None:
        assert total > 0, "a pool has at least one block"
        self.total = total
        self._references = [0] * total
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(total))
        self._cached: dict[int, CachedBlock] = {}
        self._by_hash: dict[bytes, int] = {}
        self._evicted: list[CachedBlock] = []

    @property
    def free_count(self) -> int:
        """Blocks that could be allocated now, cached ones included."""
        return len(self._free)

    def can_allocate(self, count: int) -> bool:
        return count <= len(self._free)

    def allocate(self, count: int) -> list[int]:
        """`count` blocks with one reference each; the least recently used cached ones give way."""
        assert self.can_allocate(count), "allocate only what can_allocate allows"
        blocks = [self._free.popitem(last=False)[0] for _ in range(count)]
        for block in blocks:
            self._references[block] = 1
            cached = self._cached.pop(block, None)
            if cached is not None:
                del self._by_hash[cached.hash]
                self._evicted.append(cached)
        return blocks

    def take_evicted(self) -> tuple[CachedBlock, ...]:
        """The cached blocks that gave way since the last call; their KV stands until written."""
        evicted = tuple(self._evicted)
        self._evicted.clear()
        return evicted

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
        """How many of `blocks` stand in the free list: what acquiring them takes from it."""
        return sum(self._references[block] == 0 for block in blocks)

    def freed_by(self, blocks: Iterable[int]) -> int:
        """How many of `blocks` would become free if one reference to each went."""
        return sum(self._references[block] == 1 for block in blocks)

    def acquire(self, blocks: Iterable[int]) -> None:
        """One more reference to each of these resident blocks."""
        for block in blocks:
            if self._references[block] == 0:
                del self._free[block]
            self._references[block] += 1

    def release(self, blocks: Sequence[int]) -> None:
        """One reference less to each, given head first and freed tail first."""
        for block in reversed(blocks):
            assert self._references[block] > 0, "released more often than acquired"
            self._references[block] -= 1
            if self._references[block] == 0:
                self._free[block] = None
                # what nobody can find is the best candidate for reuse
                self._free.move_to_end(block, last=block in self._cached)

    def touch(self, blocks: Sequence[int]) -> None:
        """Makes free ones among `blocks` (head first) the most recently used."""
        for block in reversed(blocks):
            if self._references[block] == 0:
                self._free.move_to_end(block)

    def register(self, block: int, block_hash: bytes, parent: bytes, depth: int) -> None:
        """`block` is full and holds the KV that `block_hash` names.

        When another block holds the same already, that one stays the findable one.
        """
        assert self._references[block] > 0, "only an owned block can have been computed"
        assert block not in self._cached, "a block is registered once"
        if block_hash not in self._by_hash:
            self._by_hash[block_hash] = block
            self._cached[block] = CachedBlock(block, block_hash, parent, depth)

    def adopt(self, block_hash: bytes, parent: bytes, depth: int) -> int:
        """A free block that from now on is cached under `block_hash`; the caller fills it."""
        assert block_hash not in self._by_hash, "adopt only what is missing"
        [block] = self.allocate(1)
        self.register(block, block_hash, parent, depth)
        self._cached[block].offered = True
        self.release([block])
        return block

    def forget(self, blocks: Iterable[int]) -> None:
        """Makes `blocks` unfindable: what they hold cannot be trusted."""
        for block in blocks:
            cached = self._cached.pop(block, None)
            if cached is not None:
                del self._by_hash[cached.hash]
                if self._references[block] == 0:
                    self._free.move_to_end(block, last=False)

    def is_free(self, block: int) -> bool:
        return self._references[block] == 0

    def cached(self, block: int) -> CachedBlock | None:
        """What `block` is cached as, if it is."""
        return self._cached.get(block)

    def check_integrity(self, owned: Iterable[Sequence[int]] | None = None) -> None:
        """Free + referenced = total; with `owned` block tables, counts equal those tables'."""
        zero = {block for block, count in enumerate(self._references) if count == 0}
        assert min(self._references) >= 0, "a reference count fell below zero"
        assert zero == set(self._free), "free list and reference counts disagree"
        named = {cached.hash: block for block, cached in self._cached.items()}
        assert named == self._by_hash, "hash map and cached blocks disagree"
        if owned is not None:
            counts = [0] * self.total
            for table in owned:
                for block in table:
                    counts[block] += 1
            assert counts == self._references, "references without an owner"
