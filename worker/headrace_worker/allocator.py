"""Keeps glibc from giving memory back between two layers of a step.

Invariant: best effort, before the model is loaded; another libc is left alone. A batch's attention
gathers tens of megabytes a layer; glibc maps such a block anew each time and the kernel zeroes it
page by page, which took more of a step of 32 rows at 1,024 tokens than the arithmetic. Rejected:
environment variables, which whoever starts a worker by hand would miss.
"""

from __future__ import annotations

import contextlib
import ctypes

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""From glibc's malloc.h."""
MMAP_BYTES = 2**30
TRIM_BYTES = 2**31 - 1


def keep_freed_memory() -> None:
    """Blocks below MMAP_BYTES come from the heap, whose free top of up to TRIM_BYTES stays."""
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_THRESHOLD, MMAP_BYTES)
        mallopt(M_TRIM_THRESHOLD, TRIM_BYTES)
