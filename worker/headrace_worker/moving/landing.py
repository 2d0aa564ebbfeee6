"""The memory that moved KV blocks arrive in: a few slots, which senders of this host may map.

Invariant: a slot is free, given to one connection, or landed (the engine's until it has copied it
into its pool). What a connection had been given when it ended is free again only when nobody of it
can still write there: at once where nothing was shared, else when the sender's lock is gone
(arena_view.py).
Rejected: writing into the engine's pool itself, which has no place for a block whose job may never
come; memory for each job, which a sender that hangs would hold without a bound.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import secrets
import stat
from collections import deque
from pathlib import Path

import structlog

from headrace.arena_view import ARENA_MAGIC, HEADER, HEADER_BYTES, is_locked

log = structlog.get_logger()

SLOTS_BYTES = 48 * 1024 * 1024
SLOTS_MIN, SLOTS_MAX = 32, 256
"""At least two batches, so that one is filled while the engine takes in another."""
NAME_PREFIX = "headrace-landing-"
SHARED_FOLDER = Path("/dev/shm")
LANDED = -1
"""Instead of a seat: the engine has it."""


def slots_for(block_bytes: int) -> int:
    return max(SLOTS_MIN, min(SLOTS_MAX, SLOTS_BYTES // block_bytes))


class Landing:
    """`count` slots of `block_bytes`, by number. `path` is '' where no memory can be shared."""

    def __init__(self, block_bytes: int, count: int, folder: Path | None = SHARED_FOLDER) -> None:
        self.block_bytes = block_bytes
        self.count = count
        self.size_bytes = HEADER_BYTES + count * block_bytes
        self.nonce = secrets.token_bytes(16)
        self.path = ""
        self._file = -1
        if folder is not None:
            self._create(folder)
        self._map = mmap.mmap(self._file, self.size_bytes)
        self._all = memoryview(self._map)
        self._free = deque(range(count))
        self._owner: dict[int, int] = {}
        self._ghosts: dict[int, list[int]] = {}

    def _create(self, folder: Path) -> None:
        """A file that takes its pages as they are written; -1 stays where there is none."""
        with contextlib.suppress(OSError):
            _remove_abandoned(folder)
            path = folder / f"{NAME_PREFIX}{os.getpid()}-{secrets.token_hex(4)}"
            file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # reserved, so that a full file system is an answer and not a fatal signal
                os.posix_fallocate(file, 0, self.size_bytes)
                os.pwrite(file, HEADER.pack(ARENA_MAGIC, self.nonce, self.size_bytes), 0)
            except OSError as error:
                log.warning("no shared memory: KV moves over sockets", reason=str(error))
                os.close(file)
                path.unlink(missing_ok=True)
            else:
                self.path, self._file = str(path), file

    def place(self, slot: int) -> int:
        return HEADER_BYTES + slot * self.block_bytes

    def view(self, slot: int) -> memoryview:
        return self._all[self.place(slot) : self.place(slot) + self.block_bytes]

    @property
    def free_count(self) -> int:
        return len(self._free)

    def give(self, seat: int, count: int) -> tuple[int, ...]:
        """`count` slots for the connection `seat`; there are as many."""
        assert 0 <= count <= len(self._free), "ask how many are free"
        slots = tuple(self._free.popleft() for _ in range(count))
        self._owner.update(dict.fromkeys(slots, seat))
        return slots

    def is_given(self, slot: int, seat: int) -> bool:
        return self._owner.get(slot) == seat

    def land(self, slot: int, seat: int) -> memoryview:
        """What the connection has put there; it is the engine's now."""
        assert self.is_given(slot, seat), "asked before"
        self._owner[slot] = LANDED
        return self.view(slot)

    def release(self, slot: int) -> None:
        del self._owner[slot]
        self._free.append(slot)

    def abandon(self, seat: int) -> None:
        """The connection is gone; what it had been given comes back when it cannot write there."""
        lost = [slot for slot, owner in self._owner.items() if owner == seat]
        if lost:
            self._ghosts[seat] = lost
        self.sweep()

    def sweep(self) -> None:
        """Take back what gone connections had, as far as nobody has it mapped any more."""
        for seat, slots in list(self._ghosts.items()):
            if self._file < 0 or not is_locked(self._file, seat):
                del self._ghosts[seat]
                for slot in slots:
                    self.release(slot)

    def close(self) -> None:
        if self._file >= 0:
            Path(self.path).unlink(missing_ok=True)
            os.close(self._file)
            self._file, self.path = -1, ""

    def check_integrity(self) -> None:
        assert len(self._free) + len(self._owner) == self.count, "a slot is free or somebody's"
        assert not set(self._free) & self._owner.keys(), "never both"


def _remove_abandoned(folder: Path) -> None:
    """Remove files of this user whose worker was killed: nobody holds their lock."""
    for path in sorted(folder.glob(f"{NAME_PREFIX}*")):
        with contextlib.suppress(OSError):
            file = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                found = os.fstat(file)
                if stat.S_ISREG(found.st_mode) and found.st_uid == os.geteuid():
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    path.unlink(missing_ok=True)
            finally:
                os.close(file)
