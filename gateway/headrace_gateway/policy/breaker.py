"""Takes workers out whose tokens stall or whose jobs fail, and lets them back by one probe.

Invariant: an open breaker's worker gets nothing; a half-open one's gets one job at a time that
nobody else follows until it has shown tokens. A lease only says that a worker's process lives: one
whose device hangs keeps its heartbeat and swallows whatever it is sent.

A breaker opens when a worker with jobs has shown no token for STALL_MS, or after FAILURES_MAX jobs
in a row failed there. It is looked at again after a cool-down that doubles each time, up to a
bound; tokens from a stalled worker end the cool-down at once. Rejected: judging by latency, which
takes out whoever was given the longest prompts; taking a worker out for one failure, which a caller
could bring about.
Source: the circuit breaker of Nygard, "Release It!" (2007).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

STALL_MS = 5_000
"""Well above the 250 ms between reports and the longest step."""
FAILURES_MAX = 3
COOL_DOWN_MS = 2_000
COOL_DOWN_MS_MAX = 60_000


class State(Enum):
    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half open"


# asking an enum for a member costs as much as ten look-ups of a name
_CLOSED, _OPEN, _HALF_OPEN = State.CLOSED, State.OPEN, State.HALF_OPEN


class News(Enum):
    """What can happen to a breaker."""

    STALLED = "no token for too long"
    FAILED = "several jobs in a row failed"
    COOLED = "the cool-down is over"
    TOKENS = "tokens came"


TRANSITIONS: dict[State, dict[News, State]] = {
    State.CLOSED: {News.STALLED: State.OPEN, News.FAILED: State.OPEN},
    State.OPEN: {News.COOLED: State.HALF_OPEN},
    State.HALF_OPEN: {
        News.STALLED: State.OPEN,
        News.FAILED: State.OPEN,
        News.TOKENS: State.CLOSED,
    },
}


@dataclass(frozen=True, slots=True)
class BreakerConfig:
    """What can be tuned. `stall_ms` has to exceed a worker's longest step."""

    stall_ms: int = STALL_MS
    failures_max: int = FAILURES_MAX
    cool_down_ms: int = COOL_DOWN_MS
    cool_down_ms_max: int = COOL_DOWN_MS_MAX


@dataclass(slots=True)
class _Breaker:
    """`quiet_ms`: since when a token is awaited. `probe`: a job was sent while half open."""

    state: State = State.CLOSED
    quiet_ms: int = 0
    failures: int = 0
    cool_down_ms: int = 0
    until_ms: int = 0
    stalled: bool = False
    probe: bool = False


class Breakers:
    """A breaker for each worker that was sent something; bounded by `forget`."""

    def __init__(self, running: Callable[[str], int], config: BreakerConfig | None = None) -> None:
        """`running` tells how many jobs a worker has: without any it owes no tokens."""
        self._running = running
        self._config = config or BreakerConfig()
        self._breakers: dict[str, _Breaker] = {}

    def dispatched(self, worker: str, now_ms: int) -> None:
        """A job goes to `worker`, which has it in `running` by now."""
        breaker = self._breakers.get(worker)
        if breaker is None:
            breaker = self._breakers[worker] = _Breaker()
        if self._running(worker) <= 1:
            breaker.quiet_ms = now_ms
        if breaker.state is _CLOSED and now_ms - breaker.quiet_ms < self._config.stall_ms:
            return  # as most are, most of the time
        self._look(worker, breaker, now_ms)
        if breaker.state is _HALF_OPEN:
            breaker.quiet_ms, breaker.probe = now_ms, True

    def progress(self, worker: str, now_ms: int, tokens: int) -> None:
        """`worker` computed or made `tokens`, or ended a job well."""
        breaker = self._breakers.get(worker)
        if breaker is None or tokens <= 0:
            return
        breaker.quiet_ms = now_ms
        if breaker.state is _OPEN and breaker.stalled:
            self._move(breaker, News.COOLED, now_ms)
        elif breaker.state is _HALF_OPEN and breaker.probe:
            self._move(breaker, News.TOKENS, now_ms)

    def succeeded(self, worker: str, now_ms: int) -> None:
        """A job came to its own end on `worker`."""
        breaker = self._breakers.get(worker)
        if breaker is not None:
            breaker.failures = 0
            self.progress(worker, now_ms, 1)

    def failed(self, worker: str, now_ms: int) -> None:
        """A job failed on `worker` by no fault of its caller's."""
        breaker = self._breakers.setdefault(worker, _Breaker())
        breaker.quiet_ms = now_ms
        breaker.failures += 1
        probe_failed = breaker.state is _HALF_OPEN and breaker.probe
        many = breaker.state is _CLOSED and breaker.failures >= self._config.failures_max
        if probe_failed or many:
            self._move(breaker, News.FAILED, now_ms)

    def allows(self, worker: str, now_ms: int) -> bool:
        """Whether a job may go to `worker`."""
        breaker = self._breakers.get(worker)
        if breaker is None:
            return True
        if breaker.state is _CLOSED and now_ms - breaker.quiet_ms < self._config.stall_ms:
            return True  # as most are, most of the time
        self._look(worker, breaker, now_ms)
        if breaker.state is _HALF_OPEN:
            # a probe that was taken back or cancelled has told nothing: the next one may go
            return not breaker.probe or not self._running(worker)
        return breaker.state is _CLOSED

    def state(self, worker: str, now_ms: int) -> State:
        breaker = self._breakers.get(worker)
        if breaker is None:
            return State.CLOSED
        self._look(worker, breaker, now_ms)
        return breaker.state

    def forget(self, worker: str) -> None:
        self._breakers.pop(worker, None)

    def check_integrity(self) -> None:
        for breaker in self._breakers.values():
            assert breaker.state is _HALF_OPEN or not breaker.probe, "who is half open probes"
            assert breaker.cool_down_ms <= self._config.cool_down_ms_max, "cool-downs are bounded"
            assert breaker.state is _CLOSED or breaker.cool_down_ms > 0

    def _look(self, worker: str, breaker: _Breaker, now_ms: int) -> None:
        """Bring a breaker up to now."""
        if breaker.state is _OPEN:
            if now_ms >= breaker.until_ms:
                self._move(breaker, News.COOLED, now_ms)
            return
        awaited = breaker.state is _CLOSED or breaker.probe
        silent = now_ms - breaker.quiet_ms >= self._config.stall_ms
        if awaited and silent and self._running(worker):
            self._move(breaker, News.STALLED, now_ms)

    def _move(self, breaker: _Breaker, news: News, now_ms: int) -> None:
        breaker.state = TRANSITIONS[breaker.state][news]
        breaker.probe = False
        if breaker.state is _OPEN:
            config = self._config
            doubled = max(config.cool_down_ms, 2 * breaker.cool_down_ms)
            breaker.cool_down_ms = min(config.cool_down_ms_max, doubled)
            breaker.until_ms = now_ms + breaker.cool_down_ms
            breaker.stalled = news is News.STALLED
        elif breaker.state is _CLOSED:
            breaker.cool_down_ms = breaker.failures = 0
