"""Which of several cache services keeps which blocks: groups, orders, heat, copies."""

from __future__ import annotations

import random
from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.policy.cache_nodes import (
    COPIED_MAX,
    HALF_LIFE_MS,
    HEAT_GROUPS_MAX,
    HOT_READS,
    Chooser,
    Heat,
    Node,
    Placement,
    groups,
)
from headrace.policy.hashing import (
    GROUP_BLOCKS,
    HASH_BYTES,
    block_hashes,
    group_of,
    next_hash,
    root_hash,
)
from headrace.types import BLOCK_TOKENS

GROUPS = [number.to_bytes(4) for number in random.Random(5).sample(range(1 << 32), 3_000)]


def hashes_of(seed: int, blocks: int) -> list[bytes]:
    rng = random.Random(seed)
    tokens = [rng.randrange(1 << 16) for _ in range(blocks * BLOCK_TOKENS)]
    return block_hashes(root_hash("model", b"salt"), tokens)


def named(*names: str) -> list[Node]:
    return [Node(name) for name in names]


def always(_: str) -> bool:
    return True


def test_a_chain_is_cut_into_groups_that_any_part_of_it_knows() -> None:
    """64 blocks have one name, the next 64 another, and a reader that begins late sees the same."""
    hashes = hashes_of(1, 200)
    assert len(set(hashes)) == 200 and all(len(each) == HASH_BYTES for each in hashes)
    cut = groups(hashes)
    assert [(first, last) for _, first, last in cut] == [(0, 64), (64, 128), (128, 192), (192, 200)]
    assert len({name for name, _, _ in cut}) == 4
    late = groups(hashes[100:])
    assert [name for name, _, _ in late] == [name for name, _, _ in cut[1:]]
    assert group_of(hashes[99]) == cut[1][0]


def test_chains_that_part_within_a_group_stay_together_and_others_do_not() -> None:
    """What two chains share lies in one place, so a fork costs no copy."""
    one = hashes_of(1, GROUP_BLOCKS)
    fork = next_hash(one[9], [7] * BLOCK_TOKENS)
    assert fork != one[10] and group_of(fork) == group_of(one[10])
    assert group_of(hashes_of(2, 1)[0]) != group_of(one[0])


@given(st.binary(min_size=HASH_BYTES, max_size=HASH_BYTES), st.integers(0, 3))
def test_any_hash_has_a_group_and_a_child(parent: bytes, token: int) -> None:
    """Hashes that others made up are placed like ours: nothing depends on their form."""
    child = next_hash(parent, [token] * BLOCK_TOKENS)
    assert len(child) == HASH_BYTES and child[-1] == (parent[-1] + 1) % GROUP_BLOCKS
    assert (group_of(child) == group_of(parent)) or child[-1] == 0


def test_a_new_node_takes_its_share_and_moves_nothing_else() -> None:
    """Of four nodes the fourth gets a quarter; what does not go there stays where it is."""
    before, after = Placement(named("a", "b", "c")), Placement(named("d", "c", "b", "a"))
    moved = [group for group in GROUPS if before.order(group)[0] != after.order(group)[0]]
    assert all(after.order(group)[0] == "d" for group in moved)
    assert 0.22 < len(moved) / len(GROUPS) < 0.28
    for group in GROUPS[:200]:
        assert [name for name in after.order(group) if name != "d"] == list(before.order(group))


def test_a_node_of_twice_the_memory_gets_twice_the_groups() -> None:
    placement = Placement([Node("small", 1e9), Node("large", 2e9)])
    share = Counter(placement.order(group)[0] for group in GROUPS)
    assert 1.8 < share["large"] / share["small"] < 2.25


@settings(max_examples=50)
@given(st.lists(st.text(max_size=8), max_size=8), st.binary(min_size=4, max_size=4))
def test_the_order_depends_on_the_set_alone(names: list[str], group: bytes) -> None:
    """Whoever knows the same nodes, in whatever order it heard of them, agrees."""
    one, other = Placement(named(*names)), Placement(named(*reversed(names)))
    assert one.order(group) == other.order(group)
    assert sorted(one.order(group)) == sorted(set(names))


def test_what_is_read_often_gets_hot_and_cools() -> None:
    heat = Heat()
    hot = [heat.note(b"g", 1_000 * turn) for turn in range(12)]
    assert not hot[0] and hot[-1]
    assert hot.index(True) >= HOT_READS - 1
    assert heat.is_hot(b"g", 12_000) and not heat.is_hot(b"g", 12_000 + HALF_LIFE_MS)
    assert not heat.is_hot(b"other", 12_000)


def test_heat_and_copies_are_bounded() -> None:
    """The group read longest ago is forgotten first."""
    chooser = Chooser(named("a", "b"))
    for number in range(HEAT_GROUPS_MAX + 5):
        chooser.heat.note(number.to_bytes(4), 0)
    for number in range(COPIED_MAX + 5):
        chooser.note_copied(number.to_bytes(4))
    chooser.check_integrity()
    assert chooser.heat.of((0).to_bytes(4), 0) == 0 < chooser.heat.of((9).to_bytes(4), 0)
    assert not chooser.is_copied((4).to_bytes(4)) and chooser.is_copied((5).to_bytes(4))


def test_who_is_away_is_skipped_until_nobody_is_left() -> None:
    """The next of the order steps in, so others keep what they have."""
    chooser = Chooser(named("a", "b", "c"))
    hashes = hashes_of(3, 30 * GROUP_BLOCKS)
    all_up = chooser.read_parts(hashes, always)
    assert len(all_up) == 30 and {part.node for part in all_up} == {"a", "b", "c"}
    without_a = chooser.read_parts(hashes, lambda name: name != "a")
    for before, after in zip(all_up, without_a, strict=True):
        assert after.node != "a" and before.node in ("a", after.node)
    assert chooser.read_parts(hashes, lambda _: False) == []
    assert chooser.write_nodes(group_of(hashes[0]), lambda _: False, 0) == ()


def test_hot_groups_are_written_twice_and_read_from_both() -> None:
    """Only once a copy is known to be there is it read, and then every second time."""
    chooser = Chooser(named("a", "b", "c"))
    hashes = hashes_of(4, 10)
    group = group_of(hashes[0])
    [first] = chooser.write_nodes(group, always, 0)
    for _ in range(20):
        chooser.heat.note(group, 0)
    both = chooser.write_nodes(group, always, 0)
    assert len(both) == 2 and both[0] == first
    assert {chooser.read_parts(hashes, always)[0].node for _ in range(4)} == {first}
    chooser.note_copied(group)
    parts = [chooser.read_parts(hashes, always)[0] for _ in range(4)]
    assert Counter(part.node for part in parts) == {both[0]: 2, both[1]: 2}
    assert all(part.copy == (part.node != first) for part in parts)
    chooser.note_lost(group)
    assert {chooser.read_parts(hashes, always)[0].node for _ in range(4)} == {first}


def test_other_nodes_mean_that_copies_are_unknown() -> None:
    chooser = Chooser(named("a", "b"))
    chooser.note_copied(b"gggg")
    assert not chooser.set_nodes(named("b", "a")) and chooser.is_copied(b"gggg")
    assert chooser.set_nodes(named("a", "b", "c")) and not chooser.is_copied(b"gggg")
