"""Whose entries make room, with a real policy that chooses among them; blocks are 10 bytes."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.types import Band
from headrace_cache.policy.eviction import EvictionPolicy, Facts
from headrace_cache.policy.names import POLICIES
from headrace_cache.policy.quota import Call, Quotas, Share

BLOCK = 10


class House:
    """Quotas and a policy, put together as a store does it; entries have neither key nor bytes."""

    def __init__(self, quotas: Quotas, policy: EvictionPolicy | None = None) -> None:
        self.quotas = quotas
        self.policy = POLICIES["keep-score"](None) if policy is None else policy
        self.owner: dict[int, int] = {}
        self.reasons: list[str] = []
        self._next = 0

    def put(self, tenant: int, band: Band = Band.STANDARD, size_bytes: int = BLOCK) -> bool:
        """Whether the entry is in now."""
        if not self.quotas.can_hold(tenant, size_bytes):
            return False
        slot, self._next = self._next, self._next + 1
        self.policy.admit(slot, Facts(size_bytes, band, tenant=tenant, name=slot << 40), slot)
        outranked = False

        def take(call: Call) -> bool:
            nonlocal outranked
            self.reasons.append(call.reason)
            for victim in self.policy.victims(call.size_bytes, slot, None, call.spare):
                if victim.slot == slot:
                    outranked = True
                else:
                    self.quotas.gave(self.owner.pop(victim.slot), victim.size_bytes)
            return not outranked

        if self.quotas.make_room(tenant, size_bytes, take):
            self.owner[slot] = tenant
            self.quotas.took(tenant, size_bytes)
            return True
        if not outranked:
            self.policy.remove(slot)
        return False

    def fill(self, tenant: int, count: int) -> None:
        for _ in range(count):
            self.put(tenant)

    def check_integrity(self) -> None:
        self.quotas.check_integrity()
        self.policy.check_integrity()
        counted = dict.fromkeys(self.owner.values(), 0)
        for tenant in self.owner.values():
            counted[tenant] += 1
        assert set(counted) == set(self.quotas.usage())


def house(blocks: int, **shares: Share) -> House:
    """`t1=Share(…)` grants tenant 1 that share."""
    quotas = Quotas(blocks * BLOCK)
    for name, share in shares.items():
        assert not quotas.refusal(int(name[1:]), share)
        quotas.grant(int(name[1:]), share)
    return House(quotas, POLICIES["lru"](None))


def test_without_shares_the_least_worthy_leaves_whosever_it_is() -> None:
    h = house(4)
    h.fill(1, 3)
    h.fill(2, 3)
    assert (h.quotas.used_by(1), h.quotas.used_by(2)) == (BLOCK, 3 * BLOCK)


def test_a_tenant_at_its_quota_pays_with_its_own_entries() -> None:
    h = house(10, t1=Share(max_bytes=3 * BLOCK))
    h.fill(2, 2)
    h.fill(1, 20)
    assert (h.quotas.used_by(1), h.quotas.used_by(2)) == (3 * BLOCK, 2 * BLOCK)
    assert "own quota" in h.reasons[-1]


def test_an_entry_larger_than_the_quota_is_not_taken() -> None:
    h = house(10, t1=Share(max_bytes=3 * BLOCK))
    h.fill(1, 3)
    assert not h.put(1, size_bytes=4 * BLOCK)
    assert h.quotas.used_by(1) == 3 * BLOCK, "and nobody left for it"


def test_a_minimum_is_left_alone_while_others_are_above_their_own() -> None:
    h = house(6, t1=Share(min_bytes=3 * BLOCK))
    h.fill(1, 3)
    h.fill(2, 50)
    assert (h.quotas.used_by(1), h.quotas.used_by(2)) == (3 * BLOCK, 3 * BLOCK)


def test_what_may_be_turned_away_costs_nobody_its_minimum() -> None:
    """Room for an entry of a tenant at its minimum is others' to make: it may be refused yet."""
    h = house(10, t1=Share(min_bytes=5 * BLOCK))
    h.fill(1, 5)
    h.fill(2, 5)
    spares: list[dict[int, int]] = []

    def refuse(call: Call) -> bool:
        spares.append(dict(call.spare or {}))
        return False

    for tenant in (1, 2):
        h.quotas.make_room(tenant, 2 * BLOCK, refuse)
        in_pieces = h.quotas.in_pieces(tenant, 2 * BLOCK)
        assert in_pieces.spare == spares[-1]
    assert spares == [{2: 5 * BLOCK}, {2: 7 * BLOCK}]


