"""What holds for every policy: leaves first, pins, tenants' shares. No store, bytes or clock."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.types import Band
from headrace_cache.policy.eviction import NO_SLOT, NOT_PINNED, EvictionPolicy, Facts
from headrace_cache.policy.names import POLICIES

SIZE = 1000

every_policy = pytest.mark.parametrize("name", POLICIES)


def facts(band: Band = Band.STANDARD, **fields: Any) -> Facts:
    return Facts(**({"size_bytes": SIZE, "band": band, "cost_us": 10_000} | fields))


def admit_chain(policy: EvictionPolicy, first: int, length: int, **fields: Any) -> list[int]:
    """Slots from `first` on, each the child of the one before."""
    slots = list(range(first, first + length))
    for depth, slot in enumerate(slots):
        parent = slot - 1 if depth else NO_SLOT
        policy.admit(slot, facts(parent=parent, depth=depth, name=slot, **fields), 0)
    return slots


def leave(policy: EvictionPolicy, count: int, now_ms: int = 0, **options: Any) -> list[int]:
    """The slots of the next `count` victims."""
    victims = policy.victims(count * SIZE, now_ms, **options)
    policy.check_integrity()
    return [victim.slot for victim in victims]


@every_policy
def test_a_chain_leaves_from_its_tail(name: str) -> None:
    policy = POLICIES[name](None)
    admit_chain(policy, 0, 4)
    assert leave(policy, 4) == [3, 2, 1, 0]


@every_policy
def test_a_parent_that_comes_after_its_child_is_protected_too(name: str) -> None:
    policy = POLICIES[name](None)
    policy.admit(7, facts(parent=3, depth=1), 0)
    policy.admit(3, facts(), 0)
    assert leave(policy, 2) == [7, 3]


@every_policy
def test_removing_the_middle_of_a_chain_leaves_both_ends_evictable(name: str) -> None:
    policy = POLICIES[name](None)
    admit_chain(policy, 0, 3)
    policy.remove(1)
    policy.check_integrity()
    assert set(leave(policy, 2)) == {0, 2}


@every_policy
def test_a_slot_is_used_again_for_another_entry(name: str) -> None:
    policy = POLICIES[name](None)
    admit_chain(policy, 0, 2)
    assert leave(policy, 2) == [1, 0]
    policy.admit(1, facts(), 0)
    assert leave(policy, 2) == [1]


@every_policy
def test_a_pinned_entry_and_its_ancestors_stay_until_the_pin_ends(name: str) -> None:
    policy = POLICIES[name](None)
    admit_chain(policy, 0, 3)
    admit_chain(policy, 10, 3)
    assert policy.pin(1, 1000)
    assert policy.pinned_bytes == 2 * SIZE
    assert sorted(leave(policy, 6, now_ms=999)) == [2, 10, 11, 12]
    assert (policy.pinned_until_ms(1), policy.pinned_until_ms(0)) == (1000, NOT_PINNED)
    assert leave(policy, 6, now_ms=1000) == [1, 0]
    assert policy.pinned_bytes == 0


@every_policy
def test_a_pin_can_be_taken_back_or_made_longer(name: str) -> None:
    policy = POLICIES[name](None)
    for slot in range(3):
        policy.admit(slot, facts(), 0)
        policy.pin(slot, 1000)
    policy.pin(0, 2000)
    policy.unpin(1)
    policy.unpin(1)
    assert leave(policy, 3, now_ms=500) == [1]
    assert leave(policy, 3, now_ms=1500) == [2]
    assert leave(policy, 3, now_ms=2000) == [0]


@every_policy
def test_pins_hold_no_more_than_their_share(name: str) -> None:
    """Ancestors count: they stay because of the pin."""
    policy = POLICIES[name](3 * SIZE)
    admit_chain(policy, 0, 2)
    admit_chain(policy, 10, 2)
    assert policy.pin(1, 1000)
    assert not policy.pin(11, 1000), "four entries would stay"
    assert policy.pin(10, 1000)
    assert policy.pin(0, 1000), "it stays anyway"
    assert policy.pinned_bytes == 3 * SIZE
    policy.check_integrity()


@every_policy
def test_an_ancestor_that_comes_late_ends_the_pin_that_ends_soonest(name: str) -> None:
    policy = POLICIES[name](2 * SIZE)
    policy.admit(1, facts(parent=0, depth=1), 0)
    policy.admit(5, facts(), 0)
    assert policy.pin(1, 2000) and policy.pin(5, 1000)
    policy.admit(0, facts(), 0)
    policy.check_integrity()
    assert policy.pinned_until_ms(5) == NOT_PINNED
    assert leave(policy, 3) == [5]


@every_policy
def test_what_a_reader_holds_is_passed_over_and_can_leave_later(name: str) -> None:
    policy = POLICIES[name](None)
    for slot in range(4):
        policy.admit(slot, facts(), 0)
    assert set(leave(policy, 4, allowed=lambda slot: slot not in (0, 2))) == {1, 3}
    assert set(leave(policy, 4)) == {0, 2}


@every_policy
def test_only_who_has_something_to_spare_loses_entries(name: str) -> None:
    policy = POLICIES[name](None)
    for slot in range(9):
        policy.admit(slot, facts(tenant=slot % 3), 0)
    spare = {1: SIZE + 1, 2: 0}
    gone = leave(policy, 9, spare=spare)
    assert len(gone) == 2, "while anything is left of its share: at most one entry too much"
    assert {slot % 3 for slot in gone} == {1}
    assert spare == {1: 1 - SIZE, 2: 0}
    assert len(leave(policy, 9)) == 7


Step = tuple[str, int, int, Band, int]

STEPS = st.lists(
    st.tuples(
        st.sampled_from(["admit", "admit", "admit", "touch", "remove", "victims", "pin", "unpin"]),
        st.integers(0, 15),
        st.integers(-1, 15),
        st.sampled_from(Band),
        st.integers(1, 5_000),
    ),
    max_size=60,
)


class Model:
    """Knows residents, their parents and pins, and nothing else."""

    def __init__(self) -> None:
        self.residents: dict[int, Facts] = {}
        self.pins: dict[int, int] = {}

    def holds(self, slot: int, now_ms: int) -> bool:
        """Whether `slot` may not leave."""
        return self.pins.get(slot, 0) > now_ms or any(
            entry.parent == slot for entry in self.residents.values()
        )

    def drop(self, slot: int) -> Facts:
        self.pins.pop(slot, None)
        return self.residents.pop(slot)


@every_policy
@given(steps=STEPS)
def test_any_program_evicts_only_what_may_leave_and_enough_of_it(
    name: str, steps: list[Step]
) -> None:
    policy = POLICIES[name](20_000)
    model = Model()
    for now_ms, (what, slot, other, band, amount) in enumerate(steps):
        if what == "admit" and slot not in model.residents:
            # a parent has a lower number: links form no ring, and some parents come late or never
            parent = other if other < slot else NO_SLOT
            entry = facts(band, size_bytes=amount, parent=parent, tenant=amount % 3,
                          cost_us=amount % 7, name=slot)  # fmt: skip
            policy.admit(slot, entry, now_ms)
            model.residents[slot] = entry
            model.pins = {s: u for s, u in model.pins.items() if policy.pinned_until_ms(s) == u}
        elif what == "touch" and slot in model.residents:
            policy.touch(slot, now_ms, band)
        elif what == "remove" and slot in model.residents:
            policy.remove(slot)
            model.drop(slot)
        elif what == "pin" and slot in model.residents and policy.pin(slot, amount % 60):
            model.pins[slot] = amount % 60
        elif what == "unpin":
            policy.unpin(slot)
            model.pins.pop(slot, None)
        elif what == "victims":
            check_victims(policy, model, amount, other, now_ms)
        policy.check_integrity()


def check_victims(
    policy: EvictionPolicy, model: Model, size_bytes: int, other: int, now_ms: int
) -> None:
    """One call: with a slot that is held, for one tenant, or for anybody."""
    spare = {1: size_bytes} if other % 3 == 1 else None
    freed_bytes = 0
    for victim in policy.victims(size_bytes, now_ms, lambda slot: slot != other, spare):
        assert freed_bytes < size_bytes, "no more than needed"
        assert victim.slot != other, "it was held"
        assert not model.holds(victim.slot, now_ms), "no resident child, no pin"
        gone = model.drop(victim.slot)
        assert spare is None or gone.tenant == 1, "it had something to spare"
        assert victim.size_bytes == gone.size_bytes
        assert victim.reason
        freed_bytes += gone.size_bytes
    left = [
        slot
        for slot, entry in model.residents.items()
        if not model.holds(slot, now_ms) and slot != other and (spare is None or entry.tenant == 1)
    ]
    assert freed_bytes >= size_bytes or not left, "it gave all it could"
