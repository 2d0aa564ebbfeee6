"""Whether a caller's grammar can be used, found out in a process that may die of it.

Invariant: `check` never blocks the event loop, answers within LIMIT_S once the model's compiler is
up, and what one grammar costs (time, memory, the life of the process that compiles it) no other
request pays for. `grammar_process` enforces the limits; this side spawns, asks, remembers, and
replaces a process that does not answer.

Rejected: multiprocessing (its children share the parent's modules and signals and are not tied to
the event loop), and compiling in a thread (see `grammar_process`).
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import sys
from asyncio.subprocess import PIPE, Process
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator
from functools import partial
from itertools import count

from headrace import wire
from headrace.errors import CallerError, DependencyError, HeadraceError, OverloadError, WireError
from headrace.supervisor import die_with_parent
from headrace.types import ModelRecord
from headrace_gateway.grammar_process import BUSY, LENGTH, frame

LIMIT_S = 1.0
GRACE_S = 1.0
"""A process that has not answered by then is replaced."""
START_S = 30.0
"""For starting a process and reading a vocabulary: half a second for 50,000 tokens."""
PROCESSES_MAX = 4
"""Models with a compiler running; of those not in use the least recently used one goes."""
RESULTS_MAX = 1_024
ATTEMPTS = 2
RETRY_MS = 1_000
COMMAND = (sys.executable, "-m", "headrace_gateway.grammar_process")


class _Gone(Exception):
    """The process has ended, or does not answer."""


class GrammarChecker:
    """All models' compilers, and what they said. `limit_s` is for one check, waiting included."""

    def __init__(self, limit_s: float = LIMIT_S) -> None:
        self._limit_s = limit_s
        self._compilers: OrderedDict[str, asyncio.Task[_Compiler]] = OrderedDict()
        self._results: OrderedDict[bytes, CallerError | None] = OrderedDict()
        self._asking: dict[bytes, asyncio.Task[CallerError | None]] = {}
        self._users: Counter[str] = Counter()
        self._left = asyncio.Event()

    async def check(self, record: ModelRecord, grammar: str) -> None:
        """Returns when `grammar` can be used with the model of `record`.

        Raises CallerError `invalid_grammar` or `grammar_too_complex`; OverloadError when there was
        no time to find out; DependencyError when no compiler can be started.
        """
        key = hashlib.blake2b(f"{record.fingerprint}\n{grammar}".encode()).digest()
        if key in self._results:
            self._results.move_to_end(key)
            result = self._results[key]
        else:
            # the first to ask may leave; the answer is for all
            result = await asyncio.shield(self._asked(record, grammar, key))
        if result is not None:
            raise CallerError(result.message, code=result.code)

    async def close(self) -> None:
        for asking in list(self._asking.values()):
            asking.cancel()
        while self._compilers:
            await self._drop(self._compilers.popitem()[1])

    def _asked(
        self, record: ModelRecord, grammar: str, key: bytes
    ) -> asyncio.Task[CallerError | None]:
        asking = self._asking.get(key)
        if asking is None:
            asking = asyncio.create_task(self._find_out(record, grammar, key))
            self._asking[key] = asking
            asking.add_done_callback(partial(self._answered, key))
        return asking

    def _answered(self, key: bytes, asking: asyncio.Task[CallerError | None]) -> None:
        del self._asking[key]
        if not asking.cancelled():
            asking.exception()  # whoever asked may have left: it is no news then

    async def _find_out(self, record: ModelRecord, grammar: str, key: bytes) -> CallerError | None:
        for _ in range(ATTEMPTS):
            async with self._using(record) as starting:
                try:
                    compiler = await asyncio.shield(starting)
                    code, message = await compiler.ask(grammar, self._limit_s)
                except _Gone:
                    if self._compilers.get(record.fingerprint) is starting:
                        del self._compilers[record.fingerprint]
                    await self._drop(starting)
                    continue
            if code == BUSY:
                raise OverloadError(message, code="grammar_check_busy", retry_after_ms=RETRY_MS)
            result = self._results[key] = CallerError(message, code=code) if code else None
            while len(self._results) > RESULTS_MAX:
                self._results.popitem(last=False)
            return result
        raise DependencyError("the grammar compiler does not answer", retry_after_ms=RETRY_MS)

    @contextlib.asynccontextmanager
    async def _using(self, record: ModelRecord) -> AsyncIterator[asyncio.Task[_Compiler]]:
        """The model's compiler, which makes room for no other one meanwhile."""
        name = record.fingerprint
        try:
            async with asyncio.timeout(START_S):
                await self._make_room(name)
        except TimeoutError as error:
            message = "grammars of too many models are being checked"
            raise OverloadError(
                message, code="grammar_check_busy", retry_after_ms=RETRY_MS
            ) from error
        starting = self._compilers.get(name)
        if starting is None:
            starting = self._compilers[name] = asyncio.create_task(_Compiler.start(record))
        self._compilers.move_to_end(name)
        self._users[name] += 1
        try:
            yield starting
        finally:
            self._users -= Counter([name])
            self._left.set()

    async def _make_room(self, name: str) -> None:
        """Returns when `name` has a compiler or can get one; those that are in use stay."""
        while name not in self._compilers and len(self._compilers) >= PROCESSES_MAX:
            idle = next((each for each in self._compilers if not self._users[each]), None)
            if idle is not None:
                await self._drop(self._compilers.pop(idle))
            else:
                self._left.clear()
                await self._left.wait()

    async def _drop(self, starting: asyncio.Task[_Compiler]) -> None:
        if not starting.done():
            starting.cancel()
        with contextlib.suppress(asyncio.CancelledError, HeadraceError, _Gone):
            await (await starting).close()


