"""Structured logs on stderr: one line an event, key=value, or JSON where a collector reads it."""

from __future__ import annotations

import logging
import sys
from typing import Any

import structlog

_LEVEL_CHARS = 9
"""As wide as the longest name of a level, so that events stand below each other."""


class _PlainRenderer:
    """What structlog's console renderer writes without colours, in a tenth of its time: a gateway
    writes a line for each request. What comes with a traceback is left to that."""

    def __init__(self) -> None:
        self._whole = structlog.dev.ConsoleRenderer(colors=False, pad_event_to=0)

    def __call__(self, logger: Any, name: str, event: structlog.types.EventDict) -> str:
        if not {"exception", "exc_info", "stack"}.isdisjoint(event):
            return self._whole(logger, name, event)
        head = f"{event.pop('timestamp')} [{event.pop('level'):<{_LEVEL_CHARS}}] "
        said = [str(event.pop("event"))]
        for key in sorted(event):
            value = event[key]
            said.append(f"{key}={value if type(value) is str else repr(value)}")
        return head + " ".join(said)


def setup(service: str, *, level: str = "info", json: bool = False) -> None:
    """Configure structlog for the process; `service` stands on every line."""
    renderer: structlog.types.Processor = (
        structlog.processors.JSONRenderer()
        if json
        else structlog.dev.ConsoleRenderer(pad_event_to=0)
        if sys.stderr.isatty()
        else _PlainRenderer()
    )
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="%H:%M:%S.%f" if not json else "iso"),
            structlog.processors.StackInfoRenderer(),
            structlog.processors.format_exc_info,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(
            logging.getLevelNamesMapping()[level.upper()]
        ),
        logger_factory=structlog.PrintLoggerFactory(file=sys.stderr),
        cache_logger_on_first_use=True,
    )
    structlog.contextvars.bind_contextvars(service=service)
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr)
