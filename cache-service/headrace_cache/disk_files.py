"""The few system calls of the disk tier: one directory, one method a call.

Invariant: no method does more than one thing that can fail half-way, so that a test which stops,
shortens or fails any of them has seen all that a kill or a full disk can do.
Rejected: Python's file objects, which buffer and retry behind our back.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Sequence
from pathlib import Path

from headrace.frames import Buffer

IOV_MAX = 512
"""Buffers in one call; Linux takes 1,024."""

LOCK_NAME = "lock"


class Files:
    """Files of one directory, by name and descriptor. All methods raise OSError."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def lock(self) -> int:
        """Make the directory ours, creating it; raises BlockingIOError if a process has it.

        The lock ends with `close` of what is returned, or with the process.
        """
        self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        fd = os.open(self.directory / LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(fd)
            raise
        return fd

    def names(self) -> list[str]:
        """What is in the directory, sorted."""
        return sorted(os.listdir(self.directory))  # noqa: PTH208  # names are wanted, not paths

    def create(self, name: str) -> int:
        """A new, empty file, open to read and append."""
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC
        return os.open(self.directory / name, flags, 0o600)

    def open(self, name: str) -> int:
        """An existing regular file, open to read and append; no link is followed."""
        flags = os.O_RDWR | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW
        return os.open(self.directory / name, flags)

    def append(self, fd: int, buffers: Sequence[Buffer]) -> int:
        """Bytes written at the end of the file; may be fewer than asked for."""
        return os.writev(fd, buffers)

    def read(self, fd: int, buffers: Sequence[bytearray | memoryview], offset: int) -> int:
        """Bytes read into `buffers` from `offset` on; may be fewer than asked for, 0 at the end."""
        return os.preadv(fd, buffers, offset)

    def size(self, fd: int) -> int:
        return os.fstat(fd).st_size

    def truncate(self, fd: int, size_bytes: int) -> None:
        os.ftruncate(fd, size_bytes)

    def sync(self, fd: int) -> None:
        """Return when the file's bytes and size would survive a loss of power."""
        os.fdatasync(fd)

    def sync_names(self) -> None:
        """Return when the directory's entries would survive a loss of power."""
        fd = os.open(self.directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def close(self, fd: int) -> None:
        os.close(fd)

    def unlink(self, name: str) -> None:
        (self.directory / name).unlink()

    def rename(self, name: str, new_name: str) -> None:
        """Give a file another name; what had that one is gone."""
        (self.directory / name).rename(self.directory / new_name)


def append_all(files: Files, fd: int, buffers: Sequence[Buffer]) -> None:
    """Append all of `buffers`; raises OSError, with any part of them written."""
    left = [memoryview(buffer) for buffer in buffers if len(buffer)]
    while left:
        count = files.append(fd, left[:IOV_MAX])
        if count <= 0:
            raise OSError("nothing was written")
        left = _after(left, count)


def read_all(files: Files, fd: int, buffers: Sequence[bytearray | memoryview], offset: int) -> int:
    """Fill `buffers` from `offset` on; the bytes read, fewer only where the file ends."""
    left = [memoryview(buffer) for buffer in buffers if len(buffer)]
    total = 0
    while left:
        count = files.read(fd, left[:IOV_MAX], offset + total)
        if count <= 0:
            break
        total += count
        left = _after(left, count)
    return total


def write_whole(files: Files, name: str, data: bytes) -> None:
    """Have `data` in the file `name`, or what was there, whatever happens meanwhile."""
    new_name = f"{name}.new"
    with contextlib.suppress(FileNotFoundError):
        files.unlink(new_name)
    fd = files.create(new_name)
    try:
        append_all(files, fd, [data])
        files.sync(fd)
    finally:
        files.close(fd)
    files.rename(new_name, name)
    files.sync_names()


def read_whole(files: Files, name: str, limit_bytes: int) -> bytes:
    """What is in the file `name`, `limit_bytes` of it at most; nothing where there is none."""
    try:
        fd = files.open(name)
    except FileNotFoundError:
        return b""
    try:
        buffer = bytearray(min(files.size(fd), limit_bytes))
        count = read_all(files, fd, [buffer], 0)
    finally:
        files.close(fd)
    return bytes(buffer[:count])


def _after(buffers: list[memoryview], count: int) -> list[memoryview]:
    """What is left of `buffers` behind the first `count` bytes."""
    for index, buffer in enumerate(buffers):
        if count < len(buffer):
            return [buffer[count:], *buffers[index + 1 :]]
        count -= len(buffer)
    return []
