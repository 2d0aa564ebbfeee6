"""Copying bytes, and checking the copy, while other threads run.

Invariant: what is copied is what a slice assignment would copy; a checksum is the copy's own.
Rejected: slice assignment for large copies. It keeps Python's lock, so that a thread which copies
and checks entry after entry starves the event loop beside it, for the interpreter's whole switch
interval at a time; numpy, which the gateway and the service would need for nothing else.
"""

from __future__ import annotations

import ctypes

from headrace.checksum import checksum
from headrace.frames import Buffer

LOCKED_BYTES_MAX = 32 * 1024
"""Copied under Python's lock: some microseconds."""

CHECKED_BYTES = 512 * 1024
"""Copied and then checked at a time: still in the CPU's nearer caches."""


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
