"""A client's view of the cache service's arena, where both run on one host.

Invariant: as long as any part of the arena is mapped here, this client's byte of the file is
locked; the kernel ends the lock with the mapping, however this process ends. So the service knows
for sure when nobody can read or write what it lent, and reuses it only then.
Rejected: leases that end by time alone. A process that was stopped in the middle of a copy and
wakes up later would write into somebody else's entry.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import stat
import struct

from headrace.errors import WireError
from headrace.frames import Welcome

ARENA_MAGIC = b"HRARENA\x01"
HEADER = struct.Struct("<8s16sQ")
"""Magic with version, nonce, size in bytes: the start of the file."""

HEADER_BYTES = 4096 + 512
"""Not a whole page: on some CPUs (AMD Zen 3 and 4) a copy takes four times as long where its target
is a few bytes further into a page than its source, as memory from malloc would be."""

POPULATE_BYTES = 2 * 1024 * 1024
MADV_POPULATE_WRITE = 23
"""Linux 5.14: maps pages ahead of their use, at a tenth of what a fault for each costs."""

_FLOCK = struct.Struct("hhqqi4x")


def lock_byte(file: int, seat: int) -> None:
    """Lock byte number `seat` of `file` for its open description. Raises OSError if it is taken."""
    fcntl.fcntl(file, fcntl.F_OFD_SETLK, _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, seat, 1, 0))


def is_locked(file: int, seat: int) -> bool:
    """Whether another open description holds the lock of byte number `seat`."""
    asked = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, seat, 1, 0)
    answer = fcntl.fcntl(file, fcntl.F_OFD_GETLK, asked)
    return bool(_FLOCK.unpack(answer)[0] != fcntl.F_UNLCK)


class ArenaView:
    """The mapped arena. Views of it keep it mapped, and the lock held, as long as they live."""

    def __init__(self, mapped: mmap.mmap, size_bytes: int) -> None:
        self._mapped = mapped
        self._all = memoryview(mapped)
        self._size_bytes = size_bytes
        self._populated = bytearray(size_bytes // POPULATE_BYTES + 1)

    @classmethod
    def open(cls, welcome: Welcome) -> ArenaView | None:
        """The arena that `welcome` tells of; None where it is not to be had from here."""
        if not welcome.path:
            return None
        try:
            file = os.open(welcome.path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError:
            return None
        try:
            if not _is_the_one(file, welcome):
                return None
            lock_byte(file, welcome.seat)
            # the mapping keeps a duplicate of the descriptor, and with it the lock
            return cls(mmap.mmap(file, welcome.size_bytes), welcome.size_bytes)
        except (OSError, ValueError):
            return None
        finally:
            os.close(file)

    def view(self, place: int, size_bytes: int) -> memoryview:
        """`size_bytes` at `place`. Raises WireError if that is not within the arena."""
        if place < HEADER_BYTES or place + size_bytes > self._size_bytes:
            raise WireError(f"{size_bytes} bytes at {place} are not within the arena")
        self._populate(place, size_bytes)
        return self._all[place : place + size_bytes]

    def _populate(self, place: int, size_bytes: int) -> None:
        for part in range(place // POPULATE_BYTES, (place + size_bytes - 1) // POPULATE_BYTES + 1):
            if not self._populated[part]:
                self._populated[part] = 1
                start = part * POPULATE_BYTES
                length = min(POPULATE_BYTES, self._size_bytes - start)
                # an older kernel, or a part beyond what the service has grown to: faults do it
                with contextlib.suppress(OSError):
                    self._mapped.madvise(MADV_POPULATE_WRITE, start, length)


def _is_the_one(file: int, welcome: Welcome) -> bool:
    """Whether `file` is the arena of the service that said `welcome`."""
    found = os.fstat(file)
    if not stat.S_ISREG(found.st_mode) or found.st_size != welcome.size_bytes:
        return False
    expected = HEADER.pack(ARENA_MAGIC, welcome.nonce, welcome.size_bytes)
    return os.pread(file, HEADER.size, 0) == expected
