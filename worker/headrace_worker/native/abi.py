"""The kernels' C functions, and the structs they take: a mirror of csrc/abi.h.

Invariant: what a struct points to is kept alive by whoever made the struct for as long as it is
used. Calls release Python's lock; they take turns inside, so that any thread may call.
"""

from __future__ import annotations

import ctypes
import struct
from ctypes import POINTER, Structure, c_double, c_float, c_int32, c_int64, c_void_p
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

ABI_VERSION = 6
ISAS = ("none", "avx2", "avx512")

PANEL, GROUP = 16, 32
FORMAT_F32, FORMAT_Q8, FORMAT_Q4 = 0, 1, 2
KV_F32, KV_BF16, KV_INT8 = 0, 1, 2


class Matrix(Structure):
    """W [outs, columns] in panels of a format, where its columns are cut, and its bias."""

    _fields_ = (
        ("format", c_int32),
        ("outs", c_int32),
        ("columns", c_int32),
        ("cuts", c_int32),
        ("cut", c_int32 * 4),
        ("panels", c_void_p),
        ("bias", c_void_p),
    )


class Pool(Structure):
    """A KvPool's memory."""

    _fields_ = (
        ("base", c_void_p),
        ("block_bytes", c_int64),
        ("chunk_bytes", c_int64),
        ("kind", c_int32),
        ("scale_kind", c_int32),
        ("kv_heads", c_int32),
        ("head_dim", c_int32),
    )


class Batch(Structure):
    """An AttentionBatch, its tables one after the other."""

    _fields_ = (
        ("sequences", c_int32),
        ("rows", c_int32),
        ("starts", c_void_p),
        ("lengths", c_void_p),
        ("tables", c_void_p),
        ("table_starts", c_void_p),
        ("slots", c_void_p),
    )


class Layer(Structure):
    """A layer's weights and what is its own."""

    _fields_ = (
        ("attention_norm", c_void_p),
        ("mlp_norm", c_void_p),
        ("q_norm", c_void_p),
        ("k_norm", c_void_p),
        ("qkv", Matrix),
        ("out", Matrix),
        ("gate_up", Matrix),
        ("down", Matrix),
        ("rope", c_int32),
        ("window", c_int32),
    )


class Model(Structure):
    """A whole decoder."""

    _fields_ = (
        *((name, c_int32) for name in ("hidden", "inner", "heads", "kv_heads", "head_dim")),
        *((name, c_int32) for name in ("vocab", "layers", "ropes")),
        *((name, c_float) for name in ("eps", "attention_scale", "embedding_scale")),
        *((name, c_int32) for name in ("embedding_bf16", "first_token", "unused")),
        ("embedding", c_void_p),
        ("layer", POINTER(Layer)),
        ("norm", c_void_p),
        ("rotated", c_void_p),
        ("head", Matrix),
    )


Apart = ctypes.CFUNCTYPE(c_int32, POINTER(c_float), c_int64)
"""Adds up float32 [count] at an address over all ranks; 0 where that went well."""


class Sums(Structure):
    """Ranks that add up within a step: a SharedGroup's memory and its turn, or what to call."""

    _fields_ = (
        *((name, c_void_p) for name in ("flags", "slots")),
        *((name, c_int64) for name in ("slot_bytes", "one_turn_bytes", "patience_us")),
        *((name, c_int64) for name in ("turn", "bytes", "messages")),
        *((name, c_int32) for name in ("rank", "size", "late", "unused")),
        ("apart", Apart),
    )


class Step(Structure):
    """What changes from step to step, beside the Batch."""

    _fields_ = (
        ("tokens", c_void_p),
        ("positions", c_void_p),
        ("cos", c_void_p),
        ("sin", c_void_p),
        ("sampled", c_void_p),
        ("sampled_rows", c_int32),
        ("draw_count", c_int32),
        ("logits", c_void_p),
        ("tops", c_void_p),
        ("given", c_void_p),
        ("passed", c_void_p),
        ("sums", POINTER(Sums)),
        ("draws", c_void_p),
    )


_NOTHING_RETURNED = (
    *("linear", "attend", "step", "weigh", "sample", "add_up", "set_threads"),
    *("grid_errors", "round_q4", "round_q8", "pack", "rest"),
)

