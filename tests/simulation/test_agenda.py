"""The agenda hands out events in their order, whatever is put while it does."""

from __future__ import annotations

import heapq
from itertools import count

from hypothesis import given
from hypothesis import strategies as st

from headrace_sim.agenda import SLOT_MS, Agenda

times = st.one_of(
    st.floats(0, 4, allow_nan=False),
    st.sampled_from([0.0, SLOT_MS, 2 * SLOT_MS, 3 * SLOT_MS, 1_000.0]),
)
puts = st.lists(st.tuples(times, st.integers(0, 3)), max_size=4)


@given(first=puts, later=st.lists(puts, max_size=30))
def test_events_come_as_from_one_heap(
    first: list[tuple[float, int]], later: list[list[tuple[float, int]]]
) -> None:
    """Each event puts some more: for now, for the slot under way, for long after."""
    agenda, heap, numbers = Agenda(), [], count(1)

    def put(at_ms: float, kind: int) -> None:
        agenda.put(at_ms, kind, None)
        heapq.heappush(heap, (at_ms, kind, next(numbers), None))

    for at_ms, kind in first:
        put(at_ms, kind)
    more = iter(later)
    for event in agenda:
        assert event == heapq.heappop(heap)
        for wait_ms, kind in next(more, ()):
            put(event[0] + wait_ms, kind)
        agenda.check_integrity()
    assert not heap, "nothing was forgotten"


def test_what_is_put_for_the_past_comes_next() -> None:
    """Nothing is lost that is due already; it goes before everything that is left."""
    agenda = Agenda()
    for at_ms in (5.0, 5.1, 9.0):
        agenda.put(at_ms, 0, None)
    taken = []
    for at_ms, kind, _, _ in agenda:
        taken.append((at_ms, kind))
        if len(taken) == 1:
            agenda.put(1.0, 0, None)
            agenda.put(at_ms, 0, None)
    assert taken == [(5.0, 0), (1.0, 0), (5.0, 0), (5.1, 0), (9.0, 0)]
