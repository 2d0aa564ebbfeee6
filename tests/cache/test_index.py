"""Keys to slots and facts, tiers that entries come to and leave, parents known only by name."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from cache.builders import hash_of
from headrace.frames import KV, PROMPT, EntryKey
from headrace.types import Band
from headrace_cache.index import OTHER_TENANTS, READABLE, TENANTS_MAX, Index, Record, Tier
from headrace_cache.policy.eviction import NO_SLOT


def key_of(name: object, kind: str = KV) -> EntryKey:
    return EntryKey(kind, hash_of(name))


def record(parent: object = None, depth: int = 0, **fields: int) -> Record:
    return Record(
        parent=b"" if parent is None else hash_of(parent),
        depth=depth,
        size_bytes=fields.get("size_bytes", 100),
        crc=fields.get("crc", 7),
        band=Band.STANDARD,
        tenant=fields.get("tenant", 0),
        cost_us=fields.get("cost_us", 5),
        layout=fields.get("layout", 1 << 63),
    )


def enter_chain(index: Index, name: str, length: int, tier: Tier = Tier.RAM) -> list[int]:
    return [
        index.enter(key_of((name, d)), record((name, d - 1) if d else None, d), tier, d)
        for d in range(length)
    ]


def test_a_run_ends_at_the_first_key_that_is_not_there() -> None:
    index = Index()
    slots = enter_chain(index, "a", 4)
    index.leave(slots[2], Tier.RAM)
    hashes = [hash_of(("a", depth)) for depth in range(4)]
    assert index.find_run(KV, hashes) == slots[:2]
    assert index.find_run(PROMPT, hashes) == []
    index.check_integrity()


def test_a_run_may_ask_for_one_tier_alone() -> None:
    index = Index()
    slots = enter_chain(index, "a", 3, Tier.DISK)
    index.place(slots[0], Tier.RAM, 40)
    hashes = [hash_of(("a", depth)) for depth in range(3)]
    assert index.find_run(KV, hashes, Tier.RAM) == slots[:1]
    assert index.find_run(KV, hashes, Tier.DISK) == slots
    assert (index.ram_place[slots[0]], index.disk_place[slots[0]]) == (40, 0)


def test_what_is_being_written_is_not_found() -> None:
    index = Index()
    slot = index.enter(key_of("a"), record(), Tier.PENDING)
    assert index.find(key_of("a")) == NO_SLOT
    assert index.find(key_of("a"), Tier.PENDING) == slot
    index.place(slot, Tier.RAM, 3)
    assert not index.leave(slot, Tier.PENDING)
    assert index.find(key_of("a")) == slot


def test_an_entry_is_forgotten_when_it_left_its_last_tier() -> None:
    index = Index()
    slot = index.enter(key_of("a"), record(), Tier.RAM, 1)
    index.place(slot, Tier.DISK, 2)
    assert not index.leave(slot, Tier.RAM)
    assert index.leave(slot, Tier.DISK)
    assert len(index) == 0
    assert index.enter(key_of("b"), record(), Tier.RAM) == slot, "its slot is used again"
    index.check_integrity()


def test_what_was_said_of_an_entry_is_kept() -> None:
    index = Index()
    enter_chain(index, "a", 1)
    said = record(("a", 0), 1, crc=0xFFFFFFFF, size_bytes=1 << 25, cost_us=9, layout=(1 << 64) - 1)
    slot = index.enter(key_of("b"), said, Tier.RAM)
    index.enter(key_of("b"), record(), Tier.DISK)
    assert index.record(slot) == said, "who comes second changes nothing"
    assert index.key(slot) == key_of("b")
    facts = index.facts(slot, 4096)
    assert (facts.size_bytes, facts.parent, facts.cost_us, facts.depth) == (4096, 0, 9, 1)
    assert facts.name == int.from_bytes(hash_of("b")[:8])


def test_a_parent_that_comes_late_finds_its_children() -> None:
    index = Index()
    child = index.enter(key_of("child"), record("parent", 1), Tier.RAM)
    assert index.find(key_of("parent")) == NO_SLOT
    parent = index.enter(key_of("parent"), record(), Tier.RAM)
    assert (index.parent[child], index.children[parent]) == (parent, 1)


def test_a_parent_that_never_came_is_forgotten_with_its_last_child() -> None:
    index = Index()
    slots = [index.enter(key_of(n), record("parent", 1), Tier.RAM) for n in range(2)]
    assert len(index) == 3
    for slot in slots:
        index.leave(slot, Tier.RAM)
    assert len(index) == 0
    index.check_integrity()


def test_entries_that_claim_to_be_each_others_parents_are_not_linked_in_a_ring() -> None:
    """A ring would hold its bytes for ever, whoever sent it."""
    index = Index()
    index.enter(key_of("self"), record("self", 5), Tier.RAM)
    index.enter(key_of("a"), record("b", 1), Tier.RAM)
    index.enter(key_of("b"), record("a", 1), Tier.RAM)
    index.check_integrity()
    for slot in range(len(index)):
        steps = 0
        while (slot := index.parent[slot]) != NO_SLOT:
            steps += 1
            assert steps < 3


def test_tenants_are_numbered_up_to_a_limit() -> None:
    index = Index()
    numbers = [index.tenant(f"t{n}") for n in range(TENANTS_MAX + 5)]
    assert numbers[:3] == [0, 1, 2]
    assert len(set(numbers)) == TENANTS_MAX + 1
    assert index.tenant_name(numbers[-1]) == OTHER_TENANTS
    assert index.tenant("t1") == 1


@pytest.mark.parametrize("tiers", [READABLE, Tier.RAM])
def test_entries_can_be_gone_through_from_any_slot(tiers: int) -> None:
    index = Index()
    slots = enter_chain(index, "a", 5)
    index.leave(slots[4], Tier.RAM)
    assert list(index.entries(0, tiers)) == slots[:4]
    assert list(index.entries(2, tiers)) == slots[2:4]


class IndexAgainstADictionary(RuleBasedStateMachine):
    """Names 0 to 9, each the child of its half; tiers come and go in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.index = Index()
        self.lies: dict[int, dict[Tier, int]] = {}

    @rule(name=st.integers(0, 9), depth=st.integers(0, 3), tier=st.sampled_from(list(Tier)),
          place=st.integers(0, 1 << 40))  # fmt: skip
    def enter(self, name: int, depth: int, tier: Tier, place: int) -> None:
        self.index.enter(key_of(name), record(name // 2, depth), tier, place)
        self.lies.setdefault(name, {})[tier] = place

    @precondition(lambda self: self.lies)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.lies)))
        tier = data.draw(st.sampled_from(sorted(self.lies[name])))
        slot = self.index.find(key_of(name), tier)
        del self.lies[name][tier]
        assert self.index.leave(slot, tier) == (not self.lies[name])
        if not self.lies[name]:
            del self.lies[name]

    @invariant()
    def agrees(self) -> None:
        self.index.check_integrity()
        for name in range(10):
            slot = self.index.find(key_of(name), 7)
            assert (slot != NO_SLOT) == (name in self.lies)
            for tier, column in (
                (Tier.RAM, self.index.ram_place),
                (Tier.DISK, self.index.disk_place),
            ):
                if tier in self.lies.get(name, {}):
                    assert column[slot] == self.lies[name][tier]


TestIndexAgainstADictionary = IndexAgainstADictionary.TestCase
TestIndexAgainstADictionary.settings = settings(max_examples=60, stateful_step_count=30)
