"""Copying bytes while other threads run.

Invariant: what is copied is what a slice assignment would copy.
Rejected: slice assignment for large copies. It keeps Python's lock, so that a thread which copies
and checks entry after entry starves the event loop beside it, for the interpreter's whole switch
interval at a time; numpy, which the gateway and the service would need for nothing else.
"""

from __future__ import annotations

import ctypes

from headrace.frames import Buffer

LOCKED_BYTES_MAX = 32 * 1024
"""Copied under Python's lock: some microseconds."""


def copy_bytes(target: memoryview, source: Buffer) -> None:
    """Copy `source` to `target`, which is as long and does not overlap with it.

    Both are of bytes, one after the other. Raises ValueError where the lengths differ.
    """
    size_bytes = len(source)
    if len(target) != size_bytes:
        raise ValueError(f"{size_bytes} bytes do not fit a place of {len(target)}")
    from_address = _address(source) if size_bytes > LOCKED_BYTES_MAX else None
    if from_address is None:
        target[:] = source
    else:
        # the objects that hold the addresses live until the call is over
        to_address = ctypes.c_char.from_buffer(target)
        ctypes.memmove(ctypes.addressof(to_address), from_address, size_bytes)


def _address(source: Buffer) -> ctypes.c_char_p | ctypes.Array[ctypes.c_char] | None:
    """What `memmove` takes for `source`; None where there is no such thing."""
    if isinstance(source, bytes):
        return ctypes.c_char_p(source)
    if isinstance(source, memoryview) and (source.readonly or not source.contiguous):
        return None
    return (ctypes.c_char * len(source)).from_buffer(source)
