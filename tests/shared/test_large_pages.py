"""Large pages: what stands in memory is moved, and stays what it is."""

from __future__ import annotations

import ctypes

from headrace import large_pages
from headrace.large_pages import PAGE_BYTES


def test_what_is_moved_stays_what_it_is() -> None:
    """Memory of which some large pages are full is found among the process's own, and is read
    and written after the move as before; how many pages moved is the kernel's affair."""
    kept = bytearray(range(256)) * (4 * PAGE_BYTES // 256)
    at = ctypes.addressof(ctypes.c_char.from_buffer(kept))
    ranges = large_pages._own_memory()
    assert any(first <= at and at + len(kept) <= last for first, last in ranges)
    moved = large_pages.gather()
    assert 0 <= moved <= sum(last - first for first, last in ranges) // PAGE_BYTES + len(ranges)
    assert kept == bytearray(range(256)) * (4 * PAGE_BYTES // 256)
    kept[PAGE_BYTES] = 7
    assert kept[PAGE_BYTES] == 7
