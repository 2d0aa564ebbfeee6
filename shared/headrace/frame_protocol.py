"""Frames over an asyncio connection: received without a copy, sent under flow control.

A frame's start is read together with what is right behind it, a few KB at most, as most frames are
no longer than that; those bytes alone are copied.

Invariants: each entry is received straight into the place it will stay in, or skipped without
one; memory is taken for it only when its bytes are due; frames never interleave, and a frame whose
sending was given up midway takes its connection with it, as its receiver could no longer tell where
the next one starts.
Rejected: asyncio streams, whose StreamReader copies every byte twice, and one buffer a frame (an
entry kept for an hour would hold its whole batch in memory).
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Generic, Protocol, TypeVar, cast

from headrace.errors import WireError
from headrace.frame_codec import HEADER_BYTES_MAX, MAGIC, PREFIX
from headrace.frames import PAYLOAD_BYTES_MAX, Buffer
from headrace.outlet import Outlet

SKIP_BYTES = 64 * 1024

AHEAD_BYTES = 4 * 1024
"""Read at a time where a frame may start: it bounds the small frames that come at once."""

DIRECT_BYTES_MIN = 64 * 1024
"""A payload larger than that is sent from where it lies."""

WRITE_HIGH_BYTES = 4 * 1024 * 1024
"""What a transport may hold unsent before its sender has to wait."""


class Sized(Protocol):
    """A message whose payload consists of entries of these sizes."""

    @property
    def sizes(self) -> Sequence[int]: ...


S = TypeVar("S", bound=Sized)

Place = bool | memoryview
"""Where an entry's bytes go: memory of their own (True), memory that is given, nowhere (False)."""


class FrameReader(Generic[S]):
    """Turns a stream of bytes into frames, received where they will stay.

    Ask `buffer()` where the next bytes belong, write some there, tell `advance()` how many.
    `decode` reads a header; `choose` then says for each entry where its bytes go, if anywhere.
    """

    def __init__(
        self, decode: Callable[[bytes], S], choose: Callable[[S], Sequence[Place]]
    ) -> None:
        self._decode = decode
        self._choose = choose
        self._skipping = memoryview(bytearray(SKIP_BYTES))
        self._ahead = memoryview(bytearray(AHEAD_BYTES))
        self._next_frame()

    def _next_frame(self) -> None:
        self._message: S | None = None
        self._payload_bytes = 0
        self._wanted: Sequence[Place] = ()
        self._parts: list[memoryview | None] = []
        self._prefix_done = False
        self._target: memoryview | None = memoryview(bytearray(PREFIX.size))
        self._size = PREFIX.size
        self._filled = 0

    @property
    def idle(self) -> bool:
        """No byte of the next frame has arrived."""
        return self._filled == 0 and not self._prefix_done and self._message is None

    def buffer(self) -> memoryview:
        """Where the next bytes go; never empty."""
        return self._ahead if self.idle else self._section()

    def _section(self) -> memoryview:
        """Where the next bytes of the prefix, the header or the entry belong that is due."""
        if self._target is None:
            return self._skipping[: self._size - self._filled]
        return self._target[self._filled :]

    def advance(self, count: int) -> Iterator[tuple[S, list[memoryview | None]]]:
        """Take note of `count` bytes written to `buffer()`.

        Gives the frames that they complete, each with its message and its entries' bytes, None for
        those that were not wanted. Raises WireError; the reader is then of no further use.
        """
        if not self.idle:
            frame = self._take(count)
            if frame is not None:
                yield frame
            return
        came = self._ahead[:count]
        while came:
            section = self._section()
            some = min(len(section), len(came))
            section[:some] = came[:some]
            came = came[some:]
            frame = self._take(some)
            if frame is not None:
                yield frame

    def _take(self, count: int) -> tuple[S, list[memoryview | None]] | None:
        """`count` more bytes of the section are there; the frame that is whole now, if one is."""
        self._filled += count
        if self._filled < self._size:
            return None
        if self._message is not None:
            self._parts.append(self._target)
        elif self._prefix_done:
            self._open_payload()
        else:
            self._open_header()
            return None
        return self._open_part()

    def _open_header(self) -> None:
        assert self._target is not None, "a prefix is never skipped"
        magic, header_bytes, payload_bytes = PREFIX.unpack(self._target)
        if magic != MAGIC:
            raise WireError(f"a frame starts with {MAGIC!r}, not {magic!r}")
        if not 1 <= header_bytes <= HEADER_BYTES_MAX:
            raise WireError(f"header of {header_bytes} bytes: allowed 1 to {HEADER_BYTES_MAX}")
        if payload_bytes > PAYLOAD_BYTES_MAX:
            raise WireError(f"payload of {payload_bytes} bytes exceeds {PAYLOAD_BYTES_MAX}")
        self._payload_bytes = payload_bytes
        self._prefix_done = True
        self._start_section(header_bytes, True)

    def _open_payload(self) -> None:
        assert self._target is not None, "a header is never skipped"
        message = self._decode(bytes(self._target))
        sizes = message.sizes
        if sum(sizes) != self._payload_bytes:
            raise WireError(f"payload of {self._payload_bytes} bytes, entries of {sum(sizes)}")
        self._message = message
        self._wanted = self._choose(message)
        assert len(self._wanted) == len(sizes), "one decision an entry"

    def _open_part(self) -> tuple[S, list[memoryview | None]] | None:
        assert self._message is not None, "entries follow their header"
        index, sizes = len(self._parts), self._message.sizes
        if index < len(sizes):
            self._start_section(sizes[index], self._wanted[index])
            return None
        frame = (self._message, self._parts)
        self._next_frame()
        return frame

    def _start_section(self, size: int, place: Place) -> None:
        if isinstance(place, memoryview):
            assert len(place) == size, "an entry's place has its size"
            self._target = place
        else:
            self._target = memoryview(bytearray(size)) if place else None
        self._size = size
        self._filled = 0


