"""Whether to fetch KV from the cache service or to compute it, and how much of it.

Both times are measured here: the service's round trip, and what a byte takes from each of its
tiers; what a prompt token takes in this engine. A job that waits for other prompts anyway fetches
that long for nothing. The run that is missing here is asked for from its head on, so a part of it
is always its head: the rest is computed. Per block both sides cost the same at each depth, as far
as it is measured; so a part is fetched only where time ends it: the limit of a lookup, or the wait,
if computing is faster than fetching.

Invariant: fetching is expected to be worth it, or is a probe of at most PROBE_BLOCKS, made where
nothing has been measured for PROBE_EVERY_MS. Without probes a tier that was slow once would never
be asked again. The service may have less than it is asked for; how much it mostly has weighs the
round trip against what may come.

Rejected: a fixed number of tokens from which on to fetch, right on one machine; computing the head
while the tail is fetched (Jin et al., "Compute Or Load KV Cache? Why Not Both?", 2024), which the
prefix pool cannot hold: it is found from the head on.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum

from headrace.types import BLOCK_TOKENS

HALF_LIFE_FETCHES = 4
BYTES_MEASURED_MIN = 64 * 1024
"""Fetches of less say more of the round trip than of bytes."""
BYTE_MS_MIN = 1e-9
PROBE_BLOCKS = 16
PROBE_EVERY_MS = 30_000
HIT_SHARE_MIN = 0.1
"""However often nothing was there: others may have written meanwhile."""
TIME_MARGIN = 2.0
"""A fetch is planned to take no more than the limit by this, as estimates are off now and then."""
NO_TIER = "none"


class Reason(StrEnum):
    CHEAPER = "fetching is faster"
    WHILE_WAITING = "what comes while it waits"
    UNMEASURED = "nothing measured yet"
    PROBE = "nothing measured lately"
    DEARER = "computing is faster"
    NO_TIME = "no time left"


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a job lacks, and what it would do without the service.

    `blocks` of `block_bytes` each. `token_ms`: what computing a token takes (0: not measured).
    `wait_ms`: until the engine would begin. `left_ms`: what the lookup may take. `tier`: where the
    run's head came from, if some of it has been fetched.
    """

    blocks: int
    block_bytes: int
    token_ms: float
    wait_ms: float
    left_ms: float
    tier: str = NO_TIER


@dataclass(frozen=True, slots=True)
class Fetch:
    """Ask for the first `blocks`: it may take `fetch_ms`, and computing them `compute_ms`."""

    blocks: int
    reason: Reason
    fetch_ms: float = 0.0
    compute_ms: float = 0.0


class _Average:
    """Exponential, with a half-life of HALF_LIFE_FETCHES; None before the first value."""

    def __init__(self) -> None:
        self.value: float | None = None

    def note(self, value: float) -> None:
        keep = 0.0 if self.value is None else 0.5 ** (1 / HALF_LIFE_FETCHES)
        self.value = keep * (self.value or 0.0) + (1 - keep) * value


