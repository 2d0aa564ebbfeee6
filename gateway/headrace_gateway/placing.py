"""A new job straight to its worker: accepted and handed off in one step of Redis.

Invariant: it overtakes nobody. It is tried only while the queue here is empty, and the script
leaves the job in the intake stream, as any other gateway would, when anything stands there: what
was accepted before goes before. All else is as at a hand-off: booked before
anybody decides again, taken back where Redis says no; leadership, lease and room are checked in the
same step. While the answer is under way the job may come back through the intake stream; then it is
held, so that it is never queued and booked at once. Rejected: telling the dispatcher in this
process of a job that was accepted as others are, which spares reading it back but not the second
round trip.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from headrace import keys, scripts
from headrace.clock import Clock
from headrace.streams import Scripts
from headrace.types import Job
from headrace_gateway.hops import Hop
from headrace_gateway.policy.dispatch import Decision, DispatchPolicy
from headrace_gateway.policy.fair_queue import Queued

PLACED = b"ok"
UNKNOWN = b"unknown"
"""No answer came: the job may be with the worker, in the intake stream, or nowhere."""
Call = Callable[[Decision, Hop, Any], tuple[list[str], list[Any]]]
"""Keys and arguments of a hand-off; the last says what is moved, or for how long it may live."""
Missed = Callable[[Decision, bytes], None]
"""Told of a decision that came to nothing, and why."""


class Placing:
    """One term's. `policy` decides, as for what was read from the stream `intake`."""

    def __init__(
        self,
        policy: DispatchPolicy,
        lua: Scripts,
        intake: str,
        call: Call,
        on_missed: Missed,
        clock: Clock,
    ) -> None:
        self._policy = policy
        self._lua = lua
        self._intake = intake
        self._call = call
        self._on_missed = on_missed
        self._clock = clock
        self._under_way: dict[str, Queued | None] = {}
        """Job → its intake entry, where that was read before the answer came."""

    def meets(self, item: Queued) -> bool:
        """Whether `item`, just read from the intake stream, is held until its answer is there."""
        held = item.job.id in self._under_way
        if held:
            self._under_way[item.job.id] = item
        return held

    async def place(self, job: Job) -> str:
        """The id of the entry in which `job` is durable now, with its worker or in the intake.

        '' where it has to take its turn: nothing was done. Raises what redis-py raises when the
        outcome is unknown; accepting it as usual finds out.
        """
        now = self._clock.wall_ms()
        decision = self._decide(job, now)
        if decision is None:
            return ""
        hop = Hop(decision, self._clock.wall_ns())
        answer = UNKNOWN
        self._under_way[job.id] = None
        try:
            try:
                names, values = self._call(decision, hop, keys.JOB_TTL_MS)
                sent = self._lua.send(scripts.PLACE, names, values)
            finally:
                # behind the sending, which it would keep waiting; nobody else has run meanwhile
                self._policy.placed_alone(decision, now)
            entry, answer = await sent
        finally:
            met = self._under_way.pop(job.id)
            hop.end(answer.decode())
            if answer != PLACED:
                self._policy.refused(decision, again=False)
                if met is not None:
                    self._policy.push(met)
                self._on_missed(decision, answer)
        return str(entry.decode())

    def _decide(self, job: Job, now: int) -> Decision | None:
        """Who gets `job`, to be booked at once; None while somebody waits or nobody has room."""
        if len(self._policy.queue):
            return None
        return self._policy.next_alone(Queued(job, self._intake, "", self._clock.wall_ns()), now)
