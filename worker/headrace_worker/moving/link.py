"""A sender's connection to one receiver: places asked for, blocks put there.

Invariant: one small interface, whatever lies between the two. Where both see the receiver's memory,
blocks are copied there and only named on the socket; else they follow as payload. Every wait has a
limit, and what was given and not used is given back or goes with the connection.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Sequence

from headrace import frames
from headrace.arena_view import ArenaView
from headrace.errors import WireError
from headrace.frame_protocol import FrameProtocol, Place
from headrace.frames import parse_address
from headrace_worker.kv.export import Export, WithdrawnError
from headrace_worker.moving.messages import (
    BATCH_MAX,
    HELD,
    Ask,
    Block,
    Blocks,
    Flush,
    Flushed,
    Greet,
    Message,
    Places,
    Welcome,
    decode,
    encode,
)

CONNECT_S_MAX = 1.0
ANSWER_S_MAX = 5.0
"""A receiver answers between two steps of its engine."""

TROUBLE = (OSError, TimeoutError, WireError)
"""What the other worker's absence, slowness or nonsense raises."""


class RefusedError(OSError):
    """The receiver takes nothing from here."""


class Link(FrameProtocol[Message]):
    """Connected and welcomed: made by `connect`. `shared`: blocks go through its memory."""

    def __init__(self) -> None:
        super().__init__(decode, self._choose)
        self._ids = itertools.count(1)
        self._asked: dict[int, asyncio.Future[Message]] = {}
        self._arena: ArenaView | None = None
        self.welcome = Welcome(0, "", 0, 0)
        self._putting: set[asyncio.Task[int]] = set()
        self.sent_blocks = 0
        self.sent_bytes = 0

    @property
    def shared(self) -> bool:
        return self._arena is not None

    @classmethod
    async def connect(cls, address: str, layout: bytes, block_bytes: int) -> Link:
        """Raises what TROUBLE names, and SettingsError for an address of no known form."""
        loop, at = asyncio.get_running_loop(), parse_address(address)
        async with asyncio.timeout(CONNECT_S_MAX):
            if at.path:
                _, link = await loop.create_unix_connection(cls, at.path)
            else:
                _, link = await loop.create_connection(cls, at.host, at.port)
        try:
            welcome = await link._ask(Greet(next(link._ids), layout, block_bytes))
            if not isinstance(welcome, Welcome):
                raise WireError("move: a greeting was answered by something else")
            if welcome.reason:
                raise RefusedError(welcome.reason)
        except BaseException:
            link.abort()
            raise
        link.welcome = welcome
        if welcome.path:
            w = welcome
            found = frames.Welcome(0, w.path, w.nonce, w.size_bytes, w.seat)
            link._arena = ArenaView.open(found)
        return link

    def _choose(self, message: Message) -> Sequence[Place]:  # noqa: ARG002  # answers have no payload
        return ()

    def frame_received(self, message: Message, parts: list[memoryview | None]) -> None:  # noqa: ARG002  # none
        waiting = self._asked.pop(message.id, None)
        if waiting is not None and not waiting.done():
            waiting.set_result(message)

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._arena = None
        for waiting in self._asked.values():
            if not waiting.done():
                waiting.set_exception(ConnectionResetError("the receiver is gone"))
        self._asked.clear()

    async def _ask(self, message: Message) -> Message:
        waiting: asyncio.Future[Message] = asyncio.get_running_loop().create_future()
        self._asked[message.id] = waiting
        try:
            async with asyncio.timeout(ANSWER_S_MAX):
                await self.send([encode(message)], ANSWER_S_MAX)
                return await waiting
        finally:
            self._asked.pop(message.id, None)
            waiting.cancel()

    async def put(self, exports: Sequence[Export]) -> int:
        """Brings these blocks, at most BATCH_MAX; how many were sent. Raises what TROUBLE names.

        Those that the receiver has, or that were withdrawn meanwhile, are not.
        """
        assert 0 < len(exports) <= BATCH_MAX, "a batch"
        # who gives up a job must not leave slots behind, nor take other jobs' connection along
        putting = asyncio.create_task(self._put_or_end(exports))
        self._putting.add(putting)
        putting.add_done_callback(self._put_done)
        return await asyncio.shield(putting)

    def _put_done(self, putting: asyncio.Task[int]) -> None:
        self._putting.discard(putting)
        if not putting.cancelled():
            putting.exception()  # seen, also where nobody waits any more

    async def _put_or_end(self, exports: Sequence[Export]) -> int:
        try:
            return await self._put(exports)
        except BaseException:
            self.abort()  # the slots that it had been given go with it
            raise

    async def _put(self, exports: Sequence[Export]) -> int:
        answer = await self._ask(Ask(next(self._ids), tuple(e.facts.hash for e in exports)))
        if not isinstance(answer, Places) or len(answer.slots) != len(exports):
            raise WireError("move: a question was answered by something else")
        wanted = [(e, slot) for e, slot in zip(exports, answer.slots, strict=True) if slot != HELD]
        for export, slot in zip(exports, answer.slots, strict=True):
            if slot == HELD:
                export.settle()
        if not wanted:
            return 0
        buffers = self._buffers(wanted)
        filled = await asyncio.to_thread(_fill, [export for export, _ in wanted], buffers)
        blocks, payload = [], []
        for (export, slot), buffer, good in zip(wanted, buffers, filled, strict=True):
            if good:
                facts = export.facts
                blocks.append(Block(facts.hash, facts.parent, facts.depth, slot))
                payload.append(buffer)
        unused = tuple(slot for (_, slot), good in zip(wanted, filled, strict=True) if not good)
        facts, size = exports[0].facts, exports[0].size_bytes
        inline = 0 if self._arena is not None or not blocks else size
        message = Blocks(
            next(self._ids), int(facts.band), facts.tenant, tuple(blocks), unused, inline
        )
        await self.send([encode(message), *(payload if inline else ())], ANSWER_S_MAX)
        self.sent_blocks += len(blocks)
        self.sent_bytes += len(blocks) * size
        return len(blocks)

    def _buffers(self, wanted: Sequence[tuple[Export, int]]) -> list[memoryview]:
        """Where the blocks are written: the receiver's slots, or memory to send from."""
        if self._arena is None:
            return [memoryview(bytearray(export.size_bytes)) for export, _ in wanted]
        w = self.welcome
        return [
            self._arena.view(w.base + slot * w.stride, export.size_bytes) for export, slot in wanted
        ]

    async def flush(self) -> str:
        """Wait until all is in the receiver's pool; why no job can come there, '' if it can."""
        answer = await self._ask(Flush(next(self._ids)))
        return answer.reason if isinstance(answer, Flushed) else "no answer"


def _fill(exports: Sequence[Export], buffers: Sequence[memoryview]) -> list[bool]:
    """Beside the event loop: copies each block, if it is still to be had."""
    filled = []
    for export, buffer in zip(exports, buffers, strict=True):
        try:
            export.fill(buffer)
            filled.append(True)
        except WithdrawnError:
            filled.append(False)
    return filled
