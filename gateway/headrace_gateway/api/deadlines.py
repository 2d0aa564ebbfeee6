"""By when a client wants its first token and its last: a body field, or a header.

Invariant: a deadline that cannot be read is refused, never ignored: its client would wait for what
it no longer wants. Both count from the request's arrival.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from headrace.errors import CallerError
from headrace_gateway.api.validation import bad_value

DEADLINE_HEADER = "x-headrace-deadline-ms"
DEADLINE_FIELD = "deadline_ms"
DEADLINE_MS_MAX = 86_400_000
"""A day, as long as a job lives."""

Milliseconds = Annotated[int, Field(ge=1, le=DEADLINE_MS_MAX)]


class DeadlineParts(BaseModel):
    """`{"ttft": ms, "total": ms}`, at least one of them."""

    # a misspelt name would be a deadline that nobody keeps
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    ttft: Milliseconds | None = None
    total: Milliseconds | None = None


DeadlineField = Milliseconds | DeadlineParts
"""`deadline_ms` of a body; a number is the total."""


@dataclass(frozen=True, slots=True)
class Deadline:
    """Milliseconds from the arrival to the first token and to the last; 0 is no deadline."""

    ttft_ms: int = 0
    total_ms: int = 0

    def instants(self, arrived_ms: int) -> tuple[int, int]:
        """Both as instants on the clock of `arrived_ms`; 0 stays 0."""
        ttft_by_ms = arrived_ms + self.ttft_ms if self.ttft_ms else 0
        return ttft_by_ms, arrived_ms + self.total_ms if self.total_ms else 0


def deadline_of(field: DeadlineField | None, header: str) -> Deadline:
    """What the body says; what the header says where the body says nothing. Raises CallerError."""
    if field is None:
        return _parse_header(header) if header else Deadline()
    if isinstance(field, int):
        return Deadline(total_ms=field)
    if field.ttft is None and field.total is None:
        raise bad_value(DEADLINE_FIELD, "needs 'ttft' or 'total'")
    return Deadline(field.ttft or 0, field.total or 0)


_HEADER_PART = re.compile(r"[ \t]*(?:(ttft|total)[ \t]*=[ \t]*)?([0-9]{1,9})[ \t]*")


def _parse_header(text: str) -> Deadline:
    """`2000` (the total), or `ttft=500, total=2000`, or one of the two."""
    found: dict[str, int] = {}
    for part in text.split(","):
        match = _HEADER_PART.fullmatch(part)
        name = (match[1] or "total") if match else ""
        if match is None or name in found or not 1 <= int(match[2]) <= DEADLINE_MS_MAX:
            raise CallerError(
                f"{DEADLINE_HEADER}: milliseconds from 1 to {DEADLINE_MS_MAX}, as `2000` or "
                "`ttft=500, total=2000`",
                param=DEADLINE_HEADER,
                code="invalid_value",
            )
        found[name] = int(match[2])
    return Deadline(found.get("ttft", 0), found.get("total", 0))
