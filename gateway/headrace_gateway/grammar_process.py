"""The process that compiles callers' grammars: one for a model, each grammar in a fork of its own.

Invariants:
- a grammar can use up one fork, never this process: CPU_S of processor time (which a busy machine
  does not shorten), MEMORY_BYTES beyond what the vocabulary takes, STACK_BYTES of stack. The kernel
  ends a fork that goes further, and its death is the answer;
- every request is answered before its deadline, and a full queue is answered at once;
- a fork that is not done after YOUNG_S runs on with what the others leave it, and makes room for
  new ones: most grammars take 5 to 50 ms, and do not wait for the few that take longer;
- nothing here outlives its parent, and a fork never outlives this process.

A fork starts with the vocabulary already read, so a check costs milliseconds and a killed one
nothing. This process has one thread, as forking demands. Rejected: a pool of long-lived compilers
(a hostile grammar kills one, and the next request pays for reading the vocabulary again), and
threads in the gateway (they cannot be killed, and a stack that overflows takes all along).

Frames on stdin and stdout: 4 bytes of length, big-endian, then msgpack. First comes the model's
record, answered by a map with `error` ('' when it could be read); then {id, grammar, ms} each
answered by {id, code, message}: code '' for a grammar that can be used.
"""

from __future__ import annotations

import contextlib
import os
import resource
import selectors
import signal
import struct
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from headrace import wire
from headrace.errors import CallerError, HeadraceError
from headrace.grammars import Grammars, Matcher
from headrace.supervisor import die_with_parent

CPU_S = 0.25
MEMORY_BYTES = 128 * 1024 * 1024
STACK_BYTES = 2 * 1024 * 1024
"""A quarter of what threads usually have: what fits here fits into a worker's."""
YOUNG_S = 0.1
YOUNG_MAX = 4
FORKS_MAX = 12
CROWDED_S = 0.3
"""After so long a fork may be ended early, when there is no room for another."""
QUEUE_MAX = 256
NICENESS, OLD_NICENESS = 5, 19
ANSWER_BYTES_MAX = 16 * 1024
WALKS = 2
WALK_TOKENS = 24
"""What compiles may still cost too much later, so the first steps of a few texts are made."""
LENGTH = struct.Struct(">I")

TOO_LONG = "the grammar takes too long to compile"
BUSY = "busy"
"""The code of an answer that says nothing about the grammar: there was no time for it."""


def frame(value: Any) -> bytes:
    payload = wire.pack(value) if not isinstance(value, bytes) else value
    return LENGTH.pack(len(payload)) + payload


@dataclass
class _Request:
    id: int
    grammar: str
    deadline_s: float


@dataclass
class _Fork:
    pid: int
    request: _Request
    born_s: float
    old: bool = False
    said: bytearray = field(default_factory=bytearray)


class GrammarServer:
    """Reads requests from `source`, answers on `sink` (file descriptors), until `source` ends."""

    def __init__(self, grammars: Grammars, source: int, sink: int) -> None:
        self._grammars = grammars
        self._source = source
        self._sink = sink
        self._buffer = bytearray()
        self._waiting: deque[_Request] = deque()
        self._forks: dict[int, _Fork] = {}
        self._ready = selectors.DefaultSelector()
        self._ready.register(source, selectors.EVENT_READ)

    def serve(self) -> None:
        while True:
            for key, _ in self._ready.select(self._patience_s()):
                if key.fd != self._source:
                    self._listen(key.fd)
                elif not self._read():
                    return
            self._expire()
            self._age()
            while self._waiting and self._has_room():
                self._fork(self._waiting.popleft())

    def _patience_s(self) -> float | None:
        """How long nothing can happen by itself."""
        moments = [request.deadline_s for request in self._waiting]
        for fork in self._forks.values():
            moments += [fork.request.deadline_s, *([] if fork.old else [fork.born_s + YOUNG_S])]
            moments += [fork.born_s + CROWDED_S] if self._waiting else []
        return max(0.001, min(moments) - time.monotonic()) if moments else None

    def _has_room(self) -> bool:
        if len(self._forks) < FORKS_MAX:
            return sum(not fork.old for fork in self._forks.values()) < YOUNG_MAX
        descriptor, eldest = next(iter(self._forks.items()))
        if eldest.born_s + CROWDED_S > time.monotonic():
            return False
        self._kill(descriptor)
        return True

    def _age(self) -> None:
        """What takes longer than usual gets only what the others leave."""
        grown_up_s = time.monotonic() - YOUNG_S
        for fork in self._forks.values():
            if not fork.old and fork.born_s <= grown_up_s:
                fork.old = True
                with contextlib.suppress(OSError):
                    os.setpriority(os.PRIO_PROCESS, fork.pid, OLD_NICENESS)

    def _read(self) -> bool:
        data = os.read(self._source, 1 << 20)
        self._buffer += data
        for payload in _frames(self._buffer):
            fields = wire.Fields("grammar request", payload)
            deadline_s = time.monotonic() + fields.get("ms", int) / 1_000
            request = _Request(fields.get("id", int), fields.get("grammar", str), deadline_s)
            if len(self._waiting) < QUEUE_MAX:
                self._waiting.append(request)
            else:
                self._answer(request, BUSY, "too many grammars are being checked")
        return bool(data)

    def _fork(self, request: _Request) -> None:
        source, sink = os.pipe()
        in_child = die_with_parent()
        pid = os.fork()
        if pid == 0:
            os.close(source)
            _be_the_fork(in_child, lambda: _verdict(self._grammars, request.grammar), sink)
        os.close(sink)
        self._forks[source] = _Fork(pid, request, time.monotonic())
        self._ready.register(source, selectors.EVENT_READ)

    def _listen(self, descriptor: int) -> None:
        fork = self._forks[descriptor]
        data = os.read(descriptor, ANSWER_BYTES_MAX)
        fork.said += data
        if not data:
            self._end(descriptor)

    def _expire(self) -> None:
        now_s = time.monotonic()
        for descriptor, fork in list(self._forks.items()):
            if fork.request.deadline_s <= now_s:
                self._kill(descriptor)
        late = [request for request in self._waiting if request.deadline_s <= now_s]
        for request in late:
            self._waiting.remove(request)
            self._answer(request, BUSY, "no time to check the grammar")

    def _kill(self, descriptor: int) -> None:
        os.kill(self._forks[descriptor].pid, signal.SIGKILL)
        self._end(descriptor)

    def _end(self, descriptor: int) -> None:
        fork = self._forks.pop(descriptor)
        self._ready.unregister(descriptor)
        os.close(descriptor)
        _, status, usage = os.wait4(fork.pid, 0)
        if status == 0 and fork.said:
            said = wire.Fields("verdict", bytes(fork.said))
            self._answer(fork.request, said.get("code", str), said.get("message", str))
        elif os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
            # it was we who ended it: was it slow, or the machine?
            slow = usage.ru_utime + usage.ru_stime > CPU_S / 2
            code = "grammar_too_complex" if slow else BUSY
            self._answer(fork.request, code, TOO_LONG)
        elif os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGPROF:
            self._answer(fork.request, "grammar_too_complex", TOO_LONG)
        else:
            message = "the grammar needs too much memory, or nests too deep, to be compiled"
            self._answer(fork.request, "grammar_too_complex", message)

    def _answer(self, request: _Request, code: str, message: str) -> None:
        _write(self._sink, frame({"id": request.id, "code": code, "message": message}))


