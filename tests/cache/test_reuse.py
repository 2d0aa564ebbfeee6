"""What the keep-score learns of a workload, told by uses alone: no cache anywhere."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache.builders import hash_of
from headrace_cache.policy.reuse import (
    BUCKETS,
    HORIZON,
    PRIOR_HAZARD,
    STARTS,
    WATCHED_MAX,
    WIDTHS,
    ReuseModel,
    best_rates,
    bucket_of,
    hazards,
)

NOTHING = [0.0] * BUCKETS


def name_of(thing: object) -> int:
    return int.from_bytes(hash_of(thing)[:8])


def counts(**by_bucket: int) -> list[float]:
    """`b3=10`: ten in bucket 3."""
    return [float(by_bucket.get(f"b{bucket}", 0)) for bucket in range(BUCKETS)]


def test_each_age_has_its_bucket() -> None:
    assert STARTS[:5] == [0, 64, 96, 128, 192]
    for bucket in range(BUCKETS):
        assert bucket_of(STARTS[bucket]) == bucket
        assert bucket_of(STARTS[bucket + 1] - 1) == bucket
    assert bucket_of(1 << 60) == BUCKETS - 1


def test_chances_are_of_those_that_got_there() -> None:
    """A thousand: 100 return early, half of the rest in bucket 5, 450 are still waiting at 9."""
    chances = hazards(counts(b0=100, b5=450), counts(b9=450), [0.0])
    assert chances[0] == pytest.approx(0.1, abs=0.01)
    assert chances[5] == pytest.approx(0.5, abs=0.02)
    assert max(chances[1:5]) < 0.01


def test_what_was_never_seen_is_as_assumed_and_what_was_seen_overrules_it() -> None:
    assert hazards(NOTHING, NOTHING, [0.3]) == [0.3] * BUCKETS
    chances = hazards(NOTHING, counts(b7=10_000), [0.3])
    assert chances[0] < 0.001
    assert chances[20] < 0.001, "what was not seen beyond some age is not taken to begin there"


@given(st.lists(st.floats(0.0, 1.0), min_size=BUCKETS, max_size=BUCKETS))
def test_the_best_time_to_give_up_is_found_among_all(chances: list[float]) -> None:
    """Held against the definition: every bucket to begin in, with every one to end in."""
    rates = best_rates(chances)
    for first in range(BUCKETS):
        hits, waited, left, best = 0.0, 0.0, 1.0, 0.0
        for bucket in range(first, BUCKETS):
            hits += left * chances[bucket]
            waited += left * (1.0 - chances[bucket] / 2) * WIDTHS[bucket]
            left *= 1.0 - chances[bucket]
            best = max(best, hits / waited)
        assert rates[first] == pytest.approx(best, rel=1e-9, abs=1e-30)


def test_who_still_waits_is_counted_by_class_and_age() -> None:
    """Held against a look at each: after uses of some thousand names, many of them again."""
    model, rng, last = ReuseModel([0, 1], [1, 2]), random.Random(4), dict[int, tuple[int, int]]()
    for _ in range(9_000):
        name, class_ = name_of(int(rng.paretovariate(0.5))), rng.randrange(2)
        model.used(name, class_)
        last[name] = (class_, model.clock)
    waiting = [list(NOTHING), list(NOTHING)]
    for class_, used_at in last.values():
        waiting[class_][bucket_of(model.clock - used_at)] += 1.0
    assert len(last) > 500
    assert model.waiting() == waiting


def test_a_constant_chance_makes_an_entry_worth_less_with_age() -> None:
    rates = best_rates([0.4] + [0.1] * (BUCKETS - 1))
    assert all(younger >= older for younger, older in pairwise(rates))
    assert rates[1] > 100 * rates[20]


def test_what_returns_only_after_a_while_is_worth_more_when_it_is_about_to() -> None:
    chances = [0.0] * BUCKETS
    chances[6] = 0.9
    rates = best_rates(chances)
    assert all(earlier < later for earlier, later in pairwise(rates[:7]))
    assert max(rates[7:]) == 0.0


def test_a_loop_is_recognized() -> None:
    """Everything returns after 1,000 uses exactly: nothing to expect before, much then."""
    model = ReuseModel([0], [1])
    for use in range(20_000):
        model.used(name_of(use % 1_000), 0)
        if model.due:
            model.refresh(entries=100)
    best = max(range(BUCKETS), key=lambda bucket: model.index[0][bucket])
    assert best == bucket_of(1_000)
    assert model.index[0][best] > 3 * max(model.index[0][best - 4], model.index[0][best + 3])
    model.check_integrity()


def test_classes_that_return_are_told_from_those_that_do_not() -> None:
    model = ReuseModel([0, 1], [1, 1])
    for use in range(4_000):
        model.used(name_of(use), 0)
        model.used(name_of(("hot", use % 300)), 1)
        if model.due:
            model.refresh(entries=100)
    assert model.index[1][0] > 50 * model.index[0][0]


def test_a_class_that_was_hardly_seen_is_like_its_family() -> None:
    model = ReuseModel([0, 0], [1, 1])
    for use in range(5_000):
        model.used(name_of(use % 200), 0)
        if model.due:
            model.refresh(entries=100)
    model.used(name_of("only"), 1)
    model.refresh(entries=100)
    assert model.index[1][0] == pytest.approx(model.index[0][0], rel=0.2)


def test_the_sample_is_bounded_and_reaches_far_enough() -> None:
    """A cache of 100,000 entries: one name in 64 is watched, for long enough to return."""
    model = ReuseModel([0], [1])
    rng = random.Random(1)
    model.refresh(entries=100_000)
    for _ in range(150_000):
        model.used(rng.getrandbits(64), 0)
    model.check_integrity()
    assert 1_600 < len(model._watched) < 3_200
    assert WATCHED_MAX << 6 >= HORIZON * 100_000


def test_before_anything_is_known_it_is_recency_and_use() -> None:
    index = ReuseModel([0, 1], [1, 2]).index
    assert all(younger >= older for younger, older in pairwise(index[0]))
    assert all(more > fewer for fewer, more in zip(index[0], index[1], strict=True))
    assert index[0][0] > PRIOR_HAZARD / 64 > index[0][10]
