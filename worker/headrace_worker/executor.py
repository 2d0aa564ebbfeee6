"""One rank's part of a step: its layers and heads over its part of the KV pool.

Invariant: an executor keeps no state between steps but the KV pool, so a step that failed half way
leaves nothing to repair: what it wrote lies in blocks that no hash names yet. It knows of no job
and decides nothing. Answers come in the order in which steps were submitted.
"""

from __future__ import annotations

from collections import deque
from typing import Protocol

import torch
from torch import Tensor

from headrace_worker.attention.interface import AttentionBackend, AttentionBatch
from headrace_worker.decode_graphs import DecodeGraphs
from headrace_worker.device import CPU
from headrace_worker.model import Decoder
from headrace_worker.native.program import Scored, Split, program_of
from headrace_worker.parallel.vocabulary import Verdict
from headrace_worker.step_inputs import StepInputs


class Steps(Protocol):
    """Who computes steps: one process, or several ranks together."""

    @property
    def depth(self) -> int:
        """How many steps may be under way at a time."""
        ...

    @property
    def choosing_vocab(self) -> int:
        """The size of the vocabulary where ranks choose tokens together; 0 where logits come."""
        ...

    @property
    def draws(self) -> bool:
        """Whether steps draw tokens, if they are told which."""
        ...

    def submit(self, inputs: StepInputs) -> None:
        """Begins a step; at most `depth` are begun and not collected.

        It has wishes where tokens are chosen together.
        """
        ...

    def collect(self) -> Tensor | Scored | Verdict | None:
        """What came of the oldest step's wanted rows: their logits, float32 [M, vocab], or tokens.

        None where M is 0.
        """
        ...


class Executor:
    """A model, or a rank's part of one, over one attention backend."""

    depth = 1
    choosing_vocab = 0

    def __init__(
        self,
        model: Decoder,
        backend: AttentionBackend,
        device: torch.device = CPU,
        graphs: DecodeGraphs | None = None,
        split: Split | None = None,
    ) -> None:
        """`split`: for a rank's part of a model."""
        self.model = model
        self._backend, self._device, self._graphs = backend, device, graphs
        self._program = program_of(model, backend, split)
        self.draws = self._program is not None and split is None
        self.passed_dtype = model.dtype if self._program is None else torch.float32
        """Of what stages hand each other."""
        self._done: deque[Tensor | Scored | None] = deque()

    def forward(self, inputs: StepInputs, x: Tensor | None = None) -> Tensor | None:
        """Computes this part of a step.

        `x` [N, hidden] is what the stage before made, None for the first stage. Gives what the next
        stage takes, [N, hidden]; from the last one float32 logits of the wanted rows [M, vocab],
        None where there are none.
        """
        if self._program is not None:
            if not self.model.last:
                return self._program.pass_on(inputs, x)
            scored = self._program.run(inputs, x)
            return None if scored is None else torch.from_numpy(scored.logits)
        device = self._device
        with torch.inference_mode():
            recorded = self._graphs.run(inputs) if self._graphs is not None else None
            if recorded is not None:
                return recorded
            attend = self._backend.prepare(
                AttentionBatch(
                    inputs.block_tables,
                    inputs.lengths,
                    inputs.query_starts,
                    torch.from_numpy(inputs.slots),
                )
            )
            model = self.model
            if x is None:
                x = model.embed(torch.from_numpy(inputs.tokens).to(device))
            x = model.through(x, torch.from_numpy(inputs.positions).to(device), attend)
            if not model.last:
                return x
            if not inputs.wanted_rows:
                return None
            rows = None if inputs.rows is None else torch.from_numpy(inputs.rows).to(device)
            return model.logits(x, rows)

    def submit(self, inputs: StepInputs) -> None:
        """Computes the whole step now."""
        whole = self._program
        self._done.append(self.forward(inputs) if whole is None else whole.run(inputs))

    def collect(self) -> Tensor | Scored | None:
        return self._done.popleft()
