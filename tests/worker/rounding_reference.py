"""What the kernels' `round_q8` has to come to, by torch."""

from __future__ import annotations

import torch
from torch import Tensor

from headrace_worker.native.abi import GROUP
from headrace_worker.native.linear import in_groups

LEVELS = 127
_SCALE_MIN = 1e-30


def turned(groups: Tensor) -> Tensor:
    """float32 [..., GROUP] times Sylvester's Hadamard matrix, in the kernels' order of sums."""
    x = groups
    for step in (1, 2, 4, 8, 16):
        pairs = x.reshape(*x.shape[:-1], -1, 2, step)
        first, second = pairs[..., 0, :], pairs[..., 1, :]
        x = torch.stack((first + second, first - second), -2).flatten(-3)
    return x


def quantize_q8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight [out, in] → turned, int8 [out, groups, GROUP], float32 scales [out, groups].

    Scales are rounded up to bfloat16, so that no weight is cut off.
    """
    groups = turned(in_groups(weight)) / GROUP
    exact = (groups.abs().amax(-1) / LEVELS).clamp_min_(_SCALE_MIN)
    scales = exact.bfloat16().float()
    low = scales < exact
    scales[low] = (scales[low].view(torch.int32) + (1 << 16)).view(torch.float32)
    values = (groups / scales[..., None]).round_().to(torch.int8)
    return values, scales