def _be_the_fork(bind: Callable[[], None], work: Callable[[], bytes], sink: int) -> None:
    """Does `work` under the limits, writes its result and ends; never returns."""
    try:
        bind()
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 2)  # what a panic prints is no news for the gateway's log
        used = _address_space_bytes()
        for limit, size in (
            (resource.RLIMIT_CORE, 0),
            (resource.RLIMIT_STACK, STACK_BYTES),
            *([(resource.RLIMIT_AS, used + MEMORY_BYTES)] if used else []),
        ):
            resource.setrlimit(limit, (size, resource.getrlimit(limit)[1]))
        signal.setitimer(signal.ITIMER_PROF, CPU_S)
        _write(sink, work())
        os._exit(0)
    finally:
        os._exit(1)


def _address_space_bytes() -> int:
    """What this process has mapped; 0 where the system does not say."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    except OSError:
        return 0


def _verdict(grammars: Grammars, grammar: str) -> bytes:
    try:
        for seed in range(WALKS):
            _walk(grammars.compile(grammar), Random(seed))
    except CallerError as error:
        return wire.pack({"code": error.code or "invalid_grammar", "message": error.message})
    return wire.pack({"code": "", "message": ""})


def _walk(matcher: Matcher, random: Random) -> None:
    """The first tokens of a text that the grammar allows, with all that an engine asks for."""
    for _ in range(WALK_TOKENS):
        matcher.forced()
        mask = matcher.mask()
        if matcher.failure:
            raise CallerError(
                f"the grammar grows too complex while it is used: {matcher.failure}",
                code="grammar_too_complex",
            )
        allowed = [at for at, byte in enumerate(mask) if byte]
        if matcher.ended or not allowed:
            return
        at = random.choice(allowed)
        token = at * 8 + random.choice([bit for bit in range(8) if mask[at] >> bit & 1])
        if not matcher.accept(token):
            return


def _frames(buffer: bytearray) -> Iterator[bytes]:
    """Takes the whole frames off the front of `buffer`."""
    while len(buffer) >= LENGTH.size:
        (length,) = LENGTH.unpack_from(buffer)
        if len(buffer) < LENGTH.size + length:
            return
        payload = bytes(buffer[LENGTH.size : LENGTH.size + length])
        del buffer[: LENGTH.size + length]
        yield payload


def _write(descriptor: int, data: bytes) -> None:
    while data:
        data = data[os.write(descriptor, data) :]


def _first_frame(source: int) -> bytes:
    buffer = bytearray()
    while True:
        data = os.read(source, 1 << 20)
        if not data:
            raise SystemExit(0)
        buffer += data
        for payload in _frames(buffer):
            return payload


def main(source: int = 0, sink: int = 1) -> None:
    # Ctrl-C reaches the whole group; the parent's end of stdin is what ends this process
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.nice(NICENESS)
    try:
        grammars = Grammars(wire.decode_model(_first_frame(source)))
    except HeadraceError as error:
        _write(sink, frame({"error": error.message}))
        return
    _write(sink, frame({"error": ""}))
    with contextlib.suppress(BrokenPipeError):
        GrammarServer(grammars, source, sink).serve()


if __name__ == "__main__":
    main()