class Speeds:
    """What the cache service takes, as measured by this worker."""

    def __init__(self) -> None:
        self._round_trip = _Average()
        self._byte_ms: dict[str, _Average] = {}
        self._shares: dict[str, _Average] = {}
        self._hit_share = _Average()
        self._measured_ms: int | None = None

    def note(
        self, *, asked: int, found: int, tier: str, size_bytes: int, took_ms: float, now_ms: int
    ) -> None:
        """A lookup of `asked` blocks brought `found` of them, of `size_bytes`, from `tier`."""
        assert 0 <= found <= asked and asked > 0, "what is found was asked for"
        self._hit_share.note(found / asked)
        if size_bytes < BYTES_MEASURED_MIN:
            self._round_trip.note(took_ms)
            return
        self._measured_ms = now_ms
        sending_ms = took_ms - min(self.round_trip_ms, took_ms / 2)
        self._byte_ms.setdefault(tier, _Average()).note(max(BYTE_MS_MIN, sending_ms / size_bytes))
        self._shares.setdefault(tier, _Average())
        for name, share in self._shares.items():
            share.note(float(name == tier))

    @property
    def round_trip_ms(self) -> float:
        return self._round_trip.value or 0.0

    @property
    def hit_share(self) -> float:
        """Of the blocks asked for, how many were mostly there."""
        share = 1.0 if self._hit_share.value is None else self._hit_share.value
        return max(HIT_SHARE_MIN, share)

    def byte_ms(self, tier: str = NO_TIER) -> float | None:
        """What a byte takes from `tier`, or from where they mostly come; None: not measured."""
        known = self._byte_ms.get(tier)
        if known is not None:
            return known.value
        weights = {name: share.value or 0.0 for name, share in self._shares.items()}
        total = sum(weights.values())
        if not total:
            return None
        return sum(w * (self._byte_ms[name].value or 0.0) for name, w in weights.items()) / total

    def is_stale(self, now_ms: int) -> bool:
        return self._measured_ms is None or now_ms - self._measured_ms >= PROBE_EVERY_MS

    def note_probe(self, now_ms: int) -> None:
        """A probe was made: the next one is due a while later, whatever this one brings."""
        self._measured_ms = now_ms


def plan(wanted: Wanted, speeds: Speeds, now_ms: int) -> Fetch:
    """How many blocks to ask for now. Asked again with what is left, it goes on or ends it."""
    if wanted.left_ms <= 0 or not wanted.blocks:
        return Fetch(0, Reason.NO_TIME)
    byte_ms = speeds.byte_ms(wanted.tier)
    if byte_ms is None:
        # a first part is enough to learn from, and what follows is planned on it
        return Fetch(min(wanted.blocks, PROBE_BLOCKS), Reason.UNMEASURED)
    block_ms = byte_ms * wanted.block_bytes
    computed_ms = wanted.token_ms * BLOCK_TOKENS
    trip_ms = speeds.round_trip_ms
    in_time = _fitting(wanted.left_ms / TIME_MARGIN - trip_ms, block_ms, wanted.blocks)
    waiting = _fitting(wanted.wait_ms - trip_ms, block_ms, wanted.blocks)
    if not wanted.token_ms:
        return _fetch(in_time, Reason.UNMEASURED, trip_ms, block_ms, computed_ms)
    share = speeds.hit_share if wanted.tier == NO_TIER else 1.0
    cost_ms = trip_ms + share * in_time * block_ms - wanted.wait_ms
    if in_time and block_ms < computed_ms and cost_ms < share * in_time * computed_ms:
        return _fetch(in_time, Reason.CHEAPER, trip_ms, block_ms, computed_ms)
    part = min(waiting, in_time)
    if part:
        return _fetch(part, Reason.WHILE_WAITING, trip_ms, block_ms, computed_ms)
    if speeds.is_stale(now_ms):
        probed = min(wanted.blocks, PROBE_BLOCKS)
        return _fetch(probed, Reason.PROBE, trip_ms, block_ms, computed_ms)
    reason = Reason.DEARER if in_time else Reason.NO_TIME
    return _fetch(0, reason, trip_ms, block_ms, computed_ms)


def _fitting(time_ms: float, block_ms: float, blocks_max: int) -> int:
    """How many blocks of `block_ms` come within `time_ms`."""
    return max(0, min(blocks_max, math.floor(time_ms / block_ms)))


def _fetch(
    blocks: int, reason: Reason, trip_ms: float, block_ms: float, computed_ms: float
) -> Fetch:
    if not blocks and reason is Reason.UNMEASURED:
        reason = Reason.NO_TIME
    fetch_ms = trip_ms + blocks * block_ms if blocks else 0.0
    return Fetch(blocks, reason, fetch_ms, blocks * computed_ms)
