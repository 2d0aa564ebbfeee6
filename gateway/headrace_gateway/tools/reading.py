"""A parser as a choice's reader: how many calls a message may have.

Invariant: at most `calls_max` calls come out, all of them ended; behind the last of them nothing.
"""

from __future__ import annotations

from headrace_gateway.tools.events import CallEnds, Event, ToolParser

CALLS_MAX = 128
"""Calls in one message. A model that makes more goes round in circles."""


class ToolReader:
    """`ended` once `calls_max` calls have ended; what follows them is not read."""

    def __init__(self, parser: ToolParser, calls_max: int = CALLS_MAX) -> None:
        self._parser = parser
        self._left = calls_max
        self.ended = False

    def push(self, text: str) -> list[Event]:
        return self._limited(self._parser.push(text))

    def finish(self) -> list[Event]:
        return [] if self.ended else self._limited(self._parser.finish())

    def _limited(self, events: list[Event]) -> list[Event]:
        for at, event in enumerate(events):
            if isinstance(event, CallEnds):
                self._left -= 1
                if self._left == 0:
                    self.ended = True
                    return events[: at + 1]
        return events
