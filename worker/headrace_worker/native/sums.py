"""The sums over ranks that a native step takes part in: through a SharedGroup's memory, which is
lent to one call, or through a TorchGroup, which the call asks for each sum.

Invariant: before and after a step the group's turn is that of the step, so sums in Python and sums
in the kernels follow each other as if one hand had taken them, and are the same to the bit.

Rejected: sockets in the kernels, which would be a second transport beside gloo, with its own peers,
limits and failures, to save the microseconds that Python takes of a sum whose network takes more.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator
from typing import Protocol

import numpy as np
import torch

from headrace_worker.native import abi
from headrace_worker.parallel.collective import (
    LINE_BYTES,
    ONE_TURN_BYTES_MAX,
    Group,
    PeerError,
    SharedGroup,
    TorchGroup,
)

NOBODY = -1


class Lender(Protocol):
    """What a native step adds up through."""

    def lent(self) -> contextlib.AbstractContextManager[ctypes._Pointer[abi.Sums]]:
        """For one step. Raises PeerError, afterwards, for a rank that did not come."""
        ...


def lender_of(group: Group) -> Lender | None:
    """How native steps add up over the ranks of `group`; None where they cannot."""
    if isinstance(group, SharedGroup):
        return StepSums(group)
    return SumsApart(group) if isinstance(group, TorchGroup) else None


class StepSums:
    """One rank's, in memory that it shares."""

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
        sums, group = self._sums, self._group
        sums.turn, sums.bytes, sums.messages, sums.late = group.turn, 0, 0, NOBODY
        yield ctypes.pointer(sums)
        group.turn = sums.turn
        group.counts.bytes += sums.bytes
        group.counts.messages += sums.messages
        if sums.late != NOBODY:
            raise PeerError(f"rank {sums.late} did not come within {group.patience_s:g} s")


class SumsApart:
    """One rank's, over a network. What the kernels ask for runs in whichever of their threads came
    last; all others wait for it."""

    def __init__(self, group: TorchGroup) -> None:
        self._group = group
        self._error: BaseException | None = None
        # the kernels keep no more than the function's address
        self._call = abi.Apart(self._add_up)
        self._sums = abi.Sums(rank=group.rank, size=group.size, apart=self._call)

    def _add_up(self, address: ctypes._Pointer[ctypes.c_float], count: int) -> int:
        try:
            self._group.all_reduce(torch.from_numpy(np.ctypeslib.as_array(address, (count,))))
        except BaseException as error:  # nothing may pass through the kernels
            self._error = error
            return 1
        return 0

    @contextlib.contextmanager
    def lent(self) -> Iterator[ctypes._Pointer[abi.Sums]]:
        self._sums.late, self._error = NOBODY, None
        yield ctypes.pointer(self._sums)
        if self._error is not None:
            raise self._error
