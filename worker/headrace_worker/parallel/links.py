"""How a rank reaches the others, on one host and over several.

Three ways lead from rank to rank: commands, from rank 0 to all; activations, from each rank of a
stage to its counterpart in the next; answers, from anybody to rank 0. Within a stage ranks add up
through a `Group`. Beats say that a process lives, whatever its main thread does.

Invariant: each way keeps the order in which it was written to, and a command is on every rank's way
before rank 0 begins its own part of it. So every rank meets the same steps in the same order, and
no word more has to be said between them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from headrace_worker.device import CPU
from headrace_worker.parallel.collective import Counts, Group, SharedGroup
from headrace_worker.parallel.ring import Reader, Writer, ring_bytes
from headrace_worker.parallel.shape import Shape
from headrace_worker.parallel.shared import LINE_BYTES, SharedMemory

COMMAND_RING_BYTES = 1 << 20
ACTIVATION_RING_BYTES = 16 << 20
"""Longer messages go through in pieces; memory is taken as it is used."""
ANSWER_RING_BYTES = 4 << 20
PATIENCE_S = 60.0
"""How long a rank that is alive may keep another waiting within a step."""
IDLE_LOOK_S = 3600.0
"""A rank that waits for commands waits for ever, in waits of so long."""


class Alone:
    """The Group of one rank."""

    rank, size = 0, 1

    def __init__(self) -> None:
        self.counts = Counts()

    def all_reduce(self, x: Tensor) -> Tensor:
        return x

    def gather(self, x: Tensor, to: int = 0) -> list[Tensor] | None:
        assert to == 0, "there is one rank"
        return [x]

    def broadcast(self, x: Tensor, source: int = 0) -> Tensor:
        assert source == 0, "there is one rank"
        return x


class Links(Protocol):
    """One rank's ways. Each belongs to one thread. What they raise ends the worker."""

    rank: int
    shape: Shape
    group: Group
    device: torch.device

    def command(self, data: bytes) -> None:
        """To all other ranks; for rank 0."""
        ...

    def next_command(self) -> NDArray[np.uint8]:
        """Waits for ever; for the others."""
        ...

    def pass_on(self, x: Tensor) -> None:
        """What this stage made, to the same tensor rank of the next stage."""
        ...

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """What the stage before made."""
        ...

    def answer(self, data: bytes) -> None:
        """To rank 0."""
        ...

    def next_answer(self, rank: int, limit_s: float) -> NDArray[np.uint8] | None:
        """Of `rank`; None when it has none within `limit_s`; for rank 0."""
        ...

    def beat(self) -> None:
        """This process lives; from a thread of its own."""
        ...

    def beats(self) -> list[int]:
        """How often each rank has beaten."""
        ...


@dataclass(frozen=True, slots=True)
class _Place:
    start: int
    size: int


class _Map:
    """Where everything lies in the memory of a host's ranks; the same for all of them."""

    def __init__(self, shape: Shape) -> None:
        self._end = 0
        others = shape.ranks - 1
        self.beats = self._add(shape.ranks * LINE_BYTES)
        self.commands = self._add(ring_bytes(COMMAND_RING_BYTES, max(1, others)))
        self.answers = [self._add(ring_bytes(ANSWER_RING_BYTES, 1)) for _ in range(others)]
        self.activations = [
            self._add(ring_bytes(ACTIVATION_RING_BYTES, 1))
            for _ in range((shape.pipeline - 1) * shape.tensor)
        ]
        group_bytes = SharedGroup.bytes_needed(shape.tensor)
        self.groups = [self._add(group_bytes) for _ in range(shape.pipeline)]

    def _add(self, size: int) -> _Place:
        place = _Place(self._end, size)
        self._end += -(-size // LINE_BYTES) * LINE_BYTES
        return place

    @property
    def bytes(self) -> int:
        return self._end


class SharedLinks:
    """Links of ranks on one host. Rank 0 makes the memory, see `create`."""

    device = CPU

    def __init__(self, memory: SharedMemory, rank: int, shape: Shape) -> None:
        """`memory` is rank 0's, with what `create` has put there at its beginning."""
        places = _Map(shape)
        self._bytes = memory.map(0, places.bytes)
        self.memory = memory
        self.rank, self.shape = rank, shape
        stage, tensor_rank = shape.place(rank)
        self.group: Group = Alone()
        if shape.tensor > 1:
            room = self._at(places.groups[stage])
            self.group = SharedGroup(room, tensor_rank, shape.tensor, patience_s=PATIENCE_S)
        others = shape.ranks - 1
        if rank == 0:
            self._commands = Writer(self._at(places.commands), others, patience_s=PATIENCE_S)
            self._answers = [Reader(self._at(place)) for place in places.answers]
        else:
            self._orders = Reader(self._at(places.commands), others, rank - 1)
            self._reply = Writer(self._at(places.answers[rank - 1]), patience_s=PATIENCE_S)
        if stage > 0:
            before = places.activations[rank - shape.tensor]
            self._before = Reader(self._at(before), patience_s=PATIENCE_S)
        if stage < shape.pipeline - 1:
            self._after = Writer(self._at(places.activations[rank]), patience_s=PATIENCE_S)
        beats = self._at(places.beats)
        self._beats = [
            beats.data[i * LINE_BYTES : i * LINE_BYTES + 8].cast("Q") for i in range(shape.ranks)
        ]

    @classmethod
    def create(cls, shape: Shape) -> SharedLinks:
        """Rank 0's, over new memory. Raises ModelError where this system has none."""
        memory = SharedMemory.create()
        memory.grow(_Map(shape).bytes)
        return cls(memory, 0, shape)

    def _at(self, place: _Place) -> NDArray[np.uint8]:
        return self._bytes[place.start : place.start + place.size]

    def command(self, data: bytes) -> None:
        self._commands.send(data)

    def next_command(self) -> NDArray[np.uint8]:
        while True:
            message = self._orders.receive(IDLE_LOOK_S)
            if message is not None:
                return message

    def pass_on(self, x: Tensor) -> None:
        self._after.send(_bytes_of(x))

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        # the stage before has the same command, so it is on its way, but for a long wait
        message = self._before.receive(PATIENCE_S)
        if message is None:
            raise LinkError(f"the stage before rank {self.rank} made nothing for {PATIENCE_S:g} s")
        return torch.from_numpy(message).view(dtype).view(shape)

    def answer(self, data: bytes) -> None:
        self._reply.send(data)

    def next_answer(self, rank: int, limit_s: float) -> NDArray[np.uint8] | None:
        return self._answers[rank - 1].receive(limit_s)

    def beat(self) -> None:
        self._beats[self.rank][0] += 1

    def beats(self) -> list[int]:
        return [beats[0] for beats in self._beats]


class LinkError(RuntimeError):
    """Another rank is gone or hangs: no step can be computed any more."""


def _bytes_of(x: Tensor) -> NDArray[np.uint8]:
    raw: NDArray[np.uint8] = x.contiguous().view(torch.uint8).numpy(force=True).reshape(-1)
    return raw
