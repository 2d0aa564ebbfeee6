"""The decoding sequences of one effective band, which take part in the same steps.

Invariant: members differ only in when they joined. The lane counts its steps and the time that
steps left it out; a member's output is what it had when it joined and the steps since. Ends and
promotions stand in heaps by those counts, so a step costs nothing per member.
"""

from __future__ import annotations

import heapq
import math

from headrace.policy.priority import aged_band
from headrace.types import Band
from headrace_sim.sequence import SimSequence, left_to_promotion_ms
from headrace_worker.policy.sequence import PROMOTE_MS


class Lane:
    """See above. `rows` by the members' own bands, `context` the KV tokens that a step reads."""

    __slots__ = (
        "band",
        "context",
        "ends",
        "idle_ms",
        "idle_since_ms",
        "members",
        "promote_idle_ms",
        "rows",
        "steps",
    )

    def __init__(self, band: int) -> None:
        self.band = band
        self.members: dict[str, SimSequence] = {}
        self.rows = [0] * len(Band)
        self.context = 0
        self.steps = 0
        self.idle_ms = 0.0
        self.idle_since_ms: float | None = None
        """Since when steps have left it out, None if the last one did not."""
        self.promote_idle_ms = math.inf
        """Nobody's band has become better before it has been left out for so long."""
        self.ends: list[tuple[int, int, int, SimSequence]] = []
        """(steps at its end, order, stay, who); outdated where the stay is another."""

    def output(self, sequence: SimSequence, further_steps: int = 0) -> int:
        """Output tokens of a member, after some more steps."""
        return sequence.output + self.steps + further_steps - sequence.joined_steps

    def grown(self, sequence: SimSequence) -> int:
        """KV tokens that a member added since it joined."""
        return self.steps - sequence.joined_steps

    def join(self, sequence: SimSequence, now_ms: float) -> None:
        sequence.joined_steps = self.steps
        sequence.joined_idle_ms = self._idle(now_ms)
        self.members[sequence.job.id] = sequence
        self.rows[sequence.job.band] += 1
        self.context += sequence.known
        end = self.steps + sequence.output_tokens - sequence.output
        heapq.heappush(self.ends, (end, sequence.order, sequence.stay, sequence))
        if self.band > 0:
            left = left_to_promotion_ms(sequence.waited_ms)
            self.promote_idle_ms = min(self.promote_idle_ms, sequence.joined_idle_ms + left)

    def leave(self, sequence: SimSequence, now_ms: float) -> int:
        """`sequence` decodes no more, or elsewhere; KV tokens that it added here."""
        del self.members[sequence.job.id]
        grown = self.grown(sequence)
        self.context -= sequence.known + grown
        self.rows[sequence.job.band] -= 1
        sequence.output += grown
        sequence.waited_ms += self._idle(now_ms) - sequence.joined_idle_ms
        sequence.stay += 1
        return grown

    def steps_to_end(self) -> int:
        """Steps until the first member is complete; the lane is not empty."""
        ends = self.ends
        while ends[0][2] != ends[0][3].stay:
            heapq.heappop(ends)
        return ends[0][0] - self.steps

    def complete(self) -> list[SimSequence]:
        """The members that have all their output, first come first; they are still members."""
        ends, found = self.ends, []
        while ends and ends[0][0] <= self.steps:
            _, _, stay, sequence = heapq.heappop(ends)
            if stay == sequence.stay:
                found.append(sequence)
        return found

    def note_step(self, taking_part: bool, now_ms: float) -> None:
        """The steps that begin at `now_ms` have its members in them, or leave them out."""
        if not taking_part:
            self.idle_since_ms = now_ms if self.idle_since_ms is None else self.idle_since_ms
        elif self.idle_since_ms is not None:
            self.idle_ms += now_ms - self.idle_since_ms
            self.idle_since_ms = None

    def promoted(self, now_ms: float) -> list[SimSequence]:
        """Members whose band has become better than the lane's; the caller moves them."""
        idle_ms = self._idle(now_ms)
        if idle_ms < self.promote_idle_ms:
            return []
        better = []
        self.promote_idle_ms = math.inf
        for sequence in [*self.members.values()]:
            waited = sequence.waited_ms + idle_ms - sequence.joined_idle_ms
            if aged_band(sequence.job.band, int(waited), PROMOTE_MS) < self.band:
                better.append(sequence)
            else:
                left = left_to_promotion_ms(waited)
                self.promote_idle_ms = min(self.promote_idle_ms, idle_ms + left)
        return better

    def _idle(self, now_ms: float) -> float:
        since = self.idle_since_ms
        return self.idle_ms + (0.0 if since is None else now_ms - since)

    def check_integrity(self) -> None:
        members = self.members.values()
        assert sum(self.rows) == len(members), "rows add up"
        context = sum(s.known + self.grown(s) for s in members)
        assert context == self.context, "context adds up"
        live = {entry[3].job.id for entry in self.ends if entry[2] == entry[3].stay}
        assert live == self.members.keys(), "every member ends"
        assert all(s.seen_band == self.band for s in members), "members are of one band"
