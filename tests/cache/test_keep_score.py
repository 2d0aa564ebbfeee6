"""What the default policy keeps: classes, cost, size, use and time."""

from __future__ import annotations

import random
from collections.abc import Iterable

from cache.builders import hash_of
from cache.test_eviction import SIZE, facts, leave
from headrace.types import Band
from headrace_cache.policy.classic import LeastRecentlyUsed
from headrace_cache.policy.eviction import NO_SLOT, EvictionPolicy
from headrace_cache.policy.keep_score import KeepScore


def test_equal_scores_leave_in_order_of_arrival() -> None:
    policy = KeepScore()
    for slot in range(5):
        policy.admit(slot, facts(), 0)
    assert leave(policy, 5) == [0, 1, 2, 3, 4]


def test_a_lower_class_leaves_first() -> None:
    policy = KeepScore()
    for band in Band:
        policy.admit(band, facts(band), 0)
    assert leave(policy, 3) == list(reversed(Band))


def test_a_class_is_a_head_start_not_a_right_to_stay() -> None:
    """An interactive entry nobody uses outlives many batch entries, and not all of them."""
    policy = KeepScore()
    policy.admit(0, facts(Band.INTERACTIVE), 0)
    for turn in range(20_000):
        policy.admit(1, facts(Band.BATCH, name=int.from_bytes(hash_of(turn)[:8])), 0)
        if policy.victims(SIZE, 0)[0].slot == 0:
            break
    assert 100 < turn < 19_999


def test_being_read_by_a_higher_class_raises_an_entry() -> None:
    policy = KeepScore()
    policy.admit(0, facts(Band.BATCH), 0)
    policy.admit(1, facts(Band.STANDARD), 0)
    policy.touch(0, 1, Band.INTERACTIVE)
    policy.touch(0, 2, Band.BATCH)
    assert leave(policy, 1) == [1]


def test_what_costs_more_to_compute_or_takes_less_room_stays() -> None:
    policy = KeepScore()
    policy.admit(0, facts(cost_us=100_000), 0)
    policy.admit(1, facts(size_bytes=100), 0)
    policy.admit(2, facts(), 0)
    assert leave(policy, 1) == [2]


def test_an_unmeasured_entry_counts_as_average() -> None:
    policy = KeepScore()
    policy.admit(0, facts(cost_us=100_000), 0)
    policy.admit(1, facts(cost_us=1_000), 0)
    policy.admit(2, facts(cost_us=0), 0)
    policy.touch(0, 0)  # once more, now that the average is known
    assert leave(policy, 3) == [1, 2, 0]


def test_a_chain_leaves_from_its_end_before_another_is_cut() -> None:
    """Blocks that were used together leave together, as far as nobody else needs them."""
    policy = KeepScore()
    first, second = range(4), range(4, 8)
    for members in (first, second):
        for slot in members:
            parent = slot - 1 if slot > members[0] else NO_SLOT
            policy.admit(slot, facts(parent=parent), 0)
    policy.admit(8, facts(parent=1), 0)  # another chain shares the first two blocks
    assert leave(policy, 3) == [3, 2, 7], "then the next chain: block 1 is needed"
    policy.check_integrity()
    assert leave(policy, 2) == [8, 1], "whose turn it is, and what nobody else needs now"
    policy.check_integrity()


def test_recency_counts_through_aging() -> None:
    """With equal use and cost, what was used before an eviction leaves before what came after."""
    policy = KeepScore()
    for slot in range(2):
        policy.admit(slot, facts(), 0)
    assert leave(policy, 1) == [0]
    policy.admit(2, facts(), 0)
    assert leave(policy, 1) == [1]


def replay(policy: EvictionPolicy, names: Iterable[int], room: int) -> list[bool]:
    """Whether each of `names`, used in this order, was a hit in a cache for `room` entries."""
    hits = []
    resident: set[int] = set()
    for now_ms, name in enumerate(names):
        hits.append(name in resident)
        if name in resident:
            policy.touch(name, now_ms)
            continue
        policy.admit(name, facts(name=int.from_bytes(hash_of(name)[:8])), now_ms)
        resident.add(name)
        if len(resident) > room:
            resident -= {victim.slot for victim in policy.victims(SIZE, now_ms)}
    policy.check_integrity()
    return hits


def test_a_loop_larger_than_the_cache_is_kept_in_part() -> None:
    """Recency loses every entry just before its turn; what is learned keeps some for good."""
    rounds, loop, room = 20, 400, 200
    names = [name for _ in range(rounds) for name in range(loop)]
    assert not any(replay(LeastRecentlyUsed(), names, room))
    late = replay(KeepScore(), names, room)[-5 * loop :]
    assert sum(late) / len(late) > 0.35, "half of them would be perfect"


