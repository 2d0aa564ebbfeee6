"""The memory that entries lie in: one mapping that clients of this host may share.

A file in a memory file system (else private memory) is cut into extents of whole granules. Free
extents merge with free neighbours; the smallest that fits is taken. Memory is had from the system
step by step as it is needed, and kept.

Invariants: extents cover what was grown, without gap or overlap, and two free ones never touch; a
file's pages are reserved before they are handed out, so that a full file system is an answer and
not a fatal signal; `compact` makes room of any size that is free in sum, moving at most
MOVE_BYTES_MAX, unless what may not move is in the way.
Rejected: slabs of size classes (a change of models leaves memory in the wrong class); a memfd
passed over the socket (clients that come by TCP, or from another container, have no such socket).
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import secrets
import stat
from array import array
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import structlog

from headrace.arena_view import (
    ARENA_MAGIC,
    HEADER,
    HEADER_BYTES,
    MADV_POPULATE_WRITE,
    is_locked,
)

GRANULE_BYTES = 1024
HUGE_PAGE_BYTES = 2 * 1024 * 1024
GROWTH_BYTES = 16 * 1024 * 1024
"""Had from the system at a time: some 5 ms."""

MOVE_BYTES_MAX = 64 * 1024 * 1024
SCAN_EXTENTS_MAX = 4096
NAME_PREFIX = "headrace-arena-"
CREATE_TRIES = 5
HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage")

NOBODY = -1
"""Owns what no entry has any more and somebody still reads."""

AHEAD = -2
"""Owns what somebody may write to and no entry has yet."""

_FREE, _LIVE, _INSIDE = 0, 1, 2

log = structlog.get_logger(__name__)


def granules(size_bytes: int) -> int:
    return -(-size_bytes // GRANULE_BYTES)


class Arena:
    """Extents of one mapping, named by their place: bytes from its start."""

    def __init__(self, size_bytes: int, folder: Path | None = None) -> None:
        """Room for `size_bytes`, in a file in `folder` if that can be had.

        Raises OSError where not even the addresses for private memory are to be had.
        """
        self.capacity = granules(size_bytes)
        self.mapped_bytes = HEADER_BYTES + self.capacity * GRANULE_BYTES
        self.nonce = secrets.token_bytes(16)
        self.path = ""
        self._file = -1
        if folder is not None:
            self._create(folder)
        self._map = self._mapped()
        self._all = memoryview(self._map)
        self.huge_pages = self._ask_huge_pages()
        self._grown = 0
        # of each granule: its extent's size and state at the first and the last, _INSIDE between
        self._extent = array("I")
        self._state = bytearray()
        self._owner = array("i")  # of each granule that is the first of a live extent
        self._bins: dict[int, dict[int, None]] = {}
        self._sizes: list[int] = []
        self._live = 0
        self._cursor = 0

    # the file

    def _create(self, folder: Path) -> None:
        with contextlib.suppress(OSError):
            _remove_abandoned(folder)
            there = os.statvfs(folder)
            if there.f_bavail * there.f_frsize < self.mapped_bytes:
                log.warning("too little shared memory: clients use the socket", folder=str(folder))
                return
        for _ in range(CREATE_TRIES):
            path = folder / f"{NAME_PREFIX}{os.getpid()}-{secrets.token_hex(4)}"
            try:
                file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            except OSError as error:
                log.warning("no shared memory: clients use the socket", reason=str(error))
                return
            try:
                # the lock says that the file has an owner; whoever got it first removes the file
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.ftruncate(file, self.mapped_bytes)
                os.posix_fallocate(file, 0, HEADER_BYTES)
                os.pwrite(file, HEADER.pack(ARENA_MAGIC, self.nonce, self.mapped_bytes), 0)
                if os.path.samestat(path.stat(), os.fstat(file)):
                    self.path, self._file = str(path), file
                    return
            except OSError as error:
                log.warning("shared memory could not be set up", reason=str(error))
            os.close(file)
            path.unlink(missing_ok=True)

    def _mapped(self) -> mmap.mmap:
        if self._file >= 0:
            return mmap.mmap(self._file, self.mapped_bytes)
        return mmap.mmap(-1, self.mapped_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)

    def _ask_huge_pages(self) -> bool:
        """Ask the kernel for huge pages; whether it gives any to memory of this kind."""
        try:
            self._map.madvise(mmap.MADV_HUGEPAGE)
            said = (HUGE_PAGES / ("shmem_enabled" if self._file >= 0 else "enabled")).read_text()
        except (OSError, AttributeError):
            return False
        return not any(word in said for word in ("[never]", "[deny]"))

    def _touch(self, offset: int, size_bytes: int) -> None:
        """Have pages made by the mapping, which asked for huge ones: a file's own way to have them,
        by which they are ensured next, makes small ones."""
        start = offset // HUGE_PAGE_BYTES * HUGE_PAGE_BYTES
        length = min(offset + size_bytes, self.mapped_bytes) - start
        # an older kernel, or no room: whoever ensures them next finds out
        with contextlib.suppress(OSError):
            self._map.madvise(MADV_POPULATE_WRITE, start, length)

    def is_mapped_by(self, seat: int) -> bool:
        """Whether the client that was given `seat` has the arena mapped."""
        return self._file >= 0 and is_locked(self._file, seat)

    def close(self) -> None:
        """Remove the file. Who has it mapped keeps the memory, which nobody changes any more."""
        if self._file >= 0:
            Path(self.path).unlink(missing_ok=True)
            os.close(self._file)
            self._file, self.path = -1, ""

    # extents

    @property
    def used_bytes(self) -> int:
        """In live extents, whole granules."""
        return self._live * GRANULE_BYTES

    @property
    def free_bytes(self) -> int:
        """Not in live extents; as far as the system gives it."""
        return (self.capacity - self._live) * GRANULE_BYTES

    def view(self, place: int, size_bytes: int) -> memoryview:
        return self._all[place : place + size_bytes]

    def owner(self, place: int) -> int:
        """Whose the live extent at `place` is."""
        return self._owner[(place - HEADER_BYTES) // GRANULE_BYTES]

    def disown(self, place: int) -> None:
        """The live extent at `place` is NOBODY's from now on; it stays until it is freed."""
        self._owner[(place - HEADER_BYTES) // GRANULE_BYTES] = NOBODY

    def take(self, size_bytes: int, owner: int) -> int | None:
        """The place of a new live extent, or None where no free one fits."""
        count = granules(size_bytes)
        start = self._pop_free(count)
        if start is None and self._grow(count):
            start = self._pop_free(count)
        if start is None:
            return None
        rest = self._extent[start] - count
        self._mark(start, count, _LIVE)
        self._owner[start] = owner
        if rest:
            self._add_free(start + count, rest)
        self._live += count
        return HEADER_BYTES + start * GRANULE_BYTES

    def take_all(self, sizes: Sequence[int]) -> list[int] | None:
        """Places of live extents that are NOBODY's yet, or None, if not all fit as they are.

        One after the other where a free extent takes them all, which a chain's blocks then share:
        whoever reads or frees them finds them side by side.
        """
        counts = list(map(granules, sizes))
        start = self._pop_free(sum(counts))
        if start is not None:
            return self._cut(start, counts)
        places: list[int] = []
        for size_bytes in sizes:
            place = self.take(size_bytes, NOBODY)
            if place is None:
                self.free_all(places)
                return None
            places.append(place)
        return places

    def _cut(self, start: int, counts: Sequence[int]) -> list[int]:
        """Live extents of `counts` granules, cut from the free one at `start`, off its bin."""
        rest = self._extent[start] - sum(counts)
        places: list[int] = []
        for count in counts:
            self._mark(start, count, _LIVE)
            self._owner[start] = NOBODY
            places.append(HEADER_BYTES + start * GRANULE_BYTES)
            start += count
        if rest:
            self._add_free(start, rest)
        self._live += sum(counts)
        return places

    def own_all(self, places: Sequence[int], owners: Sequence[int]) -> None:
        """The live extents at `places` are the owners' from now on."""
        for place, owner in zip(places, owners, strict=True):
            self._owner[(place - HEADER_BYTES) // GRANULE_BYTES] = owner

    def free(self, place: int) -> None:
        """End the live extent at `place`."""
        self.free_all((place,))

    def free_all(self, places: Sequence[int]) -> None:
        """End the live extents at `places`; those side by side in one go."""
        start = end = 0
        for first in sorted((place - HEADER_BYTES) // GRANULE_BYTES for place in places):
            assert self._state[first] == _LIVE, "what is freed is live"
            count = self._extent[first]
            self._unmark(first, count)
            if first != end:
                self._free_run(start, end)
                start = first
            end = first + count
        self._free_run(start, end)

    def _free_run(self, start: int, end: int) -> None:
        """Granules `start` to `end`, live so far and unmarked, are one free extent with those
        beside them."""
        if start == end:
            return
        self._live -= end - start
        count = end - start
        if start and self._state[start - 1] == _FREE:
            before = self._extent[start - 1]
            start, count = start - before, count + before
            self._drop_free(start, before)
        if end < self._grown and self._state[end] == _FREE:
            count += self._extent[end]
            self._drop_free(end, self._extent[end])
        self._add_free(start, count)

    def _grow(self, count: int) -> bool:
        """Have more from the system, for an extent of `count` granules at the end."""
        tail = 0
        if self._grown and self._state[self._grown - 1] == _FREE:
            tail = self._extent[self._grown - 1]
        start = self._grown
        more = max(count - tail, GROWTH_BYTES // GRANULE_BYTES)
        more = min(more, self.capacity - start)
        if tail + more < count:
            return False
        if self._file >= 0:
            try:
                offset = HEADER_BYTES + start * GRANULE_BYTES
                if self.huge_pages:
                    self._touch(offset, more * GRANULE_BYTES)
                os.posix_fallocate(self._file, offset, more * GRANULE_BYTES)
            except OSError as error:
                log.warning("the arena cannot grow", grown=start * GRANULE_BYTES, reason=str(error))
                self.capacity = start
                return False
        self._extent.extend([0] * more)
        self._owner.extend([NOBODY] * more)
        self._state.extend(bytes([_INSIDE]) * more)
        self._grown += more
        if tail:
            self._drop_free(start - tail, tail)
        self._add_free(start - tail, tail + more)
        return True

    def _mark(self, start: int, count: int, state: int) -> None:
        last = start + count - 1
        self._extent[start] = self._extent[last] = count
        self._state[start] = self._state[last] = state

    def _unmark(self, start: int, count: int) -> None:
        self._state[start] = self._state[start + count - 1] = _INSIDE

    def _pop_free(self, count: int) -> int | None:
        """The first granule of the smallest free extent of at least `count`, taken off its bin."""
        at = bisect_left(self._sizes, count)
        if at == len(self._sizes):
            return None
        size = self._sizes[at]
        start, _ = self._bins[size].popitem()
        if not self._bins[size]:
            del self._bins[size], self._sizes[at]
        return start

    def _add_free(self, start: int, count: int) -> None:
        self._mark(start, count, _FREE)
        if count not in self._bins:
            self._bins[count] = {}
            insort(self._sizes, count)
        self._bins[count][start] = None

    def _drop_free(self, start: int, count: int) -> None:
        self._unmark(start, count)
        del self._bins[count][start]
        if not self._bins[count]:
            del self._bins[count]
            self._sizes.remove(count)

    # compaction

    def compact(
        self, size_bytes: int, movable: Callable[[int], bool], moved: Callable[[int, int], None]
    ) -> bool:
        """Slide live extents together until `size_bytes` are free in one piece; whether they are.

        `movable` says of a place whether its extent may be moved; `moved(owner, place)` is told of
        each that was.
        """
        window = self._window(granules(size_bytes), movable)
        if window is None:
            return False
        first, end = window
        target = start = first
        while start < end:
            count = self._extent[start]
            if self._state[start] == _FREE:
                self._drop_free(start, count)
            else:
                self._unmark(start, count)
                if target != start:
                    old = HEADER_BYTES + start * GRANULE_BYTES
                    new = HEADER_BYTES + target * GRANULE_BYTES
                    size = count * GRANULE_BYTES
                    self._all[new : new + size] = self._all[old : old + size]
                    self._owner[target] = self._owner[start]
                    moved(self._owner[start], new)
                self._mark(target, count, _LIVE)
                target += count
            start += count
        self._add_free(target, end - target)
        return True

    def _window(self, count: int, movable: Callable[[int], bool]) -> tuple[int, int] | None:
        """The run of extents with `count` free granules and the least to move, as first and end.

        It begins and ends with a free extent, which is why its neighbours are live.
        """
        best: tuple[int, int] | None = None
        best_live = MOVE_BYTES_MAX // GRANULE_BYTES + 1
        window: deque[tuple[int, int, int]] = deque()  # start, granules, state
        free = live = 0
        for start, size, state in self._some_extents():
            if state == _LIVE and not movable(HEADER_BYTES + start * GRANULE_BYTES):
                window.clear()
                free = live = 0
                continue
            if not window and state == _LIVE:
                continue
            window.append((start, size, state))
            free, live = (free + size, live) if state == _FREE else (free, live + size)
            while free >= count:
                if state == _FREE and live < best_live:
                    best, best_live = (window[0][0], start + size), live
                _, dropped, _ = window.popleft()
                free -= dropped
                while window and window[0][2] == _LIVE:
                    live -= window.popleft()[1]
        return best

    def _some_extents(self) -> Iterator[tuple[int, int, int]]:
        """At most SCAN_EXTENTS_MAX extents, from where the last call ended."""
        start = self._cursor if self._cursor < self._grown else 0
        # what stood there may have been merged with what is before it
        while start and self._state[start] == _INSIDE:
            start -= 1
        for _ in range(SCAN_EXTENTS_MAX):
            if start >= self._grown:
                break
            size = self._extent[start]
            yield start, size, self._state[start]
            start += size
        self._cursor = start if start < self._grown else 0

    def extents(self) -> Iterator[tuple[int, int, bool]]:
        """Place, bytes and whether it is live, of every extent."""
        start = 0
        while start < self._grown:
            size = self._extent[start]
            live = self._state[start] == _LIVE
            yield HEADER_BYTES + start * GRANULE_BYTES, size * GRANULE_BYTES, live
            start += size

    def check_integrity(self) -> None:
        """Assert that extents, bins and counts agree. Takes time in all extents."""
        free: dict[int, dict[int, None]] = {}
        live = covered = 0
        was_free = False
        for place, size_bytes, is_live in self.extents():
            start, size = (place - HEADER_BYTES) // GRANULE_BYTES, size_bytes // GRANULE_BYTES
            assert size > 0 and self._extent[start + size - 1] == size, "both ends say the size"
            assert self._state[start + size - 1] == self._state[start], "and the state"
            assert is_live or not was_free, "free neighbours are merged"
            covered, was_free = covered + size, not is_live
            if is_live:
                live += size
            else:
                free.setdefault(size, {})[start] = None
        assert covered == self._grown <= self.capacity, "extents cover what was grown"
        assert live == self._live, "live granules add up"
        assert free == self._bins and sorted(free) == self._sizes, "bins hold what is free"


def _remove_abandoned(folder: Path) -> None:
    """Remove arenas of this user whose service was killed: nobody holds their lock."""
    for path in sorted(folder.glob(f"{NAME_PREFIX}*")):
        try:
            file = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError:
            continue
        try:
            found = os.fstat(file)
            if stat.S_ISREG(found.st_mode) and found.st_uid == os.geteuid():
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink(missing_ok=True)
                log.info("abandoned arena removed", path=str(path), size_bytes=found.st_size)
        except OSError:
            continue
        finally:
            os.close(file)
