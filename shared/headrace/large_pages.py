"""Large pages for what a process keeps as long as it serves.

A request that comes after a pause finds little of Python's objects in a core's caches, and of each
page that it touches the core has to look up the place first. In pages of 2 MiB there are few.
Invariant: advice to the kernel alone; where it knows no such call (Linux before 6.1, other systems)
nothing changes. Rejected: asking for large pages ahead of use, with which memory that is hardly
used would be taken whole; only what stands there already is moved together.
"""

from __future__ import annotations

import contextlib
import ctypes
import sys
from pathlib import Path

PAGE_BYTES = 2 * 1024 * 1024
_COLLAPSE = 25
"""MADV_COLLAPSE: move what lies in small pages here into a large one, now."""


def gather() -> int:
    """Move this process's own memory, as far as it fills them, into large pages; how many.

    Takes some ten milliseconds: for a start, before anybody waits.
    """
    if not sys.platform.startswith("linux"):
        return 0
    advise = ctypes.CDLL(None).madvise
    advise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return sum(
        not advise(at, PAGE_BYTES, _COLLAPSE)
        for first, last in _own_memory()
        for at in range(-(-first // PAGE_BYTES) * PAGE_BYTES, last - PAGE_BYTES + 1, PAGE_BYTES)
    )


def _own_memory() -> list[tuple[int, int]]:
    """First byte of, and behind, each range that may be written and belongs to no file."""
    found = []
    with contextlib.suppress(OSError), Path("/proc/self/maps").open() as maps:
        for line in maps:
            where, rights, _, _, inode, *name = line.split()
            if rights.startswith("rw-p") and inode == "0" and name[:1] in ([], ["[heap]"]):
                first, _, last = where.partition("-")
                found.append((int(first, 16), int(last, 16)))
    return found
