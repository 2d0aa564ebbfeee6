"""Blocks of 16 tokens in pages of 256: whatever sequences do, each reads its own, in order."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace_worker.attention.pages import PageMap

EACH = 4


class Memory:
    """Pages whose places hold (block, life) pairs, moved and written as a device would."""

    def __init__(self, blocks: int, pages: int) -> None:
        self.map = PageMap(blocks, pages, EACH)
        self.held: list[tuple[int, int] | None] = [None] * (pages * EACH)
        self.life = [0] * blocks

    def step(
        self, tables: list[list[int]], fresh: list[int], written: list[int] | None = None
    ) -> int:
        """Lays a step, moves, writes and reads; how many sequences are scattered."""
        written = fresh if written is None else written
        for block in written:
            self.life[block] += 1
        laid = self.map.lay(tables, set(written), fresh)
        self.map.check_integrity()
        targets = [to for _, to in laid.moves]
        assert len(targets) == len(set(targets)), "a place is written once"
        read = [self.held[source] for source, _ in laid.moves]
        for to, content in zip(targets, read, strict=True):
            self.held[to] = content
        for block in written:
            place = self.map.place(block)
            assert place is not None
            self.held[place] = (block, self.life[block])
        for table, pages in zip(tables, laid.pages, strict=True):
            self._read(table, pages)
        return sum(1 for pages in laid.pages if pages is None)

    def _read(self, table: list[int], pages: list[int] | None) -> None:
        for index, block in enumerate(table):
            place = (
                self.map.place(block)
                if pages is None
                else pages[index // EACH] * EACH + index % EACH
            )
            assert place is not None
            assert self.held[place] == (block, self.life[block]), "another block's content"


def test_a_sequence_fills_its_pages_in_order_and_nothing_moves() -> None:
    memory = Memory(blocks=16, pages=6)
    for length in range(1, 11):
        table = list(range(length))
        laid = memory.map.lay([table], {length - 1}, [length - 1])
        assert not laid.moves
        assert laid.pages == [sorted({memory.map.place(b) // EACH for b in table})]  # type: ignore[operator]
    memory.map.check_integrity()


def test_a_whole_page_that_is_shared_stands_once() -> None:
    """Two sequences with a common prefix of two pages read the same two."""
    memory = Memory(blocks=16, pages=8)
    memory.step([[0, 1, 2, 3, 4, 5, 6, 7, 8]], list(range(9)))
    laid = memory.map.lay([[0, 1, 2, 3, 4, 5, 6, 7, 8], [0, 1, 2, 3, 4, 5, 6, 7, 9]], {9}, [9])
    assert not laid.moves
    first, second = laid.pages
    assert first is not None and second is not None
    assert first[:2] == second[:2] and first[2] != second[2]


def test_who_parts_within_a_page_gets_copies_of_what_is_shared_of_it() -> None:
    memory = Memory(blocks=16, pages=8)
    memory.step([[0, 1, 2]], [0, 1, 2])
    laid = memory.map.lay([[0, 1, 2], [0, 1, 3]], {3}, [3])
    assert len(laid.moves) == 2
    first, second = laid.pages
    assert first != second


def test_when_pages_run_out_the_emptiest_gives_what_it_has_to_holes() -> None:
    """Three pages with a block each of old sequences; a new one of two pages needs two of them."""
    memory = Memory(blocks=8, pages=3)
    for block in range(3):
        memory.step([[block]], [block])
    table = [3, 4, 5, 6, 7]
    assert memory.step([table], table) == 0
    assert memory.step([[block] for block in range(3)], []) <= 3


def test_too_many_partings_are_told_as_scattered() -> None:
    """Five sequences that differ in the last block of a page need five pages; there are four."""
    memory = Memory(blocks=12, pages=4)
    shared = [0, 1, 2]
    memory.step([shared], shared)
    tables = [[*shared, 3 + i] for i in range(5)]
    assert memory.step(tables, [3, 4, 5, 6, 7]) > 0


def test_a_stored_block_is_found_and_a_forgotten_one_is_not() -> None:
    page_map = PageMap(8, 4, EACH)
    places = {page_map.store(block) for block in range(8)}
    assert len(places) == 8
    page_map.forget(3)
    assert page_map.place(3) is None
    page_map.check_integrity()


def test_a_map_that_is_too_small_is_a_bug() -> None:
    with pytest.raises(AssertionError):
        PageMap(8, 2, EACH)


class Engine:
    """Sequences as an engine has them, at random: blocks with owners, full ones shared by content.

    A block belongs to those who share it; freed ones keep their content until they are handed out
    again. Content is a chain of names, one a block.
    """

    def __init__(self, seed: int, blocks: int, spare: int) -> None:
        self.random = random.Random(seed)
        self.memory = Memory(blocks, -(-blocks // EACH) + spare)
        self.chains: dict[tuple[int, ...], int] = {}
        """What can be found: by the names up to it, the block that holds it."""
        self.owners = [0] * blocks
        self.sequences: list[tuple[list[int], list[int]]] = []
        """(names, blocks), of the same length."""
        self.names = 0
        self.fresh: list[int] = []

    def allocate(self) -> int | None:
        free = [block for block, owners in enumerate(self.owners) if not owners]
        if not free:
            return None
        block = self.random.choice(free)
        self.chains = {chain: held for chain, held in self.chains.items() if held != block}
        self.owners[block] = 1
        return block

    def begin(self) -> None:
        """A sequence that may go on from what can be found."""
        found = [c for c in self.chains if all(c[:i] in self.chains for i in range(1, len(c)))]
        said: list[int] = []
        if found and self.random.random() < 0.7:
            said = list(self.random.choice(found))
        table = [self.chains[tuple(said[:i])] for i in range(1, len(said) + 1)]
        for block in table:
            self.owners[block] += 1
        self.sequences.append((said, table))

    def end(self) -> None:
        _, table = self.sequences.pop(self.random.randrange(len(self.sequences)))
        for block in table:
            self.owners[block] -= 1

    def bring(self) -> None:
        """A block of a prefix comes from elsewhere."""
        block = self.allocate()
        if block is not None:
            self.owners[block] = 0
            memory = self.memory
            memory.life[block] += 1
            memory.held[memory.map.store(block)] = (block, memory.life[block])
            self.names += 1
            self.chains[self.names,] = block

    def grow(self, said: list[int], table: list[int]) -> bool:
        """A few blocks more; whether the last one is the sequence's own, as in every step."""
        for _ in range(self.random.choice([0, 1, 1, 2, 6])):
            block = self.allocate()
            if block is None:
                break
            self.names += 1
            table.append(block)
            said.append(self.names)
            self.fresh.append(block)
        return bool(table) and self.owners[table[-1]] == 1 and table[-1] not in self.chains.values()

    def step(self) -> None:
        self.fresh = []
        here = [s for s in self.sequences if self.random.random() < 0.7 and self.grow(*s)]
        last = [table[-1] for _, table in here]
        written = list(dict.fromkeys([*self.fresh, *last]))
        self.memory.step([table for _, table in here], self.fresh, written)
        for said, table in here:  # the last block is not full yet, and so not to be found
            for i in range(1, len(table)):
                self.chains.setdefault(tuple(said[:i]), table[i - 1])


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32), spare=st.integers(1, 6), blocks=st.sampled_from([12, 24, 40]))
def test_whatever_sequences_do_each_reads_its_own_blocks(
    seed: int, spare: int, blocks: int
) -> None:
    """They begin, share, grow, rest and end, in a pool that is full, with few pages to spare."""
    engine = Engine(seed, blocks, spare)
    for _ in range(40):
        action = engine.random.random()
        if action < 0.35 or not engine.sequences:
            engine.begin()
        elif action < 0.45:
            engine.end()
        elif action < 0.5:
            engine.bring()
        engine.step()
