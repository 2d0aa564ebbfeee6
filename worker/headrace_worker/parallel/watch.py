"""Whether the other ranks live: a thread that looks at processes and beats.

Invariant: a worker whose rank is gone or hangs ends as a whole, and says why; nobody tries to go
on without a part of the model. An ended process is seen at once. A hang is a rank that has not
beaten for `ticks_max` ticks of this thread: ticks, not time, so that a machine which stood still
blames nobody.
Rejected: waiting for the step to run into its own limit, which has to be longer than any step and
so than a lease.
"""

from __future__ import annotations

import subprocess
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

TICK_S = 0.1
BEAT_S = 0.1
TICKS_MIN = 10
HANG_LEASE_PERCENT = 70
"""A rank that gives no sign of life for so much of the worker's lease hangs."""

BAD_SETTING_EXIT = 2
"""What a rank ends with when starting it again would not help."""
LOST_EXIT = 70
"""What a worker ends with when a rank of it is lost."""


@dataclass(frozen=True, slots=True)
class Loss:
    """A rank is gone. `exit_code`: what the worker shall end with."""

    reason: str
    exit_code: int = LOST_EXIT


class Beats:
    """Which ranks have not beaten lately. Pure: one `tick` with all counts at a time."""

    def __init__(self, ticks_max: int, own: int = 0) -> None:
        """`own`: the rank that looks."""
        self._ticks_max, self._own = ticks_max, own
        self._last: list[int] = []
        self._missed: list[int] = []

    def tick(self, counts: Sequence[int]) -> int | None:
        """The first rank that has not beaten for too long; None while all do.

        A rank that has not beaten yet is still starting.
        """
        if len(counts) != len(self._last):
            self._last, self._missed = [0] * len(counts), [0] * len(counts)
        for rank in range(len(counts)):
            moved = rank == self._own or counts[rank] != self._last[rank] or not counts[rank]
            self._missed[rank] = 0 if moved else self._missed[rank] + 1
        self._last = list(counts)
        return next((r for r, n in enumerate(self._missed) if n >= self._ticks_max), None)


class Watch:
    """Calls `on_loss` once, in a thread of its own, when a rank is lost."""

    def __init__(
        self,
        beats: Callable[[], list[int]],
        children: Sequence[subprocess.Popen[bytes]],
        on_loss: Callable[[Loss], None],
        *,
        hang_ms: int,
        own: int = 0,
    ) -> None:
        """`own`: the rank of this process. `children`: those of ranks 1, 2, …, where it has any."""
        self._beats, self._children, self._on_loss = beats, children, on_loss
        self._look = Beats(max(TICKS_MIN, round(hang_ms / 1000 / TICK_S)), own)
        self._hang_ms = hang_ms
        self._stop = threading.Event()
        self._serving = False
        self.loss: Loss | None = None
        self._thread = threading.Thread(target=self._run, name="rank watch", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def note_serving(self) -> None:
        """From now on ranks that do not beat hang; reading a model may hold up a process's threads
        for long."""
        self._serving = True

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(TICK_S):
            self.loss = self._ended() or self._hanging()
            if self.loss is not None:
                self._on_loss(self.loss)
                return

    def _ended(self) -> Loss | None:
        for rank, child in enumerate(self._children, 1):
            code = child.poll()
            if code is not None:
                how = f"was ended by signal {-code}" if code < 0 else f"ended with exit code {code}"
                bad = BAD_SETTING_EXIT if code == BAD_SETTING_EXIT else LOST_EXIT
                return Loss(f"rank {rank} (pid {child.pid}) {how}", bad)
        return None

    def _hanging(self) -> Loss | None:
        rank = self._look.tick(self._beats()) if self._serving else None
        if rank is None:
            return None
        return Loss(f"rank {rank} has given no sign of life for {self._hang_ms} ms")


class Pulse:
    """Beats for one rank, in a thread of its own."""

    def __init__(self, beat: Callable[[], None]) -> None:
        self._beat = beat
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="rank pulse", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(BEAT_S):
            self._beat()
