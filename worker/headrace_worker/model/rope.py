"""Rotary position embedding: frequencies by kind of scaling, and the rotation itself.

Sources: Su et al., "RoFormer", 2021; layout "rotate half" (the two numbers of a pair stand half the
rotated dimensions apart), as Hugging Face checkpoints have it. Chen et al., "Position
Interpolation", 2023 (linear); Meta's Llama 3.1 release (llama3); Peng et al., "YaRN", 2023; Ding
et al., "LongRoPE", 2024.

Invariant: angles are computed in float32 whatever the model's dtype, since positions in the
thousands times small frequencies lose all meaning in bfloat16.

Rejected: tables over all positions. A step needs a few rows of them, and for a context of 131,072
tokens and heads of 128 they take 134 MB in float32, twice that for a model of two bases.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from headrace.errors import ModelError
from headrace_worker.model.config import Rope


def frequencies(rotated: int, theta: float) -> Tensor:
    """Unscaled inverse frequencies for `rotated` dimensions of a head, float32 [rotated / 2]."""
    exponents = torch.arange(0, rotated, 2, dtype=torch.int64).float() / rotated
    return 1.0 / (theta**exponents)


def plain(rotated: int, theta: float) -> Rope:
    """No scaling."""
    return Rope(_numbers(frequencies(rotated, theta)))


def linear(rotated: int, theta: float, factor: float) -> Rope:
    """Positions divided by `factor`."""
    return Rope(_numbers(frequencies(rotated, theta) / factor))


def llama3(
    rotated: int, theta: float, *, factor: float, low: float, high: float, original_tokens: int
) -> Rope:
    """Llama 3.1's scaling.

    Wavelengths that fit `high` times into the original context stay, those that fit less than
    `low` times are stretched by `factor`, those between are blended.
    """
    unscaled = frequencies(rotated, theta)
    wavelengths = 2 * math.pi / unscaled
    stretched = unscaled / factor
    blend = (original_tokens / wavelengths - low) / (high - low)
    blended = (1 - blend) * stretched + blend * unscaled
    scaled = torch.where(wavelengths > original_tokens / low, stretched, unscaled)
    between = (wavelengths <= original_tokens / low) & (wavelengths >= original_tokens / high)
    return Rope(_numbers(torch.where(between, blended, scaled)))


def yarn_attention_factor(factor: float, mscale: float = 1.0) -> float:
    """What YaRN multiplies cosines and sines with for a context `factor` times as long."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def yarn(
    rotated: int,
    theta: float,
    *,
    factor: float,
    original_tokens: int,
    attention_factor: float,
    beta_fast: float = 32.0,
    beta_slow: float = 1.0,
    truncate: bool = True,
) -> Rope:
    """YaRN: frequencies that turn often in the original context stay, slow ones are stretched.

    Pairs that turn more than `beta_fast` times stay, those below `beta_slow` turns are divided by
    `factor`, with a ramp over the pairs between; `truncate` rounds the ramp's ends outwards.
    """

    def pair_of(turns: float) -> float:
        """The pair, as a fraction, that turns so often in the original context."""
        return rotated * math.log(original_tokens / (turns * 2 * math.pi)) / (2 * math.log(theta))

    first, last = pair_of(beta_fast), pair_of(beta_slow)
    if truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, rotated - 1)
    if first == last:
        last += 0.001  # a ramp needs a slope
    ramp = (torch.arange(rotated // 2, dtype=torch.float32) - first) / (last - first)
    stretched = ramp.clamp(0, 1)
    unscaled = frequencies(rotated, theta)
    scaled = unscaled / factor * stretched + unscaled * (1 - stretched)
    return Rope(_numbers(scaled), attention_factor)


def longrope_attention_factor(factor: float, original_tokens: int) -> float:
    """What LongRoPE multiplies cosines and sines with for a context `factor` times as long."""
    return 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original_tokens))


def longrope(
    rotated: int,
    theta: float,
    *,
    short: Sequence[float],
    long: Sequence[float],
    original_tokens: int,
    attention_factor: float,
) -> Rope:
    """LongRoPE: each frequency divided by a factor of its own, from one of two tables.

    Raises ModelError for tables of another length than the frequencies.
    """
    unscaled = frequencies(rotated, theta)
    for name, factors in (("short", short), ("long", long)):
        if len(factors) != len(unscaled):
            raise ModelError(
                f"{len(factors)} {name} rotary factors for {len(unscaled)} frequencies"
            )
    return Rope(
        _numbers(unscaled / torch.tensor(short, dtype=torch.float32)),
        attention_factor,
        _numbers(unscaled / torch.tensor(long, dtype=torch.float32)),
        original_tokens,
    )


def _numbers(values: Tensor) -> tuple[float, ...]:
    return tuple(values.tolist())


class Angles:
    """From positions to the cosines and sines of one rotary table."""

    def __init__(self, rope: Rope, context_tokens: int, dtype: torch.dtype) -> None:
        """`context_tokens`: the served context, which decides between LongRoPE's tables."""
        base = torch.tensor(rope.for_context(context_tokens), dtype=torch.float32)
        # the first half of the sines has to be negated: see `rotate`
        self._frequencies = torch.cat((-base, base))
        self._factor, self._dtype = rope.factor, dtype

    def __call__(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """positions int64 [N] → cosines and sines, each [N, 1, rotated dimensions].

        The first half of the sines is negated, so that `rotate` needs a roll instead of a split, a
        negation and a concatenation.
        """
        if self._frequencies.device != positions.device:  # once: wherever the model is
            self._frequencies = self._frequencies.to(positions.device)
        angles = positions[:, None, None] * self._frequencies
        cos, sin = angles.cos(), angles.sin()
        if self._factor != 1:
            cos, sin = cos * self._factor, sin * self._factor
        return cos.to(self._dtype), sin.to(self._dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates x [N, heads, head_dim] by cos and sin [N, 1, head_dim], a new tensor."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


def rotate_part(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates the first dimensions of x [N, heads, head_dim], as many as cos and sin have."""
    rotated = cos.shape[-1]
    return torch.cat((rotate(x[..., :rotated], cos, sin), x[..., rotated:]), dim=-1)
