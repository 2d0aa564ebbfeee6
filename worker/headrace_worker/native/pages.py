"""Memory in large pages, where the system gives them.

Invariant: a tensor from here owns its part of a chunk; a chunk is given back when the last tensor
in it is gone. Weights are read from one end to the other in each step, and most matrices of a small
model are smaller than a large page: so they stand side by side in chunks. A mapping is private,
since the kernel gives large pages to shared ones only where `shmem_enabled` says so, which it does
not by default, and Python's mmap is shared unless it is told otherwise: decoding one stream took
a third longer in small pages.
"""

from __future__ import annotations

import contextlib
import mmap
import threading

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

CHUNK_BYTES = 32 << 20
LARGE_PAGE_BYTES = 2 << 20
LINE_BYTES = 64


class _Chunks:
    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._left: NDArray[np.uint8] = np.empty(0, np.uint8)

    def take(self, size_bytes: int) -> NDArray[np.uint8]:
        """Zeroed, at the start of a cache line."""
        with self._lock:
            if size_bytes > len(self._left):
                self._left = mapped(max(CHUNK_BYTES, size_bytes))
            taken = self._left[:size_bytes]
            self._left = self._left[-(-size_bytes // LINE_BYTES) * LINE_BYTES :]
            return taken


def mapped(size_bytes: int) -> NDArray[np.uint8]:
    """Zeroed memory from the start of a large page on, which takes no room until it is written."""
    private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    memory = mmap.mmap(-1, size_bytes + LARGE_PAGE_BYTES, flags=private)
    with contextlib.suppress(AttributeError, OSError):
        memory.madvise(mmap.MADV_HUGEPAGE)
    whole = np.frombuffer(memory, np.uint8)
    start = -whole.ctypes.data % LARGE_PAGE_BYTES
    return whole[start : start + size_bytes]


_chunks = _Chunks()


def in_large_pages(tensor: Tensor) -> Tensor:
    """A copy of a contiguous `tensor` in large pages."""
    copied = torch.from_numpy(_chunks.take(tensor.nbytes)).view(tensor.dtype).view(tensor.shape)
    return copied.copy_(tensor)
