"""Messages through shared memory: one writer, the same bytes to one reader or several.

Invariant: the writer counts bytes written, each reader bytes read, and the data between is nobody
else's: it is written before it is counted, and read before that is counted. So a message may be
longer than the ring; it then goes through in pieces, and the writer waits for the slowest reader.
x86 keeps the order of stores; see shared.py for others.

Rejected: slots of a fixed size, which are as large as the largest message for each of the small
ones; a pipe, which copies each message twice and per reader.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from headrace.errors import HeadraceError
from headrace.frames import Buffer
from headrace_worker.parallel.shared import LINE_BYTES, Bell, wait_for

MESSAGE_BYTES_MAX = 2**32 - 1
_HEAD = np.dtype("<u4")
_COUNT_AT = 8  # on its line, behind the bell


class RingError(HeadraceError):
    """Nobody read or wrote for too long: the other side hangs or is gone."""


def ring_bytes(capacity: int, readers: int) -> int:
    """Shared memory that a ring of `capacity` bytes takes."""
    return (1 + readers) * LINE_BYTES + capacity


class _Side:
    """What both sides see: counts, bells and data."""

    def __init__(self, memory: NDArray[np.uint8], readers: int, patience_s: float) -> None:
        lines = [memory[i * LINE_BYTES : (i + 1) * LINE_BYTES] for i in range(1 + readers)]
        self._bells = [Bell(line) for line in lines]
        self._counts = [line.data[_COUNT_AT : _COUNT_AT + 8].cast("Q") for line in lines]
        self._data = memory[(1 + readers) * LINE_BYTES :]
        self._capacity = len(self._data)
        self._patience_s = patience_s

    def _copy(self, at: int, array: NDArray[np.uint8], *, write: bool) -> None:
        """Between `array` and the data from byte `at` of the stream on, around the end."""
        start = at % self._capacity
        first = min(len(array), self._capacity - start)
        pieces = ((array[:first], start), (array[first:], 0))
        for piece, place in pieces:
            data = self._data[place : place + len(piece)]
            if write:
                data[:] = piece
            else:
                piece[:] = data

    def check_integrity(self) -> None:
        """No reader is ahead of the writer, or further behind than the ring is long."""
        written, *read = [count[0] for count in self._counts]
        for at in read:
            assert 0 <= written - at <= self._capacity, "a reader is outside the ring"


class Writer(_Side):
    """The writing end. Belongs to one thread."""

    def __init__(
        self, memory: NDArray[np.uint8], readers: int = 1, *, patience_s: float = 60.0
    ) -> None:
        """`memory`, zeroed at first: see `ring_bytes`. It waits `patience_s` for a full ring."""
        super().__init__(memory, readers, patience_s)

    def send(self, *parts: Buffer | NDArray[np.uint8]) -> None:
        """One message of all `parts`. Raises RingError when nobody reads in time."""
        arrays = [np.frombuffer(part, np.uint8) for part in parts]
        size = sum(map(len, arrays))
        assert size <= MESSAGE_BYTES_MAX, "a message is too long"
        for array in (np.array([size], _HEAD).view(np.uint8), *arrays):
            self._write(array)
        self._bells[0].ring()

    def _write(self, array: NDArray[np.uint8]) -> None:
        written = self._counts[0]
        while len(array):
            room = self._room()
            if not room:
                self._bells[0].ring()
                self._wait_for_room()
                continue
            piece, array = array[:room], array[room:]
            self._copy(written[0], piece, write=True)
            written[0] += len(piece)

    def _room(self) -> int:
        slowest = min(count[0] for count in self._counts[1:])
        return self._capacity - (self._counts[0][0] - slowest)

    def _wait_for_room(self) -> None:
        counts = [count[0] for count in self._counts[1:]]
        slowest = counts.index(min(counts))
        if not wait_for(lambda: self._room() > 0, self._bells[1 + slowest], self._patience_s):
            raise RingError(f"reader {slowest} of a ring did not read for {self._patience_s:g} s")


class Reader(_Side):
    """One reading end. Belongs to one thread."""

    def __init__(
        self,
        memory: NDArray[np.uint8],
        readers: int = 1,
        index: int = 0,
        *,
        patience_s: float = 60.0,
    ) -> None:
        """Reader number `index` of `readers`; within a message it waits for `patience_s`."""
        super().__init__(memory, readers, patience_s)
        self._read, self._bell = self._counts[1 + index], self._bells[1 + index]

    def receive(self, timeout_s: float | None = None) -> NDArray[np.uint8] | None:
        """The next message; None when there is none within `timeout_s` (None: `patience_s`).

        Raises RingError for one that ends in the middle.
        """
        limit_s = self._patience_s if timeout_s is None else timeout_s
        if not wait_for(self._waiting, self._bells[0], limit_s):
            return None
        head = np.empty(_HEAD.itemsize, np.uint8)
        self._fill(head)
        message = np.empty(int(head.view(_HEAD)[0]), np.uint8)
        self._fill(message)
        self._bell.ring()
        return message

    def _waiting(self) -> bool:
        return self._counts[0][0] != self._read[0]

    def _fill(self, array: NDArray[np.uint8]) -> None:
        while len(array):
            there = self._counts[0][0] - self._read[0]
            if not there:
                self._bell.ring()
                if not wait_for(self._waiting, self._bells[0], self._patience_s):
                    raise RingError(f"a message ended in the middle for {self._patience_s:g} s")
                continue
            piece, array = array[:there], array[there:]
            self._copy(self._read[0], piece, write=False)
            self._read[0] += len(piece)
