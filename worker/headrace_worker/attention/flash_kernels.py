"""flash-attn as it is installed: versions 2, 3 and 4 behind one set of calls.

Signatures as in Dao-AILab/flash-attention, read at commit 0251105 (August 2026):
- 2, `flash_attn`: paged caches of pages that are multiples of 256 tokens, through `block_table`, in
  `flash_attn_with_kvcache` and `flash_attn_varlen_func`; from compute capability 8.0 on. From 2.8.4
  on the former asks the device for the longest sequence, so that no graph can record it.
- 3, `flash_attn_interface` (package `flash_attn_3`): pages of any size through `page_table`, also
  for several rows of a sequence, with `cu_seqlens_q`; capability 9.0.
- 4, `flash_attn.cute`: one function for all, lengths as `seqused_k`; capabilities 9.0, 10 and 11;
  pages on 8.0 and 12.0 are refused by it, heads over 128 by us: their kernels want more.

Invariant: a call computes attention with a causal mask aligned to the last row: the last row of a
sequence sees its whole length, or as much of it as the window lets it. A window of w tokens, the
row itself included, is w - 1 to the left. None of this has run on a GPU here: what is tested is
what is passed, against functions that do what the documentation says.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from headrace.types import BLOCK_TOKENS

HALVES = (torch.float16, torch.bfloat16)


@dataclass(frozen=True, slots=True)
class Look:
    """What q · k is multiplied with, and how many tokens a row sees; 0 for all."""

    scale: float
    window: int


@dataclass(frozen=True, slots=True)
class Cached:
    """Whom S sequences' rows look at: pages of a layer's cache, [pages, page_tokens, kv_heads, d].

    `tables` int32 [S, pages of the longest], `lengths` int32 [S], `starts` int32 [S + 1]: sums of
    lengths. `longest`: at least the longest length.
    """

    keys: Tensor
    values: Tensor
    tables: Tensor
    lengths: Tensor
    starts: Tensor
    longest: int


@dataclass(frozen=True, slots=True)
class Rows:
    """Which rows belong to whom: `starts` int32 [S + 1], and the most that one sequence has."""

    starts: Tensor
    most: int


class Kernels(Protocol):
    """What the flash backend calls. All on one device, q and results [N, heads, head_dim]."""

    name: str
    page_tokens: int
    dtypes: Sequence[torch.dtype]
    devices: Sequence[str]
    head_dim_max: int
    capabilities: Sequence[int]
    """Major compute capabilities."""

    def decode(self, q: Tensor, cached: Cached, look: Look) -> Tensor:
        """One row for each sequence."""
        ...

    def recorded(self, q: Tensor, cached: Cached, rows: Rows, look: Look, /) -> Tensor:
        """The same, without a word from the device: what a graph can record."""
        ...

    def prefill(self, q: Tensor, cached: Cached, rows: Rows, look: Look) -> Tensor:
        """The last rows of each sequence."""
        ...

    def packed(
        self, q: Tensor, k: Tensor, v: Tensor, cached: Cached, rows: Rows, look: Look, /
    ) -> Tensor:
        """As `prefill`, of keys and values one after the other, [sum of lengths, kv_heads, d]."""
        ...


Function = Callable[..., Any]


class Flash2:
    """flash-attn 2."""

    name, page_tokens, head_dim_max = "flash-attn 2", 256, 256
    dtypes: Sequence[torch.dtype] = HALVES
    devices: Sequence[str] = ("cuda",)
    capabilities: Sequence[int] = (8, 9, 10, 11, 12)

    def __init__(self, varlen: Function, with_kvcache: Function) -> None:
        self._varlen, self._with_kvcache = varlen, with_kvcache

    def decode(self, q: Tensor, cached: Cached, look: Look) -> Tensor:
        return _first(
            self._with_kvcache(
                q[:, None],
                cached.keys,
                cached.values,
                cache_seqlens=cached.lengths,
                block_table=cached.tables,
                softmax_scale=look.scale,
                causal=True,
                window_size=_left(look),
            )
        )[:, 0]

    def recorded(self, q: Tensor, cached: Cached, rows: Rows, look: Look) -> Tensor:
        return self.prefill(q, cached, rows, look)

    def prefill(self, q: Tensor, cached: Cached, rows: Rows, look: Look) -> Tensor:
        return _first(
            self._varlen(
                q,
                cached.keys,
                cached.values,
                rows.starts,
                cached.starts,
                rows.most,
                cached.longest,
                softmax_scale=look.scale,
                causal=True,
                window_size=_left(look),
                block_table=cached.tables,
            )
        )

    def packed(
        self, q: Tensor, k: Tensor, v: Tensor, cached: Cached, rows: Rows, look: Look
    ) -> Tensor:
        return _first(
            self._varlen(
                q,
                k,
                v,
                rows.starts,
                cached.starts,
                rows.most,
                cached.longest,
                softmax_scale=look.scale,
                causal=True,
                window_size=_left(look),
            )
        )


class Flash3:
    """flash-attn 3, for Hopper."""

    name, page_tokens, head_dim_max = "flash-attn 3", BLOCK_TOKENS, 256
    dtypes: Sequence[torch.dtype] = HALVES
    devices: Sequence[str] = ("cuda",)
    capabilities: Sequence[int] = (9,)

    def __init__(self, varlen: Function, with_kvcache: Function) -> None:
        self._varlen, self._with_kvcache = varlen, with_kvcache

    def decode(self, q: Tensor, cached: Cached, look: Look) -> Tensor:
        return self._cached(q[:, None], cached, look)[:, 0]

    def recorded(self, q: Tensor, cached: Cached, _: Rows, look: Look) -> Tensor:
        return self.decode(q, cached, look)

    def prefill(self, q: Tensor, cached: Cached, rows: Rows, look: Look) -> Tensor:
        return self._cached(q, cached, look, cu_seqlens_q=rows.starts, max_seqlen_q=rows.most)

    def _cached(self, q: Tensor, cached: Cached, look: Look, **rows: Any) -> Tensor:
        return _first(
            self._with_kvcache(
                q,
                cached.keys,
                cached.values,
                cache_seqlens=cached.lengths,
                page_table=cached.tables,
                softmax_scale=look.scale,
                causal=True,
                window_size=_left(look),
                **rows,
            )
        )

    def packed(
        self, q: Tensor, k: Tensor, v: Tensor, cached: Cached, rows: Rows, look: Look
    ) -> Tensor:
        return _first(
            self._varlen(
                q,
                k,
                v,
                rows.starts,
                cached.starts,
                rows.most,
                cached.longest,
                softmax_scale=look.scale,
                causal=True,
                window_size=_left(look),
            )
        )


class Flash4:
    """flash-attn 4, CuTe kernels compiled on first use."""

    name, page_tokens, head_dim_max = "flash-attn 4", BLOCK_TOKENS, 128
    dtypes: Sequence[torch.dtype] = HALVES
    devices: Sequence[str] = ("cuda",)
    capabilities: Sequence[int] = (9, 10, 11)

    def __init__(self, varlen: Function) -> None:
        self._varlen = varlen

    def decode(self, q: Tensor, cached: Cached, look: Look) -> Tensor:
        return _first(
            self._varlen(
                q[:, None],
                cached.keys,
                cached.values,
                seqused_k=cached.lengths,
                max_seqlen_k=cached.longest,
                page_table=cached.tables,
                **_cute(look),
            )
        )[:, 0]

    def recorded(self, q: Tensor, cached: Cached, _: Rows, look: Look) -> Tensor:
        return self.decode(q, cached, look)

    def prefill(self, q: Tensor, cached: Cached, rows: Rows, look: Look) -> Tensor:
        return _first(
            self._varlen(
                q,
                cached.keys,
                cached.values,
                cu_seqlens_q=rows.starts,
                seqused_k=cached.lengths,
                max_seqlen_q=rows.most,
                max_seqlen_k=cached.longest,
                page_table=cached.tables,
                **_cute(look),
            )
        )

    def packed(
        self, q: Tensor, k: Tensor, v: Tensor, cached: Cached, rows: Rows, look: Look
    ) -> Tensor:
        return _first(
            self._varlen(
                q,
                k,
                v,
                cu_seqlens_q=rows.starts,
                cu_seqlens_k=cached.starts,
                max_seqlen_q=rows.most,
                max_seqlen_k=cached.longest,
                **_cute(look),
            )
        )


def _left(look: Look) -> tuple[int, int]:
    return (look.window - 1, 0) if look.window else (-1, -1)


def _cute(look: Look) -> dict[str, Any]:
    window = (look.window - 1, 0) if look.window else (None, None)
    return {"softmax_scale": look.scale, "causal": True, "window_size": window}


def _first(result: Any) -> Tensor:
    """Versions differ in whether the sums of a softmax come with it."""
    out: Tensor = result[0] if isinstance(result, tuple) else result
    return out


# --- which of them is here


def _flash2() -> Kernels:
    module = importlib.import_module("flash_attn")
    return Flash2(module.flash_attn_varlen_func, module.flash_attn_with_kvcache)


def _flash3() -> Kernels:
    module = importlib.import_module("flash_attn_interface")
    return Flash3(module.flash_attn_varlen_func, module.flash_attn_with_kvcache)


def _flash4() -> Kernels:
    module = importlib.import_module("flash_attn.cute")
    return Flash4(module.flash_attn_varlen_func)


_KNOWN: tuple[tuple[str, Callable[[], Kernels]], ...] = (
    ("flash-attn 3", _flash3),
    ("flash-attn 2", _flash2),
    ("flash-attn 4", _flash4),
)
"""In the order in which they are taken: the newest is still a beta."""


def find_kernels() -> tuple[list[Kernels], list[str]]:
    """What can be imported, the preferred first; and of the others why not."""
    found: list[Kernels] = []
    missing = []
    for name, load in _KNOWN:
        try:
            found.append(load())
        except (ImportError, AttributeError, OSError) as error:  # built for another torch, too
            missing.append(f"{name}: {error}")
    return found, missing
