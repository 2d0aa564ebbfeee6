"""RMS norms: plain, and with weights that count from one.

Source: Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019.

Invariant: a norm is computed in float32 whatever the model's dtype, and rounded once or, as the
reference does for the plain kind, before the weights are applied. Weights of two dimensions hold a
row for each head: queries and keys have different ones, and one call takes both.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

Norm = Callable[[Tensor], Tensor]
"""x [..., size] or [N, heads, size], normalized over the last dimension."""

NormKind = Callable[[Tensor, float], Norm]
"""A kind of norm: from weights [size] or [heads, size] and epsilon to the norm itself."""


def plain(weight: Tensor, eps: float) -> Norm:
    """x / rms(x) * weight."""
    shape = [weight.shape[-1]]
    if weight.ndim == 1:
        # bound keywords: an object of our own costs more than the norm of one row
        return partial(torch.rms_norm, normalized_shape=shape, weight=weight, eps=eps)
    return partial(_by_head, shape=shape, weight=weight, eps=eps)


def _by_head(x: Tensor, *, shape: list[int], weight: Tensor, eps: float) -> Tensor:
    return torch.rms_norm(x, shape, None, eps) * weight


def weights_of(norm: Norm) -> Tensor:
    """The weights of a `plain` norm."""
    assert isinstance(norm, partial), "only plain norms show their weights"
    weight: Tensor = norm.keywords["weight"]
    return weight


def shifted(weight: Tensor, eps: float) -> Norm:
    """x / rms(x) * (1 + weight), as Gemma has it: in float32 to the end, rounded once.

    The sum is folded here, in float32: in bfloat16 it would lose what small weights say.
    """
    shape, folded = [weight.shape[-1]], 1.0 + weight.float()

    def norm(x: Tensor) -> Tensor:
        return (torch.rms_norm(x.float(), shape, None, eps) * folded).to(x.dtype)

    return norm
