"""The seam between model code and whatever holds and transforms its weights.

Invariant: a model asks for each tensor once, by Hugging Face's name, and for its matrices as
linear layers; quantization, packing and splitting over devices happen behind this seam, so that
no family knows of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from headrace_worker.model.linear import Embedding, Linear


class Weights(Protocol):
    """Where a model takes its weights from. Raises ModelError for what is missing or misshapen.

    `dtype` is the model's.
    """

    @property
    def dtype(self) -> torch.dtype: ...

    def take(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """The tensor in the model's dtype."""
        ...

    def embedding(self, name: str, shape: tuple[int, int]) -> Embedding:
        """From token ids to rows of the matrix `name`, [vocab, hidden]."""
        ...

    def linear(
        self, names: Sequence[str], outs: Sequence[int], columns: int, *, bias: bool = False
    ) -> Linear:
        """One layer over the matrices `names` (without `.weight`), stacked in this order.

        Matrix i has shape [outs[i], columns]; with `bias` each has one of [outs[i]] under `.bias`.
        """
        ...

    def router(self, name: str, shape: tuple[int, int]) -> Linear:
        """Which experts a token goes to: the matrix `name` in the model's dtype. Where the native
        kernels multiply, what a token gets does not depend on who is in the step beside it."""
        ...

    def tied_head(self, embedding: Tensor) -> Linear:
        """The output head that is the embedding matrix [vocab, hidden]."""
        ...

    def total(self, x: Tensor) -> Tensor:
        """The sum of all ranks' `x` where a layer's experts lie on several, else `x` itself."""
        ...
