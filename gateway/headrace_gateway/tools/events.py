"""What a model's text turns out to be, piece by piece: plain text, or calls of functions.

Invariant: events come in the text's order. A call is one CallBegins, any number of Arguments and
one CallEnds with the same index; indexes count from 0; nothing of another call comes in between.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Text:
    """Plain text, never empty."""

    text: str


@dataclass(frozen=True, slots=True)
class CallBegins:
    """A call of the offered function `name` begins; its arguments follow."""

    index: int
    name: str


@dataclass(frozen=True, slots=True)
class Arguments:
    """The next piece of the arguments' JSON text, never empty."""

    index: int
    delta: str


@dataclass(frozen=True, slots=True)
class CallEnds:
    """`complete`: the joined arguments are a JSON object; else the text broke off or went wrong."""

    index: int
    complete: bool


Event = Text | CallBegins | Arguments | CallEnds


class ToolParser(Protocol):
    """Reads one message as it comes. The joined result does not depend on how it is cut."""

    def push(self, text: str) -> list[Event]:
        """What is certain after `text`; what may be the beginning of a call is held back."""
        ...

    def finish(self) -> list[Event]:
        """What is left at the end of the message."""
        ...


def joined(events: Iterable[Event]) -> list[Event]:
    """`events` with neighbouring texts, and neighbouring pieces of the same arguments, as one."""
    made: list[Event] = []
    for event in events:
        last = made[-1] if made else None
        if isinstance(event, Text) and isinstance(last, Text):
            made[-1] = Text(last.text + event.text)
        elif isinstance(event, Arguments) and isinstance(last, Arguments):
            made[-1] = Arguments(event.index, last.delta + event.delta)
        else:
            made.append(event)
    return made
