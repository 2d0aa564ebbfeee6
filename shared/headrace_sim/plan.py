"""What a simulated worker does in one step, as its scheduler hands it on.

Invariant: a plan is made anew for each step and says nothing of the next one, but whether that can
be another one though nothing happens. Rejected: a plan of many steps. How many are alike is a
matter of time, which the scheduler has no part in (worker.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from headrace_sim.lane import Lane
from headrace_sim.sequence import SimSequence


@dataclass(slots=True)
class Chunk:
    """`count` tokens of a prompt in a step. `stay`: which stay of `sequence` it was planned for."""

    sequence: SimSequence
    count: int
    stay: int


class SimPlan(NamedTuple):
    """One step: the lanes that take part with a row for each member, and chunks of prompts.

    `again`: the next step may well be another one, though nothing happens in between.
    """

    lanes: list[Lane]
    chunks: list[Chunk]
    again: bool
