"""Copying bytes, and checking the copy, while other threads run.

Where there is a compiler, whole batches are copied and checked by C of our own (`csrc/copying.c`),
in one call without Python's lock; else piece by piece, by memmove and the CRC's package.

Invariant: what is copied is what a slice assignment would copy; a checksum is the copy's own.
Rejected: slice assignment for large copies. It keeps Python's lock, so that a thread which copies
and checks entry after entry starves the event loop beside it, for the interpreter's whole switch
interval at a time; numpy, which the gateway and the service would need for nothing else.
"""

from __future__ import annotations

import ctypes
import os
import threading
from array import array
from collections.abc import Sequence

import structlog

from headrace.checksum import checksum
from headrace.compiled import COPYING, BuildError
from headrace.frames import Buffer

LOCKED_BYTES_MAX = 32 * 1024
"""Copied under Python's lock: some microseconds."""

CHECKED_BYTES = 512 * 1024
"""Copied and then checked at a time: still in the CPU's nearer caches."""

VARIABLE = "HEADRACE_KERNELS"
"""`off`: no C of our own, as for the worker's kernels."""

LINE_BYTES = 64
WORD_BYTES = 8

_JOB_WORDS = 4
"""Of a job in C: target, source, size, and the CRC that is its answer."""

log = structlog.get_logger(__name__)


def copy_bytes(target: memoryview, source: Buffer) -> None:
    """Copy `source` to `target`, which is as long and does not overlap with it.

    Both are of bytes, one after the other. Raises ValueError where the lengths differ.
    """
    _check_lengths(target, source)
    if len(source) <= LOCKED_BYTES_MAX or not (start := _address(source)):
        target[:] = source
    else:
        ctypes.memmove(_address(target), start, len(source))


def copy_checked(target: memoryview, source: Buffer) -> int:
    """Copy `source` to `target` as `copy_bytes` does; the CRC-32C of the copy."""
    size_bytes = len(source)
    if size_bytes <= CHECKED_BYTES or not (from_address := _address(source)):
        copy_bytes(target, source)
        return checksum(target)
    _check_lengths(target, source)
    to_address = _address(target)
    crc = 0
    for start in range(0, size_bytes, CHECKED_BYTES):
        end = min(start + CHECKED_BYTES, size_bytes)
        ctypes.memmove(to_address + start, from_address + start, end - start)
        crc = checksum(target[start:end], crc)
    return crc


def _check_lengths(target: memoryview, source: Buffer) -> None:
    if len(target) != len(source):
        raise ValueError(f"{len(source)} bytes do not fit a place of {len(target)}")


def _address(buffer: Buffer) -> int:
    """Where the bytes of `buffer` lie: there, while nobody resizes it; 0 if that is not to be had.

    The caller has the buffer, and whoever it is from has promised to leave it as it is.
    """
    if isinstance(buffer, bytes):
        return ctypes.cast(ctypes.c_char_p(buffer), ctypes.c_void_p).value or 0
    if isinstance(buffer, memoryview) and (buffer.readonly or not buffer.contiguous):
        return 0
    return ctypes.addressof(ctypes.c_char.from_buffer(buffer))


def _addresses(buffers: Sequence[Buffer]) -> list[int]:
    """`_address` of each."""
    try:
        return list(map(ctypes.addressof, map(ctypes.c_char.from_buffer, buffers)))
    except TypeError:  # one of them cannot be written to, or is not in one piece
        return list(map(_address, buffers))


def copy_numbers(to: int, source: int, size_bytes: int, width: int, most: int) -> int | None:
    """Copy numbers of 2 or 4 bytes from one address to another, which do not overlap, in C.

    The CRC-32C of the copy; -1 where a number in it, without its sign bit, is above `most` when its
    bits are read as an integer, as infinities and what is no number are. None, and nothing is
    copied, where that is not to be done in C. The caller keeps both places where they are.
    """
    library = _library.found
    if library is None or to % LINE_BYTES or size_bytes % WORD_BYTES or width not in (2, 4):
        return None
    return int(library.headrace_copy_numbers(to, source, size_bytes, width, most))


