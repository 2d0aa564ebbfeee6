"""A KV block on its way to the cache service: read where it lies for as long as the pool holds it.

Invariant: what is written is what the block's hash names, or nothing is. The engine calls `keep`
before the block is handed out again and `drop` when its numbers turn out wrong; both wait for a
copy that is being made, which takes a tenth of a millisecond.
Rejected: a reference that keeps the block from being handed out, which would shrink the pool by
what the cache service is behind; a copy when it is offered, which most blocks never need.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from functools import partial

import numpy as np
from numpy.typing import NDArray

from headrace.types import Band


class State(Enum):
    OFFERED = "offered"
    TAKEN = "taken"
    """Its bytes have been copied, or nobody needs them: they are there already."""
    DROPPED = "dropped"
    """It has not been written, and will not be."""


TRANSITIONS: dict[State, frozenset[State]] = {
    State.OFFERED: frozenset({State.TAKEN, State.DROPPED}),
    State.TAKEN: frozenset(),
    State.DROPPED: frozenset(),
}


class WithdrawnError(Exception):
    """The bytes of an export are not to be had any more."""


@dataclass(frozen=True, slots=True)
class ExportFacts:
    """What a block is. `depth` counts from 0; `band` and `tenant` are its owner's.

    `job` is to be told when it is written, as a block of its prompt; empty: nobody is. `pin_ms`:
    how long the service shall keep it at least. `cost_ms`: what computing it takes here, 0 where
    nobody measured.
    """

    hash: bytes
    parent: bytes
    depth: int
    band: Band = Band.STANDARD
    tenant: str = ""
    job: str = ""
    pin_ms: int = 0
    cost_ms: float = 0.0


class Export:
    """One block that the cache service is offered. `fill` may be called from any thread."""

    def __init__(
        self,
        facts: ExportFacts,
        size_bytes: int,
        read: Callable[[NDArray[np.uint8]], int | None],
        accepts: Callable[[memoryview], bool],
        *,
        quick: bool = False,
    ) -> None:
        """`read` writes the block's payload, as it is in the pool then, into `size_bytes` bytes.

        What `accepts` refuses is not written. `read` may have looked itself: it gives the CRC-32C
        of what it wrote then, or -1 where that is not to be accepted. `quick`: so that an event
        loop may wait for it.
        """
        self.facts = facts
        self.size_bytes = size_bytes
        self.quick = quick
        self._read: Callable[[NDArray[np.uint8]], int | None] | None = read
        self._accepts = accepts
        self._state = State.OFFERED
        self._lock = threading.Lock()

    @property
    def state(self) -> State:
        return self._state

    def _become(self, state: State) -> None:
        assert state in TRANSITIONS[self._state], f"{self._state} cannot become {state}"
        self._state = state
        self._read = None

    def fill(self, view: memoryview) -> int | None:
        """Writes the block's `size_bytes` into `view`; their CRC-32C, if that is known by the way.

        Raises WithdrawnError.
        """
        with self._lock:
            if self._state is not State.OFFERED or self._read is None:
                raise WithdrawnError
            crc = self._read(np.frombuffer(view, np.uint8))
            good = self._accepts(view) if crc is None else crc >= 0
            self._become(State.TAKEN if good else State.DROPPED)
        if not good:
            raise WithdrawnError
        return crc

    def settle(self) -> None:
        """It is written, or need not be."""
        self._end(State.TAKEN)

    def drop(self) -> None:
        """It is not going to be written: there is no room for it, or its numbers are wrong."""
        self._end(State.DROPPED)

    def _end(self, state: State) -> None:
        with self._lock:
            if self._state is State.OFFERED:
                self._become(state)

    def keep(self) -> None:
        """Its block is about to be handed out: makes a copy, if somebody may still want it."""
        with self._lock:
            if self._state is State.OFFERED and self._read is not None:
                copy = np.empty(self.size_bytes, np.uint8)
                self._read(copy)
                self._read = partial(np.copyto, src=copy)
