"""Rotary position embedding: frequencies and tables.

Source: Su et al., "RoFormer", 2021; layout "rotate half" (the two numbers of a pair stand
head_dim / 2 apart), as Hugging Face checkpoints have it. The `llama3` scaling is the one that Meta
published with Llama 3.1.

Invariant: angles are computed in float32 whatever the model's dtype, since positions in the
thousands times small frequencies lose all meaning in bfloat16.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def frequencies(head_dim: int, theta: float) -> Tensor:
    """Unscaled inverse frequencies, float32 [head_dim / 2]."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    return 1.0 / (theta**exponents)


def llama3_scaled(
    unscaled: Tensor, *, factor: float, low: float, high: float, original_tokens: int
) -> Tensor:
    """Llama 3.1's scaling of inverse frequencies [head_dim / 2].

    Wavelengths that fit `high` times into the original context stay, those that fit less than
    `low` times are stretched by `factor`, those between are blended.
    """
    wavelengths = 2 * math.pi / unscaled
    stretched = unscaled / factor
    blend = (original_tokens / wavelengths - low) / (high - low)
    blended = (1 - blend) * stretched + blend * unscaled
    scaled = torch.where(wavelengths > original_tokens / low, stretched, unscaled)
    between = (wavelengths <= original_tokens / low) & (wavelengths >= original_tokens / high)
    return torch.where(between, blended, scaled)


def tables(
    inverse_frequencies: tuple[float, ...], positions: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Cosines and sines, each [positions, head_dim].

    The first half of the sines is negated, so that `rotate` needs a roll instead of a split, a
    negation and a concatenation.
    """
    base = torch.tensor(inverse_frequencies, dtype=torch.float32)
    angles = torch.arange(positions, dtype=torch.float32)[:, None] * base[None, :]
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), dim=-1).to(dtype), torch.cat((-sin, sin), dim=-1).to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates x [N, heads, head_dim] by cos and sin [N, 1, head_dim], a new tensor."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)
