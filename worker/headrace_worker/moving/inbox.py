"""Where other workers bring the KV of jobs that will move here.

Invariant: what arrives only fills the prefix cache, under its hash; a job that comes finds it there
or computes what is missing, so nothing that a sender does or fails to do can change an answer. Each
connection, question and slot is bounded: a sender waits while the slots are taken.
Rejected: blocks held for a job until it comes. A sender that dies would hold them for good, and a
pool full of them could leave those that run no block to go on with; in the cache, what came last
gives way last.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections import deque
from collections.abc import Callable, Sequence

import structlog

from headrace.errors import SettingsError, WireError
from headrace.frame_protocol import FrameProtocol, Place
from headrace.frames import Address, parse_address
from headrace.types import Band
from headrace_worker.engine import Engine
from headrace_worker.moving.landing import Landing, slots_for
from headrace_worker.moving.messages import (
    HELD,
    Ask,
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
from headrace_worker.results import BlockPayload

log = structlog.get_logger()

CONNECTIONS_MAX = 256
QUESTIONS_MAX = 256
"""Of one connection that wait for slots."""
STALL_S = 5.0
SWEEP_S = 0.5
EVERYWHERE = ("", "0.0.0.0", "::")


class Inbox:
    """Takes KV in for `engine`. `send` runs a command in the engine's thread."""

    def __init__(
        self,
        engine: Engine,
        listen: str,
        *,
        kv_tokens: int,
        max_jobs: int,
        send: Callable[[Callable[[Engine], None]], None],
    ) -> None:
        """`listen`: tcp://host:port (0: any) or unix:///path. Raises SettingsError."""
        self.engine = engine
        self.listen: Address = parse_address(listen)
        self.landing = Landing(engine.block_bytes, slots_for(engine.block_bytes))
        self.kv_tokens, self.max_jobs = kv_tokens, max_jobs
        self.closed_for = ""
        """Why no job should come, once that is so."""
        self.taken_blocks = 0
        self._send = send
        self._server: asyncio.Server | None = None
        self._sweeper: asyncio.Task[None] | None = None
        self._connections: dict[int, _Connection] = {}
        self._seats = 0
        self._waiting: deque[tuple[_Connection, Ask]] = deque()

    async def start(self) -> str:
        """Listen; the address to tell others. Raises SettingsError."""
        loop, at = asyncio.get_running_loop(), self.listen
        try:
            if at.path:
                self._server = await loop.create_unix_server(self._accept, at.path)
            else:
                self._server = await loop.create_server(self._accept, at.host, at.port)
                port = self._server.sockets[0].getsockname()[1]
                host = socket.gethostname() if at.host in EVERYWHERE else at.host
                at = at._replace(host=host, port=port)
        except OSError as error:
            self.landing.close()
            raise SettingsError(f"HEADRACE_KV_LISTEN: {at}: {error}") from error
        self._sweeper = asyncio.create_task(self._sweep())
        return str(at)

    async def stop(self) -> None:
        if self._server is not None:
            self._server.close()
        if self._sweeper is not None:
            self._sweeper.cancel()
            await asyncio.gather(self._sweeper, return_exceptions=True)
        for connection in list(self._connections.values()):
            connection.abort()
        self.landing.close()

    def _accept(self) -> _Connection:
        self._seats += 1
        return _Connection(self, self._seats)

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(SWEEP_S)
            self.landing.sweep()
            self._serve()

    # what connections call

    def join(self, connection: _Connection) -> bool:
        if len(self._connections) >= CONNECTIONS_MAX:
            return False
        self._connections[connection.seat] = connection
        return True

    def leave(self, connection: _Connection) -> None:
        self._connections.pop(connection.seat, None)
        self._waiting = deque(each for each in self._waiting if each[0] is not connection)
        self.landing.abandon(connection.seat)
        self._serve()

    def welcome(self, connection: _Connection, greet: Greet) -> Welcome:
        landing, reason = self.landing, self.closed_for
        if (greet.layout, greet.block_bytes) != (self.engine.layout, landing.block_bytes):
            reason = "another model, or its KV in another form"
        return Welcome(
            greet.id,
            reason,
            self.kv_tokens,
            self.max_jobs,
            landing.path,
            landing.nonce if landing.path else b"",
            landing.size_bytes,
            connection.seat,
            landing.place(0),
            landing.block_bytes,
        )

    def ask(self, connection: _Connection, ask: Ask) -> None:
        if sum(each[0] is connection for each in self._waiting) >= QUESTIONS_MAX:
            raise WireError(f"move: more than {QUESTIONS_MAX} questions at a time")
        self._waiting.append((connection, ask))
        self._serve()

    def _serve(self) -> None:
        """Answer who waits for slots, in order, as long as there are enough."""
        while self._waiting:
            connection, ask = self._waiting[0]
            held = [self.engine.holds(block_hash) for block_hash in ask.hashes]
            if held.count(False) > self.landing.free_count:
                return
            self._waiting.popleft()
            slots = iter(self.landing.give(connection.seat, held.count(False)))
            places = tuple(HELD if there else next(slots) for there in held)
            connection.answer(Places(ask.id, places))

    def take_in(self, connection: _Connection, message: Blocks) -> None:
        """The blocks are in their slots: into the pool with them, before the next step."""
        for slot in message.unused:
            self.landing.release(slot)
        if not message.blocks:
            self._serve()
            return
        payloads = [
            BlockPayload(b.hash, b.parent, b.depth, self.landing.land(b.slot, connection.seat))
            for b in message.blocks
        ]
        slots = [block.slot for block in message.blocks]
        band, tenant, loop = Band(message.band), message.tenant, asyncio.get_running_loop()

        def take(engine: Engine) -> None:
            try:
                engine.take_in(payloads, band, tenant)
            finally:
                with contextlib.suppress(RuntimeError):  # the loop has ended
                    loop.call_soon_threadsafe(self._landed, slots)

        self.taken_blocks += len(payloads)
        self._send(take)

    def _landed(self, slots: Sequence[int]) -> None:
        for slot in slots:
            self.landing.release(slot)
        self._serve()

    def flush(self, connection: _Connection, flush: Flush) -> None:
        """Answer behind everything that was handed to the engine before."""
        loop, answer = asyncio.get_running_loop(), Flushed(flush.id, self.closed_for)

        def done(_: Engine) -> None:
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(connection.answer, answer)

        self._send(done)

    def check_integrity(self) -> None:
        self.landing.check_integrity()
        assert len(self._connections) <= CONNECTIONS_MAX, "connections are bounded"


