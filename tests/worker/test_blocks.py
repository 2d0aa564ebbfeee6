"""The block pool: nothing is lost, and cached KV gives way by what its users' bands are worth."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.types import BLOCK_KEY_BYTES, Band
from headrace_worker.policy.blocks import KEEP_POOLS, BlockPool


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 9)), max_size=60))
@settings(max_examples=150, deadline=None)
def test_pool_never_loses_a_block(actions: list[tuple[int, int]]) -> None:
    """Any order of allocate, register, acquire, release, adopt and forget keeps the pool whole.

    What it tells of comings and goings is what is there.
    """
    pool = BlockPool(8)
    owned: list[list[int]] = []
    told: dict[bytes, None] = {}
    for action, choice in actions:
        table = owned[choice % len(owned)] if owned else None
        if action == 0 and pool.can_allocate(choice % 4):
            owned.append(pool.allocate(choice % 4))
        elif action == 1 and table:
            block = table[choice % len(table)]
            if pool.cached(block) is None:
                pool.register(block, bytes([choice]), b"", 0)
        elif action == 2 and table is not None:
            pool.acquire(table)
            owned.append(list(table))
        elif action == 3 and table is not None:
            owned.remove(table)
            pool.release(table, Band(choice % 3))
        elif action == 4 and pool.free_count and not pool.contains(bytes([choice])):
            assert pool.is_free(pool.adopt(bytes([choice]), b"", 0, Band(choice % 3), "t"))
        elif action == 5:
            pool.forget(table or range(choice % 8))
        pool.check_integrity(owned)
        if choice % 2:
            for key, came in pool.take_news().items():
                told.pop(key, None)
                told |= {key: None} if came else {}
            assert told.keys() == {bytes([n]) for n in range(10) if pool.contains(bytes([n]))}


def fill(pool: BlockPool, names: str, band: Band) -> list[int]:
    """A chain with a block for each letter, computed by a job of `band` that has ended."""
    blocks = pool.allocate(len(names))
    for depth, (block, name) in enumerate(zip(blocks, names, strict=True)):
        pool.register(block, name.encode(), b"", depth, band)
    pool.release(blocks, band)
    return blocks


def held(pool: BlockPool, names: str) -> str:
    return "".join(name for name in names if pool.contains(name.encode()))


def test_heads_outlive_tails() -> None:
    """When cached blocks have to give way, the end of a chain goes before its start."""
    pool = BlockPool(4)
    chain = fill(pool, "abc", Band.STANDARD)
    pool.allocate(1)  # the one that was never used
    assert pool.take_evicted() == ()
    pool.allocate(2)
    assert [evicted.depth for evicted in pool.take_evicted()] == [2, 1]
    assert pool.match_prefix([b"a"]) == [chain[0]]


def test_lower_bands_give_way_first() -> None:
    """Batch KV goes before older standard KV, and that before still older interactive KV."""
    pool = BlockPool(6)
    for names, band in [("ab", Band.INTERACTIVE), ("cd", Band.STANDARD), ("ef", Band.BATCH)]:
        fill(pool, names, band)
    left = [held(pool, "abcdef")]
    for _ in range(6):
        pool.allocate(1)
        left.append(held(pool, "abcdef"))
    assert left == ["abcdef", "abcde", "abcd", "abc", "ab", "a", ""]


def test_interactive_kv_that_nobody_asks_for_goes_as_well() -> None:
    """It outlives batch KV by two pools' worth of blocks, not for ever; one that is used stays."""
    pool = BlockPool(8)
    fill(pool, "a", Band.INTERACTIVE)
    fill(pool, "u", Band.INTERACTIVE)
    lived = 0
    while pool.contains(b"a"):
        pool.acquire(pool.match_prefix([b"u"]))
        pool.release(pool.match_prefix([b"u"]), Band.INTERACTIVE)
        fill(pool, chr(0x100 + lived), Band.BATCH)
        lived += 1
        assert lived < 100, "it stays for ever"
    keep = KEEP_POOLS[Band.INTERACTIVE] * pool.total
    assert keep < lived <= keep + pool.total + 1
    assert pool.contains(b"u")


def test_a_low_use_takes_nothing_from_a_block() -> None:
    """A batch job that passes over an interactive prompt leaves it as precious as it was."""
    pool = BlockPool(4)
    shared = fill(pool, "a", Band.INTERACTIVE)
    fill(pool, "b", Band.STANDARD)
    pool.acquire(shared)
    pool.release(shared, Band.BATCH)
    cached = pool.cached(shared[0])
    assert cached is not None and cached.band is Band.INTERACTIVE
    pool.allocate(3)
    assert held(pool, "ab") == "a"


@given(
    st.lists(
        st.tuples(st.integers(1, 5), st.integers(0, 2), st.sampled_from(list(Band))),
        min_size=1,
        max_size=40,
    )
)
@settings(max_examples=200, deadline=None)
def test_a_parent_never_goes_before_its_child(uses: list[tuple[int, int, Band]]) -> None:
    """Whoever uses how much of a chain, in which band: what is left of it can be found."""
    pool = BlockPool(6)
    for length, chain, band in uses:
        names = [bytes([chain, depth]) for depth in range(length)]
        found = pool.match_prefix(names)
        pool.acquire(found)
        fresh = pool.allocate(length - len(found))
        for depth, block in enumerate(fresh, len(found)):
            if not pool.contains(names[depth]):
                pool.register(block, names[depth], b"", depth, band)
        pool.release([*found, *fresh], band)
        pool.check_integrity([])
        for each in range(3):
            there = [pool.contains(bytes([each, depth])) for depth in range(5)]
            assert there == sorted(there, reverse=True), "a child without its parent"


def test_the_heap_stays_small() -> None:
    """A block that is used over and over leaves no trail of outdated entries."""
    pool = BlockPool(4)
    blocks = fill(pool, "abcd", Band.STANDARD)
    for _ in range(2_000):
        pool.acquire(blocks)
        pool.release(blocks, Band.BATCH)
    assert len(pool._heap) < 200
    pool.check_integrity([])


def test_news_are_netted() -> None:
    """What came and went since the last look is told once, as it is now."""
    pool = BlockPool(2)
    names = [bytes([n]) * 32 for n in range(3)]
    blocks = pool.allocate(2)
    for block, name in zip(blocks, names, strict=False):
        pool.register(block, name, b"", 0)
    pool.release(blocks, Band.BATCH)
    assert list(pool.take_news().items()) == [(name[:BLOCK_KEY_BYTES], True) for name in names[:2]]
    [again] = pool.allocate(1)
    pool.register(again, names[1], b"", 0)
    assert pool.take_news() == {names[1][:BLOCK_KEY_BYTES]: True}
    pool.release([again], Band.BATCH)
    pool.allocate(2)
    assert pool.take_news() == {name[:BLOCK_KEY_BYTES]: False for name in names[:2]}
    assert pool.take_news() == {}
