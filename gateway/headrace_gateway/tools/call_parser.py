"""What the parsers of all formats share: plain text, a marker in it, and what proves no call.

Invariants:
- `_buffer` is the model's text that is neither shown nor certain to belong to a call. It begins
  where the doubt begins: what proves to be no call is shown from its first character on and read
  again behind its marker. Nothing is lost or repeated, and a call inside of it is found;
- what is held is bounded by HELD_CHARS_MAX, whatever a model writes;
- how far a state reads depends on the characters alone, never on where pushes end.

White space just before a call, and what trails behind the last one, belongs to the format and is no
text: templates put it there when they write the message again. Rejected: taking whole messages
apart with regular expressions, as nothing could be streamed, and JSON is not regular.

Arguments are handed on as they come, before their end is known. If they then stop being JSON, the
call ends incomplete and text goes on from there: what a client has read cannot be taken back.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Protocol

from headrace_gateway.tools.call_object import CallObject
from headrace_gateway.tools.events import Arguments, CallBegins, CallEnds, Event, Text, joined
from headrace_gateway.tools.json_scan import WHITESPACE

HELD_CHARS_MAX = 65_536
"""How much of a call may come before both its name and the start of its arguments."""
SPACES_MAX = 64
"""A longer run of white space is text, whatever stands behind it."""

State = Callable[[], bool]
"""Reads from the buffer; True when another state goes on, False when it needs more text."""


class Call(Protocol):
    """One call as a format writes it; `CallObject` has the meaning of each part."""

    @property
    def name(self) -> str | None: ...

    @property
    def certain(self) -> bool: ...

    @property
    def arguments_done(self) -> bool: ...

    @property
    def tail(self) -> str: ...

    @property
    def done(self) -> bool: ...

    @property
    def broken(self) -> bool: ...

    def scan(self, text: str, at: int, end: int) -> int: ...

    def take_arguments(self) -> str: ...


class CallParser(ABC):
    """Finds `marker` and reads calls behind it; what stands around their objects, formats know.

    `_head` is how much of the buffer is shown as text if what is being read proves no call; None
    where there is nothing to prove.
    """

    def __init__(self, names: frozenset[str], marker: str) -> None:
        self._names = names
        self._marker = marker
        self._events: list[Event] = []
        self._calls = 0
        self._buffer = ""
        self._at = 0
        self._head: int | None = None
        self._call: Call = CallObject(names)
        self._streaming = False
        self._behind_call = False
        self._ends_in_space = False
        self._state: State = self._text

    def push(self, text: str) -> list[Event]:
        self._buffer += text
        self._run()
        return self._drain()

    def finish(self) -> list[Event]:
        while self._head is not None:
            self._refuse()
            self._run()
        if self._streaming:
            self._end_call(complete=False)
        framing = self._state != self._text or not self._buffer.strip(WHITESPACE)
        if not (self._behind_call and framing):
            self._show(len(self._buffer))
        self._buffer = ""
        return self._drain()

    @abstractmethod
    def _opened(self) -> bool:
        """The state behind a marker: `_at` is where it ends."""

    @abstractmethod
    def _object_done(self) -> State:
        """The state behind a call that is complete."""

    def _run(self) -> None:
        while self._buffer and self._state():
            pass

    def _drain(self) -> list[Event]:
        events, self._events = joined(self._events), []
        return events

    def _text(self) -> bool:
        found = self._buffer.find(self._marker)
        certain = found if found >= 0 else len(self._buffer) - self._begun_marker()
        spaces = certain - len(self._buffer[:certain].rstrip(WHITESPACE))
        if spaces > SPACES_MAX or (self._ends_in_space and spaces == certain):
            spaces = 0
        self._show(certain - spaces)
        if found < 0:
            return False
        self._head = self._at = spaces + len(self._marker)
        self._state = self._opened
        return True

    def _begun_marker(self) -> int:
        """How many characters at the buffer's end may be the beginning of a marker."""
        longest = min(len(self._marker) - 1, len(self._buffer))
        return next(
            (size for size in range(longest, 0, -1) if self._buffer.endswith(self._marker[:size])),
            0,
        )

    def _show(self, size: int) -> None:
        """The buffer's first `size` characters are text."""
        shown, self._buffer = self._buffer[:size], self._buffer[size:]
        self._at = 0
        if shown:
            self._events.append(Text(shown))
            self._ends_in_space = shown[-1] in WHITESPACE
            self._behind_call = False

    def _refuse(self) -> bool:
        """What was being read is no call."""
        assert self._head is not None, "only what is not certain can be refused"
        self._show(self._head)
        self._head = None
        self._state = self._text
        return True

    def _expect(self, call: Call) -> bool:
        """`call` stands at `_at`, if it is one."""
        self._call = call
        self._state = self._object
        return True

    def _object(self) -> bool:
        call = self._call
        held = self._head is not None
        end = min(len(self._buffer), HELD_CHARS_MAX) if held else len(self._buffer)
        self._at = call.scan(self._buffer, self._at, end)
        if held and not call.certain:
            return (call.broken or self._at == HELD_CHARS_MAX) and self._refuse()
        if held:
            self._begin_call()
        self._buffer = self._buffer[self._at :]
        self._at = 0
        if delta := call.take_arguments():
            self._events.append(Arguments(self._calls, delta))
        if self._streaming and (call.arguments_done or call.broken):
            self._end_call(complete=call.arguments_done)
        if call.broken:
            self._buffer = call.tail + self._buffer
            self._state = self._text
        elif call.done:
            self._state = self._object_done()
        return bool(self._buffer)

    def _begin_call(self) -> None:
        assert self._call.name is not None, "a call that is certain has a name"
        self._head = None
        self._streaming = True
        self._ends_in_space = False
        self._events.append(CallBegins(self._calls, self._call.name))

    def _end_call(self, *, complete: bool) -> None:
        self._events.append(CallEnds(self._calls, complete))
        self._calls += 1
        self._streaming = False
        self._behind_call = complete