def test_what_is_used_once_does_not_push_out_what_returns() -> None:
    """A scan four times as fast as the hot set turns over; the hot set alone would just fit."""
    hot, room, count = 60, 80, 6_000
    names = [index // 5 % hot if index % 5 == 0 else hot + index for index in range(count)]
    late = slice(count // 2, None)
    policies = (KeepScore(), LeastRecentlyUsed())
    found = [sum(replay(policy, names, room)[late]) for policy in policies]
    assert found[0] > 0.8 * count / 10
    assert found[1] == 0


def test_a_change_of_the_workload_is_learned() -> None:
    """First a loop too large for the cache, then only what was used lately returns."""
    loop, room = 200, 100
    old = [name for _ in range(20) for name in range(loop)]
    new = [10_000 + index // 2 - (index % 2) * 25 for index in range(6_000)]
    late = replay(KeepScore(), old + new, room)[-2_000:]
    assert sum(late) / len(late) > 0.45, "every other one is a return within 50 uses"


def test_what_comes_back_is_known_again() -> None:
    """Uses count also across an eviction: a name that was used before is not a newcomer."""
    policy = KeepScore()
    policy.admit(0, facts(name=1 << 50), 0)
    policy.touch(0, 1)
    assert leave(policy, 1) == [0]
    policy.admit(0, facts(name=1 << 50), 2)
    (victim,) = policy.victims(SIZE, 7)
    assert "used 3x, idle 5 ms" in victim.reason


def test_lru_looks_at_the_last_use_alone() -> None:
    policy = LeastRecentlyUsed()
    for band in Band:
        policy.admit(band, facts(band), 0)
    policy.touch(Band.BATCH, 1)
    assert leave(policy, 3) == [Band.INTERACTIVE, Band.STANDARD, Band.BATCH]


def test_a_chain_at_once_is_as_its_blocks_one_by_one() -> None:
    """Admitted and touched in runs or singly, the same entries leave in the same order."""
    rng = random.Random(11)
    one_by_one, at_once = KeepScore(), KeepScore()
    free = list(range(400))
    chains: list[list[int]] = []
    for now_ms in range(600):
        if free and rng.random() < 0.6:
            slots = [free.pop() for _ in range(min(len(free), rng.randint(1, 9)))]
            start = rng.choice(rng.choice(chains)) if chains and rng.random() < 0.3 else NO_SLOT
            told = [
                facts(
                    rng.choice(list(Band)),
                    parent=parent,
                    cost_us=rng.choice([0, 500, 9_000]),
                    name=rng.getrandbits(64),
                )
                for parent in (start, *slots[:-1])
            ]
            at_once.admit_all(slots, told, now_ms)
            for slot, each in zip(slots, told, strict=True):
                one_by_one.admit(slot, each, now_ms)
            chains.append(slots)
        elif chains and rng.random() < 0.7:
            slots = rng.choice(chains)[: rng.randint(1, 9)]
            band = rng.choice([None, *Band])
            at_once.touch_all(slots, now_ms, band)
            for slot in slots:
                one_by_one.touch(slot, now_ms, band)
        else:
            gone = [each.slot for each in at_once.victims(3 * SIZE, now_ms)]
            assert gone == [each.slot for each in one_by_one.victims(3 * SIZE, now_ms)]
            free += gone
            chains = [left for each in chains if (left := [s for s in each if s not in gone])]
        at_once.check_integrity()
        one_by_one.check_integrity()


def test_being_written_again_is_no_use() -> None:
    """What is written and never read counts as used once, whoever writes it how often."""
    policy = KeepScore()
    policy.admit(0, facts(name=1 << 50), 0)
    policy.admit(1, facts(name=1 << 51), 0)
    uses = policy._model.clock
    for _ in range(50):
        policy.renew(0, Band.STANDARD)
    assert policy._model.clock == uses
    (victim,) = policy.victims(SIZE, 9)
    assert victim.slot == 0
    assert "used 1x, idle 9 ms" in victim.reason


def test_being_written_again_by_a_higher_class_raises_an_entry() -> None:
    policy = KeepScore()
    policy.admit(0, facts(Band.BATCH), 0)
    policy.admit(1, facts(Band.STANDARD), 0)
    policy.renew(0, Band.INTERACTIVE)
    policy.renew(0, Band.BATCH)
    policy.check_integrity()
    assert leave(policy, 1) == [1]


def test_an_entry_without_its_parent_was_asked_for_by_nobody() -> None:
    """What cannot be read is not used by being written, also where it was known before."""
    policy = KeepScore()
    policy.admit(0, facts(), 0)
    policy.admit(1, facts(parent=0, name=(1 << 50) + 5), 0)
    policy.touch(1, 0)
    uses = policy._model.clock
    policy.remove(1)
    policy.remove(0)
    for _ in range(3):
        policy.admit(1, facts(parent=0, name=(1 << 50) + 5), 0)
        assert policy._model.clock == uses
        policy.check_integrity()
        policy.remove(1)
    policy.admit(0, facts(), 0)
    policy.admit(1, facts(parent=0, name=(1 << 50) + 5), 0)
    (victim,) = policy.victims(SIZE, 7)
    assert victim.slot == 1 and "used 3x" in victim.reason
