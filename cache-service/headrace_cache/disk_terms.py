"""The disk tier's words: what becomes of an entry, what is counted, what is told.

Rejected: counters of each module's own, which somebody would have to add up.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

from headrace.frames import EntryKey


class Outcome(StrEnum):
    """What became of an entry that was put."""

    WRITTEN = "written"
    PRESENT = "present"
    TOO_LARGE = "too_large"
    CORRUPT = "corrupt"
    PAUSED = "paused"
    FAILED = "failed"


@dataclass(slots=True)
class Counts:
    """What has happened since the start."""

    written: int = 0
    written_bytes: int = 0
    present: int = 0
    refused: int = 0
    read: int = 0
    read_bytes: int = 0
    missed: int = 0
    corrupt: int = 0
    lost_records: int = 0
    lost_segments: int = 0
    read_errors: int = 0
    write_errors: int = 0
    disk_full: int = 0
    segments_dropped: int = 0
    carried: int = 0
    carried_bytes: int = 0
    forgotten: int = 0


class Came(StrEnum):
    """An event: what the disk holds has changed."""

    CAME = "came"
    WENT = "went"


Emit = Callable[[Came, EntryKey], None]