class Copies:
    """A batch of copies in C, or of checksums where there is no target; `crcs` are the answers.

    Any number of threads may `run` it at a time: they share its entries out among them.
    """

    def __init__(self, library: ctypes.CDLL, jobs: array[int], held: object) -> None:
        self._library = library
        self._jobs = jobs
        self._count = len(jobs) // _JOB_WORDS
        self._next = array("q", [0])
        self._held = held
        """Keeps the buffers where they are."""

    @classmethod
    def of(cls, targets: Sequence[memoryview | None], sources: Sequence[Buffer]) -> Copies | None:
        """`sources` to `targets`, which are as long; None where that is not to be done in C.

        Raises ValueError where a target has another length.
        """
        library = _library.found
        if library is None:
            return None
        for target, source in zip(targets, sources, strict=True):
            if target is not None and len(target) != len(source):
                _check_lengths(target, source)
        wanted = [target for target in targets if target is not None]
        places, starts = _addresses(wanted), _addresses(sources)
        if not all(places) or not all(starts):
            return None
        found = iter(places)
        goals = [0 if target is None else next(found) for target in targets]
        jobs = array("Q", bytes(_JOB_WORDS * WORD_BYTES * len(sources)))
        columns = (goals, starts, map(len, sources))
        for number, column in enumerate(columns):
            jobs[number::_JOB_WORDS] = array("Q", column)
        return cls(library, jobs, (targets, sources))

    def run(self) -> None:
        """Do what nobody else has begun; without Python's lock."""
        jobs, following = self._jobs.buffer_info()[0], self._next.buffer_info()[0]
        self._library.headrace_copy(jobs, self._count, following)

    def run_part(self, first: int, last: int) -> None:
        """Do the entries from `first` up to `last`, which nobody else does; as `run`."""
        begun = array("q", [0])
        jobs = self._jobs.buffer_info()[0] + first * _JOB_WORDS * self._jobs.itemsize
        self._library.headrace_copy(jobs, last - first, begun.buffer_info()[0])

    def stop(self) -> None:
        """Whoever runs begins nothing more."""
        self._next[0] = self._count

    @property
    def crcs(self) -> list[int]:
        return self._jobs[_JOB_WORDS - 1 :: _JOB_WORDS].tolist()


class _Library:
    """The compiled copies: looked for once in a process, and made in the background."""

    def __init__(self) -> None:
        self.found: ctypes.CDLL | None = None
        self.state = "not asked for"
        self._asked = threading.Lock()

    def prepare(self) -> None:
        if not self._asked.acquire(blocking=False):
            return
        if os.environ.get(VARIABLE) == "off":
            self.state = "off"
            return
        try:
            if COPYING.path.exists():
                self._load()
                return
        except (OSError, RuntimeError) as error:  # the latter where there is no home directory
            self.state = str(error)
            return
        self.state = "being compiled"
        threading.Thread(target=self._load, name="headrace-compiler", daemon=True).start()

    def _load(self) -> None:
        try:
            library = ctypes.CDLL(str(COPYING.build()))
            runs_here = bool(library.headrace_copying_runs_here())
        except (BuildError, OSError, AttributeError) as error:
            self.state = str(error)
            log.info("copies are made without C of our own", reason=self.state)
            return
        if not runs_here:
            self.state = "this processor has no SSE 4.2"
            return
        pointer = ctypes.c_void_p
        library.headrace_copy.argtypes = (pointer, ctypes.c_int64, pointer)
        library.headrace_copy.restype = None
        numbers = (pointer, pointer, ctypes.c_int64, ctypes.c_int32, ctypes.c_uint32)
        library.headrace_copy_numbers.argtypes = numbers
        library.headrace_copy_numbers.restype = ctypes.c_int64
        self.found, self.state = library, "native"


_library = _Library()


def prepare() -> None:
    """Have copies made in C from now on, or from when it is compiled; once in a process."""
    _library.prepare()


def state() -> str:
    """ "native", or why not."""
    return _library.state
