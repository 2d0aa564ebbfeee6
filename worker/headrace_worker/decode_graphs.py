"""Decode steps as CUDA graphs: one recording for each batch-size bucket, replayed over its buffers.

A decode step is hundreds of kernels of a few microseconds each; a graph launches them at once.
Source: NVIDIA, "CUDA Graphs"; used so by vLLM, SGLang and nano-vllm.

Invariant: a recording reads and writes its bucket's buffers and nothing else of the step, so a
replay after the buffers are filled equals the step computed without it. It is made over padding
rows, whose keys and values go to a page of nobody. What cannot be recorded, a mixture of experts
whose counts the host has to know, is said once and computed without. Rejected: recording prefill,
whose sizes hardly repeat; torch.compile's graphs, whose start takes minutes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import structlog
import torch
from torch import Tensor

from headrace_worker.attention.buckets import Filled, bucket_for, fill
from headrace_worker.attention.flash import FlashBackend, page_tables
from headrace_worker.attention.flash_kernels import Cached, Rows
from headrace_worker.attention.interface import AttentionBatch
from headrace_worker.model import Decoder
from headrace_worker.step_inputs import StepInputs

_log = structlog.get_logger()

WARM_UPS = 2
"""Runs before a recording: kernels choose and allocate on their first."""


class Recorder(Protocol):
    """What records `run` once, to repeat it over the same memory."""

    def record(self, run: Callable[[], Tensor]) -> tuple[Callable[[], object], Tensor]:
        """Runs `run`; how to repeat what it did, and where its result comes to stand."""
        ...


class CudaRecorder:
    """CUDA's own, all recordings in one memory pool."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()

    def record(self, run: Callable[[], Tensor]) -> tuple[Callable[[], object], Tensor]:
        current = torch.cuda.current_stream(self._device)
        side = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        side.wait_stream(current)
        with torch.cuda.stream(side):
            for _ in range(WARM_UPS):
                run()
        current.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            out = run()
        return graph.replay, out


class _Buffers:
    """One bucket's inputs on the device, and the `Attend` that reads them."""

    def __init__(self, backend: FlashBackend, bucket: int, width: int) -> None:
        pool = backend.pool
        self._backend, self._bucket = backend, bucket

        def numbers(*shape: int, kind: torch.dtype = torch.int32) -> Tensor:
            return torch.zeros(shape, dtype=kind, device=pool.device)

        self.tokens = numbers(bucket, kind=torch.int64)
        self.positions = numbers(bucket, kind=torch.int64)
        self._slots = numbers(bucket, kind=torch.int64)
        self._lengths, self._tables = numbers(bucket), numbers(bucket, width)
        self._starts = numbers(bucket + 1)
        self._rows = Rows(torch.arange(bucket + 1, dtype=torch.int32, device=pool.device), 1)

    def load(self, filled: Filled) -> None:
        for target, source in (
            (self.tokens, filled.tokens),
            (self.positions, filled.positions),
            (self._slots, filled.slots),
            (self._lengths, filled.lengths),
            (self._starts, filled.starts),
            (self._tables[:, : filled.tables.shape[1]], filled.tables),
        ):
            target.copy_(torch.from_numpy(source))

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        pool, backend = self._backend.pool, self._backend
        pool.write(layer, self._slots, k, v)
        longest = self._tables.shape[1] * pool.page_tokens
        cached = Cached(*pool.cache(layer), self._tables, self._lengths, self._starts, longest)
        mixed = backend.kernels.recorded(q, cached, self._rows, backend.looks[layer])
        return mixed.reshape(self._bucket, -1)


@dataclass(frozen=True, slots=True)
class _Recording:
    buffers: _Buffers
    replay: Callable[[], object]
    logits: Tensor


class DecodeGraphs:
    """A whole model's decode steps, recorded as they come."""

    def __init__(
        self,
        model: Decoder,
        backend: FlashBackend,
        buckets: Sequence[int],
        context_tokens: int,
        recorder: Recorder,
    ) -> None:
        """`context_tokens`: the longest sequence."""
        self._model, self._backend, self._recorder = model, backend, recorder
        self._buckets = buckets
        self._width = -(-context_tokens // backend.pool.page_tokens)
        self._recordings: dict[int, _Recording] = {}
        self.refusal = ""
        """Why nothing is recorded; empty where steps are."""
        if model.config.experts is not None:
            self.refusal = "the host has to know how many tokens each expert gets"

    def run(self, inputs: StepInputs) -> Tensor | None:
        """Logits of a decode step, float32 [S, vocab], valid until the next; None for any other."""
        count = len(inputs.lengths)
        bucket = bucket_for(count, self._buckets)
        if self.refusal or bucket is None or len(inputs.tokens) != count or inputs.rows is not None:
            return None
        recording = self._recordings.get(bucket) or self._record(bucket)
        if recording is None:
            return None
        placed = self._backend.place(
            AttentionBatch(
                inputs.block_tables,
                inputs.lengths,
                inputs.query_starts,
                torch.from_numpy(inputs.slots),
            )
        )
        pages = [own for own in placed.pages if own is not None]
        if len(pages) < count:
            return None  # scattered ones are copied together, which no recording does
        recording.buffers.load(
            self._filled(
                bucket,
                inputs.tokens,
                inputs.positions,
                placed.slots,
                inputs.lengths,
                page_tables(pages),
            )
        )
        recording.replay()
        return recording.logits[:count]

    def _filled(
        self,
        bucket: int,
        tokens: Sequence[int] | np.ndarray[tuple[int], np.dtype[np.int64]],
        positions: Sequence[int] | np.ndarray[tuple[int], np.dtype[np.int64]],
        slots: Sequence[int] | np.ndarray[tuple[int], np.dtype[np.int64]],
        lengths: Sequence[int],
        tables: np.ndarray[tuple[int, int], np.dtype[np.int32]],
    ) -> Filled:
        pool = self._backend.pool
        return fill(
            bucket,
            tokens,
            positions,
            slots,
            lengths,
            tables,
            padding_page=pool.padding_page,
            page_tokens=pool.page_tokens,
        )

    def _record(self, bucket: int) -> _Recording | None:
        buffers, model = _Buffers(self._backend, bucket, self._width), self._model
        none = np.empty(0, np.int64)
        # a row of padding in all of its columns
        tables = np.empty((0, self._width), np.int32)
        buffers.load(self._filled(bucket, none, none, none, [], tables))

        def run() -> Tensor:
            x = model.through(model.embed(buffers.tokens), buffers.positions, buffers.attend)
            return model.logits(x, None)

        try:
            replay, logits = self._recorder.record(run)
        except RuntimeError as error:
            self.refusal = f"recording failed: {error}"
            _log.warning("decode steps run without graphs", reason=self.refusal)
            return None
        self._recordings[bucket] = _Recording(buffers, replay, logits)
        return self._recordings[bucket]
