"""flash-attn's functions in plain torch: what their documentation says, and what they refuse.

One function of each version with its own signature, strict about types, shapes and page sizes. The
computation is a custom operator, so that a recording sees it as one call, as it sees a kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from headrace_worker.attention.flash_kernels import Flash2, Flash3, Flash4, Kernels
from headrace_worker.attention.page_sdpa import PageSdpa

calls: list[str] = []
"""Names of the functions that were called, in order."""


def _check_int32(name: str, tensor: Tensor, *shape: int) -> None:
    assert tensor.dtype == torch.int32, f"{name} must have dtype int32"
    assert tensor.is_contiguous(), f"{name} must be contiguous"
    assert tuple(tensor.shape) == shape, f"{name} has shape {tuple(tensor.shape)}, not {shape}"


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float, left: int) -> Tensor:
    """One sequence: q [n, heads, d]; k, v [m, kv_heads, d]; causal, aligned to the last row."""
    n, m = len(q), len(k)
    sharing = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(sharing, 1).float(), v.repeat_interleave(sharing, 1).float()
    scores = torch.einsum("nhd,mhd->hnm", q.float(), k) * scale
    place = torch.arange(n)[:, None] + m - n
    key = torch.arange(m)[None, :]
    hidden = key > place
    if left >= 0:
        hidden |= key < place - left
    weights = torch.softmax(scores.masked_fill(hidden, -torch.inf), -1)
    return torch.einsum("hnm,mhd->nhd", weights.nan_to_num(0.0), v).to(q.dtype)


@torch.library.custom_op("headrace_tests::paged_attention", mutates_args=())
def paged(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    tables: Tensor,
    lengths: Tensor,
    starts: Tensor,
    scale: float,
    left: int,
) -> Tensor:
    """q [N, heads, d] of sequences whose rows begin at `starts`, over pages."""
    out = torch.empty(q.shape, dtype=q.dtype)
    page_tokens = keys.shape[1]
    bounds = starts.tolist()
    for s, length in enumerate(lengths.tolist()):
        pages = tables[s, : -(-length // page_tokens)].long()
        k, v = keys[pages].flatten(0, 1)[:length], values[pages].flatten(0, 1)[:length]
        rows = slice(bounds[s], bounds[s + 1])
        out[rows] = _attend(q[rows], k, v, scale, left)
    return out


def _packed(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, scale: float, left: int
) -> Tensor:
    out = torch.empty(q.shape, dtype=q.dtype)
    q_bounds, k_bounds = cu_q.tolist(), cu_k.tolist()
    assert q_bounds[-1] == len(q) and k_bounds[-1] == len(k) == len(v)
    for s in range(len(q_bounds) - 1):
        rows = slice(q_bounds[s], q_bounds[s + 1])
        seen = slice(k_bounds[s], k_bounds[s + 1])
        out[rows] = _attend(q[rows], k[seen], v[seen], scale, left)
    return out


def _left(window: tuple[Any, Any], causal: bool, none: Any) -> int:
    left, right = window
    assert causal, "the engine's masks are causal"
    assert (left == none and right == none) or (left >= 0 and right == 0)
    return -1 if left == none else int(left)


def _check_heads(q: Tensor, keys: Tensor, values: Tensor) -> None:
    assert q.stride(-1) == keys.stride(-1) == values.stride(-1) == 1, "last dimension contiguous"
    assert q.dtype == keys.dtype == values.dtype, "one dtype"
    assert keys.shape == values.shape and q.shape[-1] == keys.shape[-1]
    assert q.shape[-2] % keys.shape[-2] == 0, "heads in key/value must divide heads in query"
    assert q.shape[-1] <= 256 and q.shape[-1] % 8 == 0


def _check_pages(tables: Tensor, lengths: Tensor, keys: Tensor, batch: int) -> None:
    assert tables.dtype == torch.int32 and tables.stride(-1) == 1 and tables.shape[0] == batch
    longest = int(lengths.max())
    assert longest <= tables.shape[1] * keys.shape[1], "exceeds what block_table can address"
    used = tables[:, : -(-longest // keys.shape[1])]
    assert int(used.min()) >= 0 and int(used.max()) < len(keys), "a page that is not there"


# --- version 2


def varlen_2(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Tensor:
    calls.append("varlen")
    batch = len(cu_seqlens_q) - 1
    _check_int32("cu_seqlens_q", cu_seqlens_q, batch + 1)
    _check_int32("cu_seqlens_k", cu_seqlens_k, batch + 1)
    _check_heads(q, k, v)
    assert softmax_scale is not None
    lengths = cu_seqlens_k.diff()
    assert int(cu_seqlens_q.diff().max()) <= max_seqlen_q and int(lengths.max()) <= max_seqlen_k
    left = _left(window_size, causal, -1)
    if block_table is None:
        return _packed(q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale, left)
    assert k.shape[1] % 256 == 0, "Paged KV cache block size must be divisible by 256"
    _check_pages(block_table, lengths, k, batch)
    return paged(q, k, v, block_table, lengths, cu_seqlens_q, softmax_scale, left)


def with_kvcache_2(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    *,
    cache_seqlens: Tensor,
    block_table: Tensor,
    softmax_scale: float,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
) -> Tensor:
    calls.append("with_kvcache")
    assert k is None and v is None
    batch, each = q.shape[:2]
    _check_int32("cache_seqlens", cache_seqlens, batch)
    _check_heads(q, k_cache, v_cache)
    assert k_cache.shape[1] % 256 == 0, "Paged KV cache block size must be divisible by 256"
    _check_pages(block_table, cache_seqlens, k_cache, batch)
    starts = torch.arange(batch + 1, dtype=torch.int32) * each
    left = _left(window_size, causal, -1)
    flat = q.reshape(batch * each, *q.shape[2:])
    out = paged(flat, k_cache, v_cache, block_table, cache_seqlens, starts, softmax_scale, left)
    return out.view(q.shape)


# --- version 3


def varlen_3(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    qv: Tensor | None = None,
    window_size: tuple[int, int] = (-1, -1),
) -> Tensor:
    return varlen_2(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        softmax_scale=softmax_scale,
        causal=causal,
        window_size=window_size,
    )


def with_kvcache_3(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    cache_seqlens: Tensor,
    page_table: Tensor,
    cu_seqlens_q: Tensor | None = None,
    max_seqlen_q: int | None = None,
    softmax_scale: float,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
) -> Tensor:
    calls.append("with_kvcache" if cu_seqlens_q is None else "with_kvcache of rows")
    batch = len(cache_seqlens)
    _check_int32("cache_seqlens", cache_seqlens, batch)
    _check_heads(q, k_cache, v_cache)
    _check_pages(page_table, cache_seqlens, k_cache, batch)
    left = _left(window_size, causal, -1)
    starts = cu_seqlens_q
    if starts is None:
        assert q.ndim == 4 and q.shape[0] == batch
        starts = torch.arange(batch + 1, dtype=torch.int32) * q.shape[1]
    else:
        _check_int32("cu_seqlens_q", starts, batch + 1)
        assert q.ndim == 3 and max_seqlen_q is not None, "max_seqlen_q must be provided"
        assert int(starts.diff().max()) <= max_seqlen_q
    flat = q.reshape(-1, *q.shape[-2:])
    out = paged(flat, k_cache, v_cache, page_table, cache_seqlens, starts, softmax_scale, left)
    return out.view(q.shape)


# --- version 4


def varlen_4(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    seqused_k: Tensor | None = None,
    page_table: Tensor | None = None,
    softmax_scale: float,
    causal: bool = False,
    window_size: tuple[int | None, int | None] = (None, None),
) -> tuple[Tensor, None]:
    calls.append("cute")
    _check_heads(q, k, v)
    left = _left(window_size, causal, None)
    if page_table is None:
        assert cu_seqlens_q is not None and cu_seqlens_k is not None and q.ndim == 3
        return _packed(q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale, left), None
    assert cu_seqlens_k is None, "page_table is not supported with cu_seqlens_k"
    assert seqused_k is not None
    batch = len(seqused_k)
    _check_int32("seqused_k", seqused_k, batch)
    _check_pages(page_table, seqused_k, k, batch)
    starts = cu_seqlens_q
    if starts is None:
        starts = torch.arange(batch + 1, dtype=torch.int32) * q.shape[1]
    else:
        _check_int32("cu_seqlens_q", starts, batch + 1)
    flat = q.reshape(-1, *q.shape[-2:])
    out = paged(flat, k, v, page_table, seqused_k, starts, softmax_scale, left)
    return out.view(q.shape), None


def _here(kernels: Any) -> Kernels:
    """The same calls, allowed on a CPU and in float32, where results can be compared."""
    kernels.devices = ("cpu",)
    kernels.dtypes = (torch.float32, torch.bfloat16)
    found: Kernels = kernels
    return found


VERSIONS: dict[str, Callable[[], Kernels]] = {
    "2": lambda: _here(Flash2(varlen_2, with_kvcache_2)),
    "3": lambda: _here(Flash3(varlen_3, with_kvcache_3)),
    "4": lambda: _here(Flash4(varlen_4)),
    "sdpa": PageSdpa,
}
