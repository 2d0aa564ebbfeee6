"""The KV of a worker of several ranks as one pool, by block id and whole payload.

Invariant: a block id means the same on every rank, so whatever is done to a block is done to its
part on each. To its caller this is a KvPool; what comes in and goes out are whole models' payloads,
see payload.py. KV heads that several ranks hold go out of the first one's pool, and into all.

The pools lie in memory that all ranks of the host have mapped, so that the first rank copies in and
out by itself, at any time and from any thread, as if they were its own. What it writes before it
tells of a step, the others see in that step.

Rejected: telling each rank to copy its part, which waits for the step that it is in, and is a
round trip for what a copy does in a tenth of a millisecond.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from headrace.frames import Buffer
from headrace_worker.kv.payload import KvDtype, Payloads
from headrace_worker.kv.pool import KvPool
from headrace_worker.model.config import ModelConfig
from headrace_worker.parallel.shape import Part

Bytes = NDArray[np.uint8]


class PartSlice:
    """Which numbers of whole payloads are one part's."""

    def __init__(self, part: Part, dtype: torch.dtype, kv_dtype: KvDtype) -> None:
        self._part = part
        self._whole = Payloads(part.whole, dtype, kv_dtype)
        self._own = Payloads(part.config, dtype, kv_dtype)
        self.bytes = self._own.bytes
        """Size of the part's own payload."""

    def take(self, own: Bytes, whole: Bytes) -> None:
        """Fills a part's `own` payload from a `whole` one."""
        for target, source in self._pairs(own, whole):
            target[:] = source

    def put(self, own: Bytes, whole: Bytes) -> None:
        """Writes a part's `own` payload to where it belongs in a `whole` one."""
        for source, target in self._pairs(own, whole):
            target[:] = source

    def _pairs(self, own: Bytes, whole: Bytes) -> Iterable[tuple[Bytes, Bytes]]:
        layers, heads = self._part.layers, self._part.kv_heads
        sections = zip(self._own.sections(own), self._whole.sections(whole), strict=True)
        for mine, theirs in sections:
            yield (
                mine,
                theirs[layers.start : layers.stop, :, :, heads.start : heads.stop],
            )


class PartedKv:
    """All ranks' pools as one."""

    copies_quickly = False

    def __init__(
        self,
        parts: Sequence[tuple[Part, KvPool]],
        whole: ModelConfig,
        dtype: torch.dtype,
        kv_dtype: KvDtype,
    ) -> None:
        self._payloads = Payloads(whole, dtype, kv_dtype)
        self._pools = [pool for _, pool in parts]
        self._slices = [PartSlice(part, dtype, kv_dtype) for part, _ in parts]
        self._owns = [part.owns_kv for part, _ in parts]
        self.blocks = self._pools[0].blocks
        self.layout = self._payloads.layout
        self.check_integrity()

    @property
    def payload_bytes(self) -> int:
        """Size in bytes of one block's payload."""
        return self._payloads.bytes

    def copy_block(self, block: int, target: Bytes) -> None:
        """Writes the block's payload, as it is now, into `target`."""
        for pool, part, owns in zip(self._pools, self._slices, self._owns, strict=True):
            if owns:
                part.put(pool.payload(block), target)

    def export_block(self, block: int) -> bytes:
        """A copy of the block's payload."""
        room = np.empty(self.payload_bytes, np.uint8)
        self.copy_block(block, room)
        return room.tobytes()

    def accepts(self, data: Buffer) -> bool:
        """Whether `data` can be a block's payload. Safe from any thread."""
        return self._payloads.accepts(np.frombuffer(data, np.uint8))

    def import_block(self, block: int, data: Buffer) -> None:
        """Fills `block`. Raises ValueError, and zeroes it, for a payload that `accepts` refuses."""
        payload = np.frombuffer(data, np.uint8).copy()  # what is checked is what is used
        if not self._payloads.accepts(payload):
            self.zero_blocks([block])
            raise ValueError(f"{len(payload)} bytes are not {self.payload_bytes} of finite KV")
        for pool, part in zip(self._pools, self._slices, strict=True):
            part.take(pool.payload(block), payload)

    def zero_blocks(self, blocks: Iterable[int]) -> None:
        blocks = list(blocks)
        for pool in self._pools:
            pool.zero_blocks(blocks)

    def check_integrity(self) -> None:
        """All pools have the same blocks, and the owned parts are the whole."""
        assert {pool.blocks for pool in self._pools} == {self.blocks}, "pools of unequal size"
        owned = sum(part.bytes for part, owns in zip(self._slices, self._owns, strict=True) if owns)
        assert owned == self.payload_bytes, "each number of a payload is one part's"