class _Compiler:
    """One `grammar_process`, ready for questions."""

    def __init__(self, process: Process) -> None:
        self._process = process
        self._ids = count()
        self._open: dict[int, asyncio.Future[tuple[str, str]]] = {}
        self._reading: asyncio.Task[None] | None = None

    @classmethod
    async def start(cls, record: ModelRecord) -> _Compiler:
        """Raises _Gone, or CallerError when the record's vocabulary cannot be read."""
        process = await asyncio.create_subprocess_exec(
            *COMMAND, stdin=PIPE, stdout=PIPE, preexec_fn=die_with_parent()
        )
        compiler = cls(process)
        try:
            async with asyncio.timeout(START_S):
                await compiler._send(wire.encode_model(record))
                error = wire.Fields("compiler", await compiler._receive()).get("error", str)
        except (TimeoutError, asyncio.CancelledError, WireError, _Gone) as gone:
            await compiler.close()
            if isinstance(gone, asyncio.CancelledError):
                raise
            raise _Gone from gone
        if error:
            await compiler.close()
            raise CallerError(error, code="grammar_unsupported")
        compiler._reading = asyncio.create_task(compiler._read())
        return compiler

    async def ask(self, grammar: str, limit_s: float) -> tuple[str, str]:
        """(code, message), code '' for a grammar that can be used. Raises _Gone."""
        id = next(self._ids)
        answer: asyncio.Future[tuple[str, str]] = asyncio.get_running_loop().create_future()
        self._open[id] = answer
        try:
            if self._reading is None or self._reading.done():
                raise _Gone
            async with asyncio.timeout(limit_s + GRACE_S):
                await self._send({"id": id, "grammar": grammar, "ms": int(limit_s * 1_000)})
                return await answer
        except TimeoutError as error:
            raise _Gone from error
        finally:
            del self._open[id]

    async def close(self) -> None:
        if self._reading is not None:
            self._reading.cancel()
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()
        await self._process.wait()

    async def _send(self, value: object) -> None:
        assert self._process.stdin is not None, "the process was started with a pipe"
        try:
            self._process.stdin.write(frame(value))
            await self._process.stdin.drain()
        except (ConnectionError, RuntimeError) as error:
            raise _Gone from error

    async def _receive(self) -> bytes:
        assert self._process.stdout is not None, "the process was started with a pipe"
        try:
            (length,) = LENGTH.unpack(await self._process.stdout.readexactly(LENGTH.size))
            return await self._process.stdout.readexactly(length)
        except (asyncio.IncompleteReadError, ConnectionError) as error:
            raise _Gone from error

    async def _read(self) -> None:
        """Hands out answers until the process ends; whoever still waits then learns it."""
        try:
            while True:
                fields = wire.Fields("verdict", await self._receive())
                answer = self._open.get(fields.get("id", int))
                if answer is not None and not answer.done():
                    answer.set_result((fields.get("code", str), fields.get("message", str)))
        except (_Gone, WireError):
            pass
        finally:
            for answer in self._open.values():
                if not answer.done():
                    answer.set_exception(_Gone())
