"""Cosines and sines of a rotary table by position, made once and looked up by the kernels.

Invariant: a position's numbers are those that model/rope.py computes for it. Memory is set aside
for the whole context, but only what some sequence has reached is written, and so takes room: two
numbers of four bytes for each rotated dimension, some percent of the KV that the sequence has then.
Rejected: computing them in each step, which took a tenth of a millisecond for a single row.
"""

from __future__ import annotations

import numpy as np
import torch

from headrace_worker.model.config import Rope
from headrace_worker.model.rope import Angles
from headrace_worker.native.abi import address_of
from headrace_worker.probing import one_thread

POSITIONS_AT_A_TIME = 256


class AngleTable:
    """Tables `cos` and `sin`, float32 [context, rotated], of which `reach` fills the first rows."""

    def __init__(self, rope: Rope, context_tokens: int) -> None:
        self._angles = Angles(rope, context_tokens, torch.float32)
        shape = (context_tokens, rope.rotated)
        self.cos, self.sin = np.empty(shape, np.float32), np.empty(shape, np.float32)
        self._made = 0

    @property
    def addresses(self) -> tuple[int, int]:
        """Of `cos` and `sin`; they stay."""
        return address_of(self.cos), address_of(self.sin)

    def reach(self, length: int) -> None:
        """Fills the rows of positions below `length`, which is no more than the context."""
        context = len(self.cos)
        assert length <= context, "a position behind the context"
        while self._made < length:
            start, stop = self._made, min(self._made + POSITIONS_AT_A_TIME, context)
            with one_thread():  # a pool of torch's would spin for milliseconds against the team
                cos, sin = self._angles(torch.arange(start, stop))
            self.cos[start:stop], self.sin[start:stop] = cos[:, 0].numpy(), sin[:, 0].numpy()
            self._made = stop