def test_who_comes_late_still_gets_its_minimum() -> None:
    h = house(6, t1=Share(min_bytes=3 * BLOCK), t2=Share(min_bytes=2 * BLOCK))
    h.fill(3, 6)
    h.fill(1, 3)
    h.fill(2, 2)
    h.fill(3, 50)
    assert [h.quotas.used_by(t) for t in (1, 2, 3)] == [3 * BLOCK, 2 * BLOCK, BLOCK]


def test_a_quota_that_was_lowered_makes_its_owner_the_first_to_give() -> None:
    h = house(6)
    h.fill(2, 3)
    h.fill(1, 3)
    h.quotas.grant(1, Share(max_bytes=2 * BLOCK))
    assert h.quotas.excess(1) == BLOCK
    assert h.put(3)
    assert [h.quotas.used_by(t) for t in (1, 2, 3)] == [2 * BLOCK, 3 * BLOCK, BLOCK]
    assert "above their quota" in h.reasons[-1]


def test_room_is_made_down_to_the_low_watermark_in_one_go() -> None:
    h = House(Quotas(100 * BLOCK, high=0.9, low=0.8))
    h.fill(1, 90)
    assert not h.reasons
    h.put(1)
    assert h.quotas.used_bytes == 80 * BLOCK
    assert len(h.reasons) == 1


def test_what_is_pinned_is_passed_over_and_then_there_is_no_room() -> None:
    h = house(2)
    h.fill(1, 2)
    for slot in h.owner:
        h.policy.pin(slot, 1000)
    h.policy.admit(99, Facts(BLOCK, Band.STANDARD, tenant=2), 0)
    assert not h.quotas.make_room(2, BLOCK, lambda call: not h.policy.victims(
        call.size_bytes, 5, lambda slot: slot != 99, call.spare))  # fmt: skip
    assert h.quotas.used_by(1) == 2 * BLOCK


@pytest.mark.parametrize(
    ("share", "part"),
    [
        (Share(max_bytes=10, min_bytes=20), "exceeds the quota"),
        (Share(min_bytes=61), "minimums of 101 bytes exceed 100"),
        (Share(max_bytes=-1), "negative"),
    ],
)
def test_a_share_that_cannot_be_kept_is_refused(share: Share, part: str) -> None:
    quotas = Quotas(100)
    quotas.grant(1, Share(min_bytes=40))
    assert part in quotas.refusal(2, share)


@pytest.mark.parametrize("name", ["keep-score", "lru"])
def test_three_tenants_at_the_watermark(name: str) -> None:
    """One puts ten times as much as the others, one has a quota, one a minimum; for a long time."""
    rng = random.Random(name)
    h = House(Quotas(200 * BLOCK, high=0.95, low=0.9), POLICIES[name](None))
    h.quotas.grant(1, Share(max_bytes=40 * BLOCK))
    h.quotas.grant(2, Share(min_bytes=50 * BLOCK))
    for turn in range(3_000):
        h.put(rng.choices(range(3), weights=(10, 1, 1))[0], rng.choice(list(Band)))
        assert h.quotas.used_bytes <= h.quotas.high_bytes
        assert h.quotas.used_by(1) <= 40 * BLOCK
        assert turn < 1_500 or h.quotas.used_by(2) >= 49 * BLOCK, "within one entry"
    assert h.quotas.used_by(0) > 60 * BLOCK, "what is left is for who needs it"
    h.check_integrity()


SHARES = st.dictionaries(
    st.integers(0, 2),
    st.tuples(st.integers(2, 12), st.integers(0, 4)).map(
        lambda pair: Share(pair[0] * BLOCK, min(pair) * BLOCK)
    ),
)
PUTS = st.lists(
    st.tuples(st.integers(0, 2), st.sampled_from(Band), st.integers(1, 2 * BLOCK)), max_size=80
)


@given(shares=SHARES, puts=PUTS)
def test_quotas_and_minimums_hold_whatever_comes(
    shares: dict[int, Share], puts: list[tuple[int, Band, int]]
) -> None:
    """No quota exceeded, nobody lost what its minimum covers, to others or for what was refused."""
    h = House(Quotas(12 * BLOCK))
    for tenant, share in shares.items():
        h.quotas.grant(tenant, share)
    for tenant, band, size_bytes in puts:
        before = {who: h.quotas.used_by(who) for who in range(3)}
        put = h.put(tenant, band, size_bytes)
        assert h.quotas.used_bytes <= 12 * BLOCK
        for who in range(3):
            share, used = h.quotas.share_of(who), h.quotas.used_by(who)
            assert share.max_bytes is None or used <= share.max_bytes
            if used < before[who] and (who != tenant or not put):
                assert used > share.min_bytes - 2 * BLOCK, "within one entry"
        h.check_integrity()
