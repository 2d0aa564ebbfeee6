"""Torch's scaled_dot_product_attention over pages: for GPUs where no flash-attn is installed.

The same calls as flash-attn's, with pages of one block: each sequence's keys and values are copied
together, padded to the longest, and masked. Slower in proportion to what is copied. Decode steps
are not recorded: a recording has one width for all steps, and would copy the longest context.

Invariant: what a row does not see has a weight of exactly zero; pages are never anything but
finite. Rejected: a call for each sequence, which would have to know the lengths on the host.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from headrace.types import BLOCK_TOKENS
from headrace_worker.attention.flash_kernels import Cached, Look, Rows


class PageSdpa:
    """`Kernels` of torch's own."""

    name, page_tokens, head_dim_max = "torch SDPA over pages", BLOCK_TOKENS, 1024
    dtypes: Sequence[torch.dtype] = (torch.float32, torch.float16, torch.bfloat16)
    devices: Sequence[str] = ("cuda", "cpu")
    capabilities: Sequence[int] = (8, 9, 10, 11, 12)

    def decode(self, q: Tensor, cached: Cached, look: Look) -> Tensor:
        return _attend(q[:, None], cached, cached.lengths[:, None], look)[:, 0]

    def recorded(self, q: Tensor, cached: Cached, _: Rows, look: Look) -> Tensor:
        return self.decode(q, cached, look)

    def prefill(self, q: Tensor, cached: Cached, rows: Rows, look: Look) -> Tensor:
        begins, counts = rows.starts[:-1], rows.starts.diff()
        place = torch.arange(rows.most, device=q.device)
        # [S, most]; what a sequence lacks repeats its last row
        row = torch.minimum(place[None, :], counts[:, None] - 1)
        seen = cached.lengths[:, None] - counts[:, None] + row + 1
        mixed = _attend(q[begins[:, None] + row], cached, seen, look)
        sequence = torch.repeat_interleave(
            torch.arange(len(counts), device=q.device), counts, output_size=len(q)
        )
        offset = torch.arange(len(q), device=q.device) - begins[sequence]
        return mixed[sequence, offset]

    def packed(self, *_: object) -> Tensor:
        raise AssertionError("pages of one block are never scattered")


def _attend(q: Tensor, cached: Cached, seen: Tensor, look: Look) -> Tensor:
    """q [S, n, heads, d], of which row i sees the first `seen[s, i]` tokens → the same shape."""
    tables = cached.tables.long()
    keys = cached.keys[tables].flatten(1, 2).transpose(1, 2)  # [S, kv_heads, T, d]
    values = cached.values[tables].flatten(1, 2).transpose(1, 2)
    place = torch.arange(keys.shape[2], device=q.device)
    shown = place < seen[..., None]
    if look.window:
        shown &= place >= seen[..., None] - look.window
    mixed = functional.scaled_dot_product_attention(
        q.transpose(1, 2),
        keys,
        values,
        attn_mask=shown[:, None],
        scale=look.scale,
        enable_gqa=True,
    )
    return mixed.transpose(1, 2)
