"""Who holds what, whatever order it is taken and let go in."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from headrace_cache.leases import Leases


def test_a_place_is_let_go_by_its_last_holder() -> None:
    leases = Leases()
    leases.begin(1, 10, [100, 200], 20, 0)
    leases.begin(2, 11, [200], 10, 0)
    assert leases.end(1, 10) == [100]
    assert leases.is_held(200)
    assert leases.end(2, 10) == [], "another's lease is of no concern"
    assert leases.end(2, 11) == [200]
    assert leases.end(2, 11) == [], "once"
    leases.check_integrity()


def test_who_keeps_a_lease_for_long_is_named() -> None:
    leases = Leases()
    leases.begin(1, 10, [100], 10, 5)
    leases.begin(2, 11, [100], 10, 50)
    leases.begin(1, 12, [100], 10, 50)
    assert leases.overdue(5) == []
    assert leases.overdue(50) == [1]


@given(
    st.lists(
        st.tuples(st.booleans(), st.integers(1, 3), st.lists(st.integers(0, 5), max_size=4)),
        max_size=40,
    )
)
def test_any_program_lets_go_of_each_place_once(
    steps: list[tuple[bool, int, list[int]]],
) -> None:
    leases = Leases()
    held: dict[int, list[tuple[int, list[int]]]] = {1: [], 2: [], 3: []}
    for begins, holder, places in steps:
        if begins:
            number = leases.new_number()
            leases.begin(holder, number, places, len(places), 0)
            held[holder].append((number, places))
        elif held[holder]:
            number, gone = held[holder].pop(0)
            let_go = leases.end(holder, number)
            left = {place for each in held.values() for _, kept in each for place in kept}
            assert set(let_go) == set(gone) - left
        assert leases.held_bytes(holder) == sum(len(places) for _, places in held[holder])
        assert leases.numbers(holder) == [number for number, _ in held[holder]]
        leases.check_integrity()
