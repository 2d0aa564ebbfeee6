"""How many workers compute prompts and how many decode: one changes sides when load asks for it.

Invariant: a side gives a worker away only if the other has been short for HOLD_MS, it would itself
bear the loss, and the last change is COOL_MS ago; no side is ever left empty. Between what makes a
side short (pressure above 1) and what lets it give (SPARE after the loss) lies a gap, so that a
worker does not go to and fro. Workers that do both are left alone.

Pressure of the prompts' side: seconds of prompts that wait, in the queue and on its workers, over
PROMPT_S. Of the decoding side: the larger part of its slots and its KV that is taken, over
DECODE_PART, since decoding workers fill up before they get slow.
Rejected: counting what passed through, which says what was, not what is short now; a controller
that aims at equal pressures, which moves workers for differences nobody feels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from headrace.types import WorkerRole

PROMPT_S = 1.0
DECODE_PART = 0.85
SPARE = 0.6
HOLD_MS = 10_000
COOL_MS = 30_000


class SideFacts(NamedTuple):
    """One worker of a side. `prompt_tokens` wait there; `used` is the larger part of its slots and
    its KV that is taken."""

    worker: str
    role: WorkerRole
    jobs: int
    prompt_tokens: int
    used: float


class RoleChange(NamedTuple):
    """`worker` is to have `role`, and why."""

    worker: str
    role: WorkerRole
    reason: str


@dataclass(frozen=True, slots=True)
class RolesConfig:
    """What can be tuned; the module's header says what each means."""

    prompt_s: float = PROMPT_S
    decode_part: float = DECODE_PART
    spare: float = SPARE
    hold_ms: int = HOLD_MS
    cool_ms: int = COOL_MS

    def __post_init__(self) -> None:
        assert 0 < self.spare < 1, "who gives must not be short itself"


class RolePolicy:
    """Remembers since when a side has been short, and when it changed something last."""

    def __init__(self, config: RolesConfig | None = None) -> None:
        self._config = config or RolesConfig()
        self._short: WorkerRole | None = None
        self._since_ms = 0
        self._changed_ms: int | None = None

    def decide(
        self, facts: Sequence[SideFacts], queued_tokens: int, prefill_per_s: float, now_ms: int
    ) -> RoleChange | None:
        """The change to make at `now_ms`, if any.

        `queued_tokens` of prompts wait for a worker; one computes `prefill_per_s` (0: unknown).
        """
        sides = {
            role: [each for each in facts if each.role is role]
            for role in (WorkerRole.PREFILL, WorkerRole.DECODE)
        }
        prompts, streams = sides[WorkerRole.PREFILL], sides[WorkerRole.DECODE]
        if not prompts or not streams:
            self._short = None
            return None
        pressure = {
            WorkerRole.PREFILL: self._prompts(prompts, queued_tokens, prefill_per_s),
            WorkerRole.DECODE: self._streams(streams),
        }
        short = self._side(sides, pressure)
        if short is not self._short:
            self._short, self._since_ms = short, now_ms
        if short is None or now_ms - self._since_ms < self._config.hold_ms:
            return None
        if self._changed_ms is not None and now_ms - self._changed_ms < self._config.cool_ms:
            return None
        self._changed_ms, self._short = now_ms, None
        giver = WorkerRole.DECODE if short is WorkerRole.PREFILL else WorkerRole.PREFILL
        chosen = min(sides[giver], key=lambda each: (each.jobs, each.used, each.worker))
        reason = (
            f"{short.value} is short for {self._config.hold_ms / 1000:g} s: pressure "
            f"{pressure[short]:.2f}, of {giver.value} {pressure[giver]:.2f}"
        )
        return RoleChange(chosen.worker, short, reason)

    def _side(
        self,
        sides: dict[WorkerRole, list[SideFacts]],
        pressure: dict[WorkerRole, float],
    ) -> WorkerRole | None:
        """The side that is short while the other can spare a worker."""
        for short, giver in (
            (WorkerRole.PREFILL, WorkerRole.DECODE),
            (WorkerRole.DECODE, WorkerRole.PREFILL),
        ):
            left = len(sides[giver]) - 1
            if pressure[short] <= 1 or not left:
                continue
            if pressure[giver] * (left + 1) / left <= self._config.spare:
                return short
        return None

    def _prompts(
        self, prompts: Sequence[SideFacts], queued_tokens: int, prefill_per_s: float
    ) -> float:
        if not prefill_per_s:
            return 0.0
        waiting = queued_tokens + sum(each.prompt_tokens for each in prompts)
        return waiting / (len(prompts) * prefill_per_s * self._config.prompt_s)

    def _streams(self, streams: Sequence[SideFacts]) -> float:
        return sum(each.used for each in streams) / len(streams) / self._config.decode_part
