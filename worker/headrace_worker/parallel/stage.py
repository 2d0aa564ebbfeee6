"""One rank's turn in a step: take what the stage before made, compute, pass on or choose tokens.

Invariant: every rank of the worker takes its turn in every step, in the same order; so whoever has
an answer to a step knows that all KV of that step is written, on every rank: each rank of a stage
was met in its last sum, and each stage's work was taken by the next.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from headrace_worker import native
from headrace_worker.executor import Executor
from headrace_worker.parallel.links import Links
from headrace_worker.parallel.shape import Part
from headrace_worker.parallel.vocabulary import Verdict, Vocabulary
from headrace_worker.step_inputs import StepInputs


class Stage:
    """What a rank does with every step."""

    def __init__(self, executor: Executor, part: Part, runs: Sequence[range], links: Links) -> None:
        """`runs`: which tokens of the vocabulary each tensor rank's head knows."""
        self._executor, self._part, self._links = executor, part, links
        self._vocabulary = None
        if part.last:
            self._vocabulary = Vocabulary(runs, links.group, native.library())

    def run(self, inputs: StepInputs) -> Verdict | None:
        """The step's tokens, on the first rank of the last stage; None on others.

        Raises what the links raise, when another rank is gone.
        """
        x = None
        if not self._part.first:
            x = self._take(inputs)
        out = self._executor.forward(inputs, x)
        if self._vocabulary is None:
            assert out is not None, "only the last stage may have nothing to say"
            self._links.pass_on(out)
            return None
        return self._choose(self._vocabulary, out, inputs)

    def _take(self, inputs: StepInputs) -> Tensor:
        hidden = self._part.whole.hidden_size
        return self._links.take((len(inputs.tokens), hidden), self._executor.passed_dtype)

    def _choose(
        self, vocabulary: Vocabulary, logits: Tensor | None, inputs: StepInputs
    ) -> Verdict | None:
        if logits is None:
            return nothing() if self._links.group.rank == 0 else None
        assert inputs.wishes is not None, "wanted rows come with wishes"
        with torch.inference_mode():
            return vocabulary.choose(logits, inputs.wishes)


def nothing() -> Verdict:
    """Of a step without wanted rows."""
    tokens = torch.empty(0, dtype=torch.int64).numpy()
    return Verdict(tokens, torch.empty(0, 0))