UNPACKED = frozenset({"Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K"})
"""Kinds of a GGUF file's tensors that the kernels read."""

DRAW_OPTIONS = struct.Struct("<dffii")
"""top_p, scale, min_p, top_k, unused: the beginning of a Draw."""
DRAW_PLACE = struct.Struct("<Qqqq")
"""seed, position, row, token: its end."""
DRAW_BYTES = DRAW_OPTIONS.size + DRAW_PLACE.size


class Library:
    """The compiled kernels. Raises OSError for a file that is not such a library."""

    def __init__(self, path: Path) -> None:
        self._c = ctypes.CDLL(str(path))
        try:
            found = int(self._c.headrace_abi_version())
        except AttributeError as error:
            raise OSError(f"{path} has no kernels in it") from error
        if found != ABI_VERSION:
            raise OSError(f"{path} has ABI {found}, not {ABI_VERSION}")
        self.isa = ISAS[int(self._c.headrace_isa())]
        address, matrix = c_void_p, POINTER(Matrix)
        self._c.headrace_linear.argtypes = (matrix, address, c_int32, address, address)
        self._c.headrace_attend.argtypes = (
            POINTER(Pool), POINTER(Batch), c_int32, c_int32, c_float, c_int32,
            address, c_int32, address, address, c_int32, address,
        )  # fmt: skip
        self._c.headrace_step.argtypes = (
            POINTER(Model), POINTER(Pool), POINTER(Batch), POINTER(Step),
        )  # fmt: skip
        self._c.headrace_weigh.argtypes = (address, c_int32, c_float, c_float, address)
        self._c.headrace_sample.argtypes = (address, c_int32, address, c_int32)
        self._c.headrace_add_up.argtypes = (POINTER(Sums), address, c_int64)
        self._c.headrace_grid_errors.argtypes = (address, c_int64, address)
        self._c.headrace_round_q4.argtypes = (address, c_int64, c_int32, *[address] * 4)
        self._c.headrace_round_q8.argtypes = (address, c_int64, address, address)
        self._c.headrace_pack.argtypes = (c_int32, c_int32, c_int32, *[address] * 4)
        self._c.headrace_unpack.argtypes = (c_int32, address, c_int64, address)
        for name in _NOTHING_RETURNED:
            getattr(self._c, f"headrace_{name}").restype = None

    def use(self, isa: str) -> str:
        """Takes a lesser instruction set than there is; the one in use from now on. For tests."""
        self.isa = ISAS[int(self._c.headrace_use_isa(ISAS.index(isa)))]
        return self.isa

    def _threads(self) -> None:
        self._c.headrace_set_threads(torch.get_num_threads())

    def rest(self) -> None:
        """Ends the threads. The next call starts them anew, as its own thread's: with its niceness
        and where it may run."""
        self._c.headrace_rest()

    def linear(self, matrix: Matrix, x: Tensor, residual: Tensor | None, out: Tensor) -> None:
        """out [N, outs] = residual + x [N, columns] W^T + bias; float32, contiguous."""
        self._threads()
        self._c.headrace_linear(
            matrix, x.data_ptr(), len(x), residual.data_ptr() if residual is not None else None,
            out.data_ptr(),
        )  # fmt: skip

    def attend(
        self,
        pool: Pool,
        batch: Batch,
        layer: int,
        scale: float,
        window: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
    ) -> None:
        """q [N, heads, head_dim], k, v [N, kv_heads, head_dim], out [N, heads * head_dim].

        All float32 and contiguous.
        """
        self._threads()
        self._c.headrace_attend(
            pool, batch, layer, q.shape[1], scale, window, q.data_ptr(), q.stride(0),
            k.data_ptr(), v.data_ptr(), k.stride(0), out.data_ptr(),
        )  # fmt: skip

    def step(self, model: Model, pool: Pool, batch: Batch, step: Step) -> None:
        """A whole step."""
        self._threads()
        self._c.headrace_step(model, pool, batch, step)

    def weigh(
        self, logits: NDArray[np.float32], best: float, scale: float, out: NDArray[np.float32]
    ) -> None:
        """What logits [n] weigh (see sampling/weights.py), into `out` [n]; both contiguous."""
        assert logits.shape == out.shape, "a weight for each logit"
        self._c.headrace_weigh(address_of(logits), len(out), best, scale, address_of(out))

    def sample(self, logits: NDArray[np.float32], draws: bytearray) -> None:
        """Sets the tokens of `draws`, packed Draws, from float32 [rows, vocab], contiguous."""
        self._threads()
        self._c.headrace_sample(
            address_of(logits), logits.shape[1], bytes_of(draws), len(draws) // DRAW_BYTES
        )

    def grid_errors(self, groups: Tensor) -> tuple[float, float]:
        """groups [..., 32] float32: what plain rounding and the best spans lose."""
        self._threads()
        sums = (c_double * 2)()
        groups = groups.contiguous()
        self._c.headrace_grid_errors(groups.data_ptr(), groups.numel() // GROUP, sums)
        return sums[0], sums[1]

    def round_q4(
        self, groups: Tensor, *, grid: bool
    ) -> tuple[Tensor, Tensor, Tensor, float, float]:
        """groups [..., 32] float32 → uint8 [..., 32], scales and zeros [...], and sums of squares:

        of what rounding did, and of the weights.
        """
        self._threads()
        sums = (c_double * 2)()
        groups = groups.contiguous()
        values = torch.empty(groups.shape, dtype=torch.uint8)
        scales, zeros = torch.empty(2, *groups.shape[:-1]).unbind(0)
        self._c.headrace_round_q4(
            groups.data_ptr(), scales.numel(), int(grid), values.data_ptr(), scales.data_ptr(),
            zeros.data_ptr(), sums,
        )  # fmt: skip
        return values, scales, zeros, sums[0], sums[1]

    def round_q8(self, groups: Tensor) -> tuple[Tensor, Tensor]:
        """groups [..., 32] float32, not turned yet → int8 [..., 32] and scales [...]."""
        self._threads()
        groups = groups.contiguous()
        values, scales = torch.empty(groups.shape, dtype=torch.int8), torch.empty(groups.shape[:-1])
        self._c.headrace_round_q8(
            groups.data_ptr(), scales.numel(), values.data_ptr(), scales.data_ptr()
        )
        return values, scales

    def unpack(self, kind: int, stored: NDArray[np.uint8], blocks: int, values: Tensor) -> bool:
        """`blocks` of a GGMLQuantizationType of UNPACKED → float32 `values`; are all numbers?

        Both contiguous.
        """
        self._threads()
        sound = self._c.headrace_unpack(kind, address_of(stored), blocks, values.data_ptr())
        return bool(sound)

    def pack(self, form: int, values: Tensor, scales: Tensor, zeros: Tensor | None) -> Tensor:
        """Rounded weights, a byte each → the panels of a Matrix, uint8 [panels, groups, …]."""
        self._threads()
        outs, groups = scales.shape
        assert values.numel() == outs * groups * GROUP, "whole groups"
        size = PANEL * (GROUP // 2 + 4 if form == FORMAT_Q4 else GROUP + 2)
        panels = torch.empty(-(-outs // PANEL), groups, size, dtype=torch.uint8)
        values, scales = values.contiguous(), scales.contiguous()
        zeros = None if zeros is None else zeros.contiguous()
        self._c.headrace_pack(
            form, outs, groups, values.data_ptr(), scales.data_ptr(),
            None if zeros is None else zeros.data_ptr(), panels.data_ptr(),
        )  # fmt: skip
        return panels

    def add_up(self, sums: ctypes._Pointer[Sums], x: Tensor) -> None:
        """x, float32, contiguous, becomes the sum of all ranks' x: what steps do within."""
        self._c.headrace_add_up(sums, x.data_ptr(), x.numel())


def address_of(array: NDArray[Any]) -> int:
    """Where a contiguous array lies."""
    return int(array.__array_interface__["data"][0])


def bytes_of(data: bytearray) -> ctypes.Array[ctypes.c_char]:
    """The same bytes, for C to write to."""
    return (ctypes.c_char * len(data)).from_buffer(data)
