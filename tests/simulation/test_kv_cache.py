"""The simulated KV cache: what is held, what can be found again, who gives way."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from headrace.types import Band
from headrace_sim.kv_cache import KvCache, PrefixBlock

TOTAL = 1_024


def fill(cache: KvCache, *blocks: PrefixBlock, band: Band = Band.STANDARD) -> None:
    """A sequence that computes `blocks` and ends."""
    cache.reserve(sum(size for _, size in blocks))
    for block in blocks:
        cache.computed(block)
    cache.release(blocks, band)


def test_the_least_recently_used_goes_first_and_tails_before_heads() -> None:
    cache = KvCache(TOTAL)
    fill(cache, (1, 512), (2, 256))
    fill(cache, (3, 256))
    cache.reserve(256)
    assert cache.match([(1, 512), (2, 256)]) == (1, 512, 512)
    assert cache.match([(3, 256)])[0] == 1
    cache.reserve(512)
    assert cache.match([(1, 512)])[0] == 0


def test_batch_gives_way_before_what_is_older_but_interactive() -> None:
    cache = KvCache(TOTAL)
    fill(cache, (1, 512), band=Band.INTERACTIVE)
    fill(cache, (2, 512), band=Band.BATCH)
    cache.reserve(16)
    assert [cache.match([(block, 512)])[0] for block in (1, 2)] == [1, 0]
    plain = KvCache(TOTAL, plain=True)
    fill(plain, (1, 512), band=Band.INTERACTIVE)
    fill(plain, (2, 512), band=Band.BATCH)
    plain.reserve(16)
    assert [plain.match([(block, 512)])[0] for block in (1, 2)] == [0, 1]


def test_two_that_compute_the_same_share_one_block() -> None:
    cache = KvCache(TOTAL)
    cache.reserve(512)
    cache.computed((1, 256))
    cache.computed((1, 256))
    assert (cache.shared, cache.private) == (256, 0)
    assert cache.held_alone([(1, 256)]) == 0
    cache.release([(1, 256)], Band.STANDARD)
    assert cache.held_alone([(1, 256)]) == 256


def test_news_are_told_once_and_cancel_out() -> None:
    cache = KvCache(TOTAL)
    fill(cache, (1, 512))
    fill(cache, (2, 512))
    assert cache.take_news() == ([(1, 512), (2, 512)], [])
    fill(cache, (3, 512))
    cache.reserve(1_024)
    assert cache.take_news() == ([], [(1, 512), (2, 512)])
    assert cache.take_news() == ([], [])


class Cache(RuleBasedStateMachine):
    """Sequences come, compute, and go in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.cache = KvCache(TOTAL)
        self.held: list[tuple[tuple[PrefixBlock, ...], int]] = []
        self.rests = 0

    @rule(chain=st.integers(0, 3), count=st.integers(0, 4), own=st.integers(0, 12))
    def start(self, chain: int, count: int, own: int) -> None:
        blocks = tuple((10 * chain + n, 64) for n in range(count))
        found, _, idle = self.cache.match(blocks)
        needed = 16 * own + 64 * (count - found)
        if needed > self.cache.available - idle:
            return
        self.cache.hold(blocks[:found])
        self.cache.reserve(needed)
        for block in blocks[found:]:
            self.cache.computed(block)
        self.held.append((blocks, 16 * own))

    @precondition(lambda self: self.held)
    @rule(place=st.integers(0, 100), band=st.sampled_from(Band), keep=st.booleans())
    def end(self, place: int, band: Band, keep: bool) -> None:
        blocks, own = self.held.pop(place % len(self.held))
        self.cache.release(blocks, band)
        if keep and own:
            self.rests -= 1
            self.cache.keep(self.rests, own, band)
        else:
            self.cache.give_back(own)

    @invariant()
    def adds_up(self) -> None:
        self.cache.check_integrity()
        assert self.cache.private == sum(own for _, own in self.held)


Cache.TestCase.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)
TestCache = Cache.TestCase
