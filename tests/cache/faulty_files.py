"""A directory whose system calls fail, stop half-way or lie, as a seed says."""

from __future__ import annotations

import errno
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from headrace.frames import Buffer
from headrace_cache.disk_files import Files


class Killed(BaseException):
    """The process ends here: nothing of it runs on."""


@dataclass(frozen=True, slots=True)
class Faults:
    """How often a call goes wrong (0 to 1), and at which call the process is killed (0: never)."""

    short: float = 0.0
    full: float = 0.0
    broken: float = 0.0
    flipped: float = 0.0
    kill_at: int = 0


class FaultyFiles(Files):
    """Real files below; above them whatever `faults` asks for, drawn from `rng`."""

    def __init__(self, directory: Path, rng: random.Random, faults: Faults | None = None) -> None:
        super().__init__(directory)
        self.faults = faults or Faults()
        self.calls = 0
        self.open_fds: set[int] = set()
        self._rng = rng

    def _call(self) -> None:
        self.calls += 1
        if self.calls == self.faults.kill_at:
            raise Killed

    def _strikes(self, rate: float) -> bool:
        return rate > 0 and self._rng.random() < rate

    def create(self, name: str) -> int:
        self._call()
        if self._strikes(self.faults.full):
            raise OSError(errno.ENOSPC, "no inode left")
        fd = super().create(name)
        self.open_fds.add(fd)
        return fd

    def open(self, name: str) -> int:
        self._call()
        fd = super().open(name)
        self.open_fds.add(fd)
        return fd

    def append(self, fd: int, buffers: Sequence[Buffer]) -> int:
        try:
            self._call()
        except Killed:
            self._append_part(fd, buffers)
            raise
        if self._strikes(self.faults.full):
            self._append_part(fd, buffers)
            raise OSError(errno.ENOSPC, "no space left")
        if self._strikes(self.faults.broken):
            raise OSError(errno.EIO, "input/output error")
        if self._strikes(self.faults.short):
            return self._append_part(fd, buffers)
        return super().append(fd, buffers)

    def _append_part(self, fd: int, buffers: Sequence[Buffer]) -> int:
        joined = b"".join(buffers)
        part = joined[: self._rng.randint(1, len(joined))]
        return super().append(fd, [part])

    def read(self, fd: int, buffers: Sequence[bytearray | memoryview], offset: int) -> int:
        self._call()
        if self._strikes(self.faults.broken):
            raise OSError(errno.EIO, "input/output error")
        if self._strikes(self.faults.short):
            first = memoryview(buffers[0])
            return super().read(fd, [first[: self._rng.randint(1, len(first))]], offset)
        count = super().read(fd, buffers, offset)
        if self._strikes(self.faults.flipped) and count:
            buffer = self._rng.choice(buffers)
            buffer[self._rng.randrange(len(buffer))] ^= 1 << self._rng.randrange(8)
        return count

    def size(self, fd: int) -> int:
        self._call()
        return super().size(fd)

    def truncate(self, fd: int, size_bytes: int) -> None:
        self._call()
        if self._strikes(self.faults.broken):
            raise OSError(errno.EIO, "input/output error")
        super().truncate(fd, size_bytes)

    def sync(self, fd: int) -> None:
        """Nothing: what the kernel has survives a kill, and a loss of power is not played here."""
        self._call()
        if self._strikes(self.faults.broken):
            raise OSError(errno.EIO, "input/output error")

    def sync_names(self) -> None:
        self.sync(-1)

    def close(self, fd: int) -> None:
        self._call()
        self.open_fds.discard(fd)
        super().close(fd)

    def unlink(self, name: str) -> None:
        self._call()
        if self._strikes(self.faults.broken):
            raise OSError(errno.EIO, "input/output error")
        super().unlink(name)

    def bury(self) -> None:
        """Close what a killed process left open, as its kernel would."""
        for fd in sorted(self.open_fds):
            super().close(fd)
        self.open_fds.clear()
