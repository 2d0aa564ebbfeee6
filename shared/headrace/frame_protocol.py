"""Frames over an asyncio connection: received without a copy, sent under flow control.

Invariant: frames never interleave, and a frame whose sending was given up midway takes its
connection with it, as its receiver could no longer tell where the next one starts.
Rejected: asyncio streams, whose StreamReader copies every byte twice.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar, cast

from headrace.errors import WireError
from headrace.frames import Buffer, FrameReader, Sized

WRITE_HIGH_BYTES = 4 * 1024 * 1024
"""What a transport may hold unsent before its sender has to wait."""

S = TypeVar("S", bound=Sized)


class FrameProtocol(asyncio.BufferedProtocol, Generic[S]):
    """One end of a connection. Subclasses say what to do with frames and with the end.

    `decode` and `choose` are FrameReader's.
    """

    def __init__(self, decode: Callable[[bytes], S], choose: Callable[[S], Sequence[bool]]) -> None:
        self._reader = FrameReader(decode, choose)
        self._transport: asyncio.Transport | None = None
        self._writable = asyncio.Event()
        self._turn = asyncio.Lock()
        self.closed = False

    def frame_received(self, message: S, parts: list[memoryview | None]) -> None:
        """A whole frame came in. Raise WireError to end the connection."""
        raise AssertionError("a subclass takes the frames")

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

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()

    def get_buffer(self, sizehint: int) -> memoryview:  # noqa: ARG002  # asyncio's signature
        return self._reader.buffer()

    def buffer_updated(self, nbytes: int) -> None:
        if self.closed:
            return
        try:
            frame = self._reader.advance(nbytes)
            if frame is not None:
                self.frame_received(*frame)
        except WireError as error:
            self.malformed(error)
            self.abort()

    def abort(self) -> None:
        """End the connection now, whatever is unsent."""
        self.closed = True
        self._writable.set()
        if self._transport is not None:
            self._transport.abort()

    async def send(self, buffers: Sequence[Buffer], stall_s: float) -> None:
        """Send one frame. The buffers must stay as they are until they have left.

        Raises ConnectionError when the connection is gone, or when the other side reads nothing
        for `stall_s`, which ends it.
        """
        async with self._turn:
            started = False
            try:
                for buffer in buffers:
                    await self._wait_writable(stall_s)
                    started = True
                    self.transport.write(buffer)
            except BaseException:
                if started:
                    self.abort()
                raise

    async def _wait_writable(self, stall_s: float) -> None:
        if not self._writable.is_set():
            try:
                async with asyncio.timeout(stall_s):
                    await self._writable.wait()
            except TimeoutError as error:
                self.abort()
                raise ConnectionAbortedError(f"nothing was read for {stall_s} s") from error
        if self.closed:
            raise ConnectionResetError("the connection is closed")
