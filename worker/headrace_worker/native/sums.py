"""The sums over ranks that a native step takes part in: a SharedGroup's memory, lent to one call.

Invariant: before and after a step the group's turn is that of the step, so sums in Python and sums
in the kernels follow each other as if one hand had taken them.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator

from headrace_worker.native import abi
from headrace_worker.parallel.collective import (
    LINE_BYTES,
    ONE_TURN_BYTES_MAX,
    PeerError,
    SharedGroup,
)

NOBODY = -1


class StepSums:
    """One rank's."""

    def __init__(self, group: SharedGroup) -> None:
        self._group = group
        flags = abi.address_of(group.memory)
        self._sums = abi.Sums(
            flags=flags,
            slots=flags + group.size * LINE_BYTES,
            slot_bytes=group.slot_bytes,
            one_turn_bytes=ONE_TURN_BYTES_MAX,
            patience_us=round(group.patience_s * 1e6),
            rank=group.rank,
            size=group.size,
        )

    @contextlib.contextmanager
    def lent(self) -> Iterator[ctypes._Pointer[abi.Sums]]:
        """For one step. Raises PeerError, afterwards, for a rank that did not come."""
        sums, group = self._sums, self._group
        sums.turn, sums.bytes, sums.messages, sums.late = group.turn, 0, 0, NOBODY
        yield ctypes.pointer(sums)
        group.turn = sums.turn
        group.counts.bytes += sums.bytes
        group.counts.messages += sums.messages
        if sums.late != NOBODY:
            raise PeerError(f"rank {sums.late} did not come within {group.patience_s:g} s")