class FrameProtocol(asyncio.BufferedProtocol, ABC, Generic[S]):
    """One end of a connection. Subclasses say what to do with frames and with the end.

    `decode` and `choose` are FrameReader's.
    """

    def __init__(
        self, decode: Callable[[bytes], S], choose: Callable[[S], Sequence[Place]]
    ) -> None:
        self._reader = FrameReader(decode, choose)
        self._transport: asyncio.Transport | None = None
        self._writable = asyncio.Event()
        self._turn = asyncio.Lock()
        self._outlet: Outlet | None = None
        self._came: Iterator[tuple[S, list[memoryview | None]]] = iter(())
        self._paused = False
        self.closed = False
        self._scrap = memoryview(bytearray(1))

    @abstractmethod
    def frame_received(self, message: S, parts: list[memoryview | None]) -> None:
        """A whole frame came in. Raise WireError to end the connection."""

    def malformed(self, error: WireError) -> None:
        """The other side sent something that is not a frame; the connection ends."""

    @property
    def transport(self) -> asyncio.Transport:
        assert self._transport is not None, "used only after connection_made"
        return self._transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._transport.set_write_buffer_limits(high=WRITE_HIGH_BYTES)
        self._writable.set()

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002  # asyncio's signature
        self.closed = True
        self._writable.set()
        if self._outlet is not None:
            self._outlet.close()

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()

    def get_buffer(self, sizehint: int) -> memoryview:  # noqa: ARG002  # asyncio's signature
        # what a closed connection still receives goes nowhere
        return self._scrap if self.closed else self._reader.buffer()

    def buffer_updated(self, nbytes: int) -> None:
        if self.closed:
            return
        self._came = self._reader.advance(nbytes)
        self._take_frames()

    def _take_frames(self) -> None:
        """What came in, as long as reading is not paused."""
        try:
            while not self._paused and not self.closed:
                frame = next(self._came, None)
                if frame is None:
                    return
                self.frame_received(*frame)
        except WireError as error:
            self.malformed(error)
            self.abort()

    def pause_reading(self) -> None:
        """Take no more frames, not even those that are here."""
        self._paused = True
        self.transport.pause_reading()

    def resume_reading(self) -> None:
        """Take frames again, first those that are here."""
        self._paused = False
        self._take_frames()
        if not self._paused and not self.closed and not self.transport.is_closing():
            self.transport.resume_reading()

    def abort(self) -> None:
        """End the connection now, whatever is unsent."""
        self.closed = True
        self._writable.set()
        if self._outlet is not None:
            self._outlet.close()
        if self._transport is not None:
            self._transport.abort()

    def try_send(self, buffer: Buffer) -> bool:
        """Send a frame that is one small buffer, unless that would have to wait; whether it was."""
        if self._turn.locked() or not self._writable.is_set():
            return False
        if self.closed or self.transport.is_closing():
            return False
        self.transport.write(buffer)
        return True

    async def send(self, buffers: Sequence[Buffer], stall_s: float) -> None:
        """Send one frame. The buffers must stay as they are until they have left.

        Raises ConnectionError when the connection is gone, or when the other side reads nothing
        for `stall_s`, which ends it.
        """
        async with self._turn:
            started = False
            try:
                head, *payload = buffers
                await self._wait_writable(stall_s)
                started = True
                self.transport.write(head)
                if sum(map(len, payload)) > DIRECT_BYTES_MIN:
                    await self._send_direct(payload, stall_s)
                    return
                for buffer in payload:
                    await self._wait_writable(stall_s)
                    self.transport.write(buffer)
            except BaseException:
                if started:
                    self.abort()
                raise

    async def _send_direct(self, buffers: Sequence[Buffer], stall_s: float) -> None:
        await self.flushed(stall_s)
        try:
            if self._outlet is None:
                self._outlet = Outlet(self.transport)
            await self._outlet.send(buffers, stall_s)
        except TimeoutError as error:
            raise ConnectionAbortedError(f"nothing was read for {stall_s} s") from error
        except ConnectionError:
            raise
        except OSError as error:
            raise ConnectionAbortedError(str(error)) from error

    async def flushed(self, stall_s: float) -> None:
        """Wait until the kernel has all that was sent. Raises ConnectionError as `send` does."""
        self.transport.set_write_buffer_limits(high=0)
        try:
            await self._wait_writable(stall_s)
        finally:
            if not self.closed:
                self.transport.set_write_buffer_limits(high=WRITE_HIGH_BYTES)

    async def _wait_writable(self, stall_s: float) -> None:
        if not self._writable.is_set():
            try:
                async with asyncio.timeout(stall_s):
                    await self._writable.wait()
            except TimeoutError as error:
                self.abort()
                raise ConnectionAbortedError(f"nothing was read for {stall_s} s") from error
        if self.closed or self.transport.is_closing():
            raise ConnectionResetError("the connection is closed")
