"""What ranks of one host share: rings, beats, stages of equal cost, steps as bytes."""

from __future__ import annotations

import random
import threading
from itertools import combinations, pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.policy.splits import split_layers
from headrace_worker.parallel.ring import Reader, RingError, Writer, ring_bytes
from headrace_worker.parallel.shared import SharedMemory
from headrace_worker.parallel.watch import Beats
from headrace_worker.parallel.wishes import Need, Wishes
from headrace_worker.policy.plan import PlanItem
from headrace_worker.sampling.uniform import NUMBERS
from headrace_worker.step_inputs import StepInputs, inputs_of
from worker.builders import make_sequence


@pytest.mark.parametrize("readers", [1, 3])
def test_every_reader_gets_every_message(readers: int) -> None:
    """Empty ones, small ones, ones that are longer than the ring; whoever is slow holds nobody
    else's bytes up for good."""
    dice = random.Random(readers)
    sent = [dice.randbytes(dice.choice((0, 1, 7, 100, 1000))) for _ in range(200)]
    memory = SharedMemory.create("test")
    start = memory.grow(ring_bytes(256, readers))
    got: list[list[bytes]] = [[] for _ in range(readers)]

    def read(index: int) -> None:
        room = memory.map(start, ring_bytes(256, readers))
        reader = Reader(room, readers, index)
        while len(got[index]) < len(sent):
            message = reader.receive()
            assert message is not None
            got[index].append(message.tobytes())
            reader.check_integrity()

    threads = [threading.Thread(target=read, args=(index,)) for index in range(readers)]
    for thread in threads:
        thread.start()
    writer = Writer(memory.map(start, ring_bytes(256, readers)), readers)
    for message in sent:
        writer.send(message[:3], message[3:])
    for thread in threads:
        thread.join(30)
    writer.check_integrity()
    memory.close()
    assert all(messages == sent for messages in got)


def test_a_reader_that_is_gone_is_told_of() -> None:
    """The writer waits as long as it was told to; so does who waits for a message."""
    memory = np.zeros(ring_bytes(64, 2), np.uint8)
    writer, reader = Writer(memory, 2, patience_s=0.05), Reader(memory, 2, 0)
    writer.send(b"x" * 40)
    message = reader.receive(0)
    assert message is not None and message.tobytes() == b"x" * 40
    assert reader.receive(0.01) is None
    with pytest.raises(RingError, match="reader 1"):
        writer.send(b"y" * 40)


@given(
    costs=st.lists(st.integers(1, 50), min_size=1, max_size=9),
    stages=st.integers(1, 4),
    head=st.integers(0, 100),
)
@settings(max_examples=100, deadline=None)
def test_no_split_has_a_cheaper_dearest_stage(costs: list[int], stages: int, head: int) -> None:
    """Against all splits there are."""
    stages = min(stages, len(costs))

    def dearest(cuts: tuple[int, ...]) -> int:
        bounds = [0, *cuts, len(costs)]
        sums = [sum(costs[a:b]) for a, b in pairwise(bounds)]
        return max([*sums[:-1], sums[-1] + head])

    found = split_layers(costs, stages, head=head)
    assert [layer for run in found for layer in run] == list(range(len(costs)))
    assert all(len(run) for run in found) and len(found) == stages
    best = min(map(dearest, combinations(range(1, len(costs)), stages - 1)))
    assert dearest(tuple(run.start for run in found[1:])) == best


def test_a_rank_hangs_when_it_misses_its_ticks() -> None:
    """Not while it starts, not for a slow beat, never the one that looks."""
    look = Beats(3)
    assert [look.tick([0, 0, 0]) for _ in range(9)] == [None] * 9, "they are starting"
    assert look.tick([0, 1, 5]) is None
    assert [look.tick([0, 1, 6]), look.tick([0, 1, 7]), look.tick([0, 2, 8])] == [None] * 3
    assert [look.tick([0, 2, 9 + n]) for n in range(3)] == [None, None, 1]


def test_a_step_survives_the_wire() -> None:
    """As bytes it is a few for each number; what comes out is what went in."""
    first, second = make_sequence("a", range(40)), make_sequence("b", range(7))
    first.blocks, second.blocks = [3, 9, 4], [7]
    second.computed = 6
    items = [PlanItem(first, 16, 20, False), PlanItem(second, 6, 1, True, (5, 6))]
    step = inputs_of(items)
    assert step.tokens.tolist() == [*range(16, 36), 6, 5, 6]
    assert step.rows is not None and step.rows.tolist() == [20, 21, 22]
    assert step.slots.tolist()[-3:] == [7 * 16 + 6, 7 * 16 + 7, 7 * 16 + 8]
    wishes = Wishes(np.array([Need.PEAK] * 3, np.uint8), np.empty((0, 5)), np.empty((0, NUMBERS)))
    packed = step.wishing(wishes).pack()
    assert len(packed) < 400
    back = StepInputs.unpack(packed)
    for name in ("tokens", "positions", "slots", "rows"):
        assert getattr(back, name).tolist() == getattr(step, name).tolist()
    assert list(map(list, back.block_tables)) == [[3, 9, 4], [7]]
    assert (list(back.lengths), list(back.query_starts)) == ([36, 9], [0, 20, 23])
    assert back.wishes is not None and back.wishes.needs.tolist() == [Need.PEAK] * 3