class _Connection(FrameProtocol[Message]):
    """One sender. `seat` is its number, by which it holds slots."""

    def __init__(self, inbox: Inbox, seat: int) -> None:
        super().__init__(decode, self._choose)
        self._inbox = inbox
        self.seat = seat
        self._greeted = False
        self._answers: set[asyncio.Task[None]] = set()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        if not self._inbox.join(self):
            self.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._inbox.leave(self)

    def _choose(self, message: Message) -> Sequence[Place]:
        if not isinstance(message, Blocks):
            return ()
        landing = self._inbox.landing
        slots = [block.slot for block in message.blocks]
        named = [*slots, *message.unused]
        if len(set(named)) < len(named) or not all(landing.is_given(s, self.seat) for s in named):
            raise WireError("move: a slot that was not given")
        if message.payload_bytes not in (0, landing.block_bytes):
            raise WireError("move: blocks of another size")
        return [landing.view(slot) for slot in slots] if message.payload_bytes else ()

    def frame_received(self, message: Message, parts: list[memoryview | None]) -> None:  # noqa: ARG002  # received right into the slots
        if isinstance(message, Greet):
            welcome = self._inbox.welcome(self, message)
            self._greeted = not welcome.reason
            self.answer(welcome)
        elif not self._greeted:
            raise WireError("move: a sender is welcomed first")
        elif isinstance(message, Ask):
            self._inbox.ask(self, message)
        elif isinstance(message, Blocks):
            self._inbox.take_in(self, message)
        elif isinstance(message, Flush):
            self._inbox.flush(self, message)
        else:
            raise WireError("move: not for a receiver")

    def malformed(self, error: WireError) -> None:
        log.warning("malformed message about moving KV, connection closed", error=error.message)

    def answer(self, message: Message) -> None:
        if self.closed:
            return
        task = asyncio.get_running_loop().create_task(self._answer(message))
        self._answers.add(task)
        task.add_done_callback(self._answers.discard)

    async def _answer(self, message: Message) -> None:
        with contextlib.suppress(ConnectionError):
            await self.send([encode(message)], STALL_S)
