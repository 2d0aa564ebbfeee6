"""The checksum of entries: CRC-32C, by the CPU's own instruction where it has one.

Invariant: writer, arena, disk and reader all use this one function, so that a checksum computed
once is good everywhere. Rejected: zlib's CRC-32, which is four times slower here and would cost
more than the copy it protects.
"""

from __future__ import annotations

from crc32c import crc32c as _crc32c

Buffer = bytes | bytearray | memoryview


def checksum(data: Buffer, start: int = 0) -> int:
    """CRC-32C (Castagnoli) of `data`, continuing `start`. Lets other threads run meanwhile."""
    return _crc32c(data, start)
