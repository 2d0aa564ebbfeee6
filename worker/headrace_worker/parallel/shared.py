"""Memory that the ranks of one host have in common, and waiting for what others write there.

Invariant: the memory has no name: it is a file descriptor that rank 0 makes and its children
inherit, so that nothing is left behind however all of them end. It only grows, and whoever maps a
part knows from rank 0 that it is there. A `Bell` has one writer.

Rejected: files in /dev/shm, which a killed worker leaves and a container limits to 64 MiB; sleeping
between looks, which costs half a sleep a message and an idle rank a few percent of a core.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import platform
import sys
import time
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from headrace.errors import ModelError

LINE_BYTES = 64
"""Numbers of different writers stand on cache lines of their own."""
SPINS = 200
"""Looks before a wait goes to the kernel."""
LOOK_S = 0.2
"""A wait that is told of nothing looks after so long again."""

_FUTEX_CALLS = {"x86_64": 202, "aarch64": 98}
_WAIT, _WAKE = 0, 1


class SharedMemory:
    """Zeroed memory of several processes; see `fd`, which children inherit by `pass_fds`."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    @classmethod
    def create(cls, name: str = "headrace") -> SharedMemory:
        """Raises ModelError on a system that has no such memory, or that would reorder writes."""
        if not hasattr(os, "memfd_create") or platform.machine() not in ("x86_64", "AMD64"):
            raise ModelError(
                f"ranks on one host share memory on Linux and x86-64, not on {sys.platform} "
                f"{platform.machine()}: start them with torchrun"
            )
        return cls(os.memfd_create(name))

    def grow(self, size_bytes: int) -> int:
        """Adds `size_bytes`; where they begin. For rank 0 alone."""
        start = os.fstat(self.fd).st_size
        pages = -(-size_bytes // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY
        os.ftruncate(self.fd, start + pages)
        return start

    def map(self, start: int, size_bytes: int) -> NDArray[np.uint8]:
        """The bytes from `start`, which `grow` gave, on."""
        memory = mmap.mmap(self.fd, size_bytes, offset=start)
        with contextlib.suppress(AttributeError, OSError):
            memory.madvise(mmap.MADV_HUGEPAGE)
        return np.frombuffer(memory, np.uint8)

    def close(self) -> None:
        os.close(self.fd)


class Bell:
    """A counter on a line of shared memory: one process rings, others wait until it has."""

    def __init__(self, line: NDArray[np.uint8]) -> None:
        """`line`: LINE_BYTES of shared memory, of which this takes the first four bytes."""
        self._count = line.data[:4].cast("I")
        self._address = line.ctypes.data
        self._line = line  # keeps the mapping

    @property
    def count(self) -> int:
        return self._count[0]

    def ring(self) -> None:
        self._count[0] = (self._count[0] + 1) & 0xFFFFFFFF
        _futex(self._address, _WAKE, 2**31 - 1, 0.0)

    def wait(self, seen: int, timeout_s: float) -> None:
        """Until it rang since `count` was `seen`, or `timeout_s` are over, or for no reason."""
        if self._count[0] == seen:
            _futex(self._address, _WAIT, seen, timeout_s)


def wait_for(ready: Callable[[], bool], bell: Bell, timeout_s: float) -> bool:
    """Until `ready`; False when it is not after `timeout_s`. `bell` rings when it may have become
    so."""
    for _ in range(SPINS):
        if ready():
            return True
    until_s = time.monotonic() + timeout_s
    while True:
        seen = bell.count
        if ready():
            return True
        left_s = until_s - time.monotonic()
        if left_s <= 0:
            return False
        bell.wait(seen, min(left_s, LOOK_S))


class _Timespec(ctypes.Structure):
    _fields_ = [("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long)]  # ctypes


def _make_futex() -> Callable[[int, int, int, float], None]:
    """The system call futex(2), or a nap where this system has none."""
    call = _FUTEX_CALLS.get(platform.machine())
    if not sys.platform.startswith("linux") or call is None:

        def nap(address: int, operation: int, value: int, timeout_s: float) -> None:  # noqa: ARG001
            if operation == _WAIT:
                time.sleep(min(timeout_s, 1e-4))

        return nap
    syscall = ctypes.CDLL(None, use_errno=True).syscall
    syscall.argtypes = [ctypes.c_long, ctypes.c_void_p, ctypes.c_int, ctypes.c_uint32]
    syscall.argtypes += [ctypes.POINTER(_Timespec), ctypes.c_void_p, ctypes.c_uint32]

    def futex(address: int, operation: int, value: int, timeout_s: float) -> None:
        limit = _Timespec(int(timeout_s), int(timeout_s % 1 * 1e9)) if timeout_s else None
        syscall(call, address, operation, value, limit and ctypes.byref(limit), None, 0)

    return futex


_futex = _make_futex()
