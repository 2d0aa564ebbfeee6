"""Workers by load: the order is that of the last places, whenever it is read and how rarely."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from headrace_gateway.policy.load_order import NUMBER, LoadOrder, place_of

steps = st.lists(
    st.tuples(
        st.sampled_from(["put", "drop", "least", "places", "set"]),
        st.integers(0, 20),
        st.integers(0, 5),
    ),
    max_size=80,
)


@given(steps)
def test_the_order_is_that_of_the_last_places(program: list[tuple[str, int, int]]) -> None:
    """Of 21 workers some change and some leave; equal loads stand in the order of numbers."""
    order = LoadOrder()
    loads = dict.fromkeys(range(21), 0)
    order.set_places(place_of(0, number) for number in loads)
    for action, number, load in program:
        match action:
            case "put":
                loads[number] = load
                order.put(place_of(load, number))
            case "drop":
                loads.pop(number, None)
                order.drop(number)
            case "set":
                loads = {each: (each + load) % 4 for each in range(number)}
                order.set_places(place_of(held, each) for each, held in loads.items())
        ranked = sorted((held, each) for each, held in loads.items())
        if action == "least" and loads:
            assert order.least() & NUMBER == ranked[0][1]
        if action == "places":
            assert [place & NUMBER for place in order.places()] == [each for _, each in ranked]
    order.check_integrity()
