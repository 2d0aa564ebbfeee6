"""`python -m headrace_worker.roofline`: how far a worker's steps are from what its machine can do.

Measured are the rate at which all threads read memory, the rate at which they multiply matrices in
each format, and the engine's own steps (see calibrate.py); `policy/roofs.py` says what a step of
this model touches and multiplies, and so what it cannot exceed. Settings are the worker's own
HEADRACE_ variables.

Invariant: a rate is the best that was seen, a step's duration the median, so that the fraction of
the ceiling is never flattered. Memory is read from a buffer many times the cache, in large pages as
the weights are, by the C library's search for a byte that is not there: it does nothing but read.
Rejected: a sum by torch, which on some processors is slower than their memory. Products are those
of one large matrix and of the model's own widest one, 512 rows each: what an int8 model cannot
exceed is what our kernel reaches there, not what the processor's data sheet promises.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from headrace.config import load_or_exit
from headrace.errors import HeadraceError, SettingsError
from headrace.policy.model_shape import ModelShape
from headrace.types import BLOCK_TOKENS
from headrace_worker import native
from headrace_worker.allocator import keep_freed_memory
from headrace_worker.calibrate import Bench, Cell, prepare
from headrace_worker.describe import shape_of
from headrace_worker.fitting import Sizes
from headrace_worker.kv.pool import KvPool
from headrace_worker.loading import LoadedModel
from headrace_worker.loading.memory import available_bytes
from headrace_worker.model.linear import DenseLinear
from headrace_worker.native.pages import in_large_pages
from headrace_worker.policy.roofs import Ceiling, Kept, Phase, Work, ceiling, work_of
from headrace_worker.quantization import Role, make_linear
from headrace_worker.settings import WorkerSettings

STREAMS = (1, 8, 32)
PREFILL_TOKENS = 512
CONTEXT_TOKENS = 192
"""That a decoding row has on average: a prompt of 128 tokens and half of an answer of 128."""
CACHES = 8
"""The buffer that is read is so many times the processor's largest cache."""
BUFFER_BYTES_MIN, BUFFER_BYTES_MAX = 256 << 20, 4 << 30
CACHE_BYTES_UNKNOWN = 64 << 20
LARGE_MATRIX = 2_048
VISITS_MIN = 3
ROUNDS = 3
_CACHE_SIZES = Path("/sys/devices/system/cpu/cpu0/cache")
_FILLED, _ABSENT = 1, 2


# --- what the machine can do


def cache_bytes() -> int:
    """The first processor's largest cache."""
    found = []
    for path in _CACHE_SIZES.glob("index*/size"):
        with contextlib.suppress(OSError, ValueError):
            found.append(int(path.read_text().strip().rstrip("K")) << 10)
    return max(found, default=CACHE_BYTES_UNKNOWN)


def read_rate(threads: int, size_bytes: int, limit_s: float) -> float:
    """Bytes a second that `threads` together read from a buffer of `size_bytes`; the best pass."""
    buffer = in_large_pages(torch.full((size_bytes,), _FILLED, dtype=torch.uint8))
    search = ctypes.CDLL(None).memchr
    search.argtypes = (ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t)
    search.restype = ctypes.c_void_p
    each = size_bytes // threads
    starts = [buffer.data_ptr() + number * each for number in range(threads)]

    def read(start: int) -> object:
        return search(start, _ABSENT, each)

    with ThreadPoolExecutor(threads) as pool:

        def a_pass() -> None:
            assert not any(pool.map(read, starts)), "the buffer holds another byte"

        return each * threads / _best_s(a_pass, limit_s)


def _best_s(run: Callable[[], object], limit_s: float) -> float:
    """The shortest of runs for about `limit_s`, three at least; the first one does not count."""
    run()
    took: list[float] = []
    end_s = time.perf_counter() + limit_s
    while len(took) < VISITS_MIN or time.perf_counter() < end_s:
        began = time.perf_counter()
        run()
        took.append(time.perf_counter() - began)
    return min(took)


def product_rates(shape: ModelShape, rows: int, limit_s: float) -> dict[str, float]:
    """Operations a second by format; a product and a sum are two."""
    widest = (2 * shape.intermediate_size, shape.hidden_size)
    sizes = [(LARGE_MATRIX, LARGE_MATRIX), widest]
    found: dict[str, float] = {}
    for name, make in _formats().items():
        for outs, columns in sizes:
            multiply = make(torch.randn(outs, columns))
            took_s = _best_s(multiply(torch.randn(rows, columns)), limit_s / 8)
            found[name] = max(found.get(name, 0.0), 2.0 * rows * outs * columns / took_s)
    return found


_Make = Callable[[Tensor], Callable[[Tensor], Callable[[], object]]]
"""Of a weight what, given rows, multiplies the two."""


def _formats() -> dict[str, _Make]:
    """torch's own products, and those of the worker's Linears."""

    def dense(weight: Tensor) -> Callable[[Tensor], Callable[[], object]]:
        return lambda x: lambda: functional.linear(x, weight)

    def bfloat16(weight: Tensor) -> Callable[[Tensor], Callable[[], object]]:
        linear = DenseLinear(weight.bfloat16())
        return lambda x: _applied(linear, x.bfloat16())

    def ours(mode: str) -> _Make:
        def make(weight: Tensor) -> Callable[[Tensor], Callable[[], object]]:
            linear = make_linear(mode, weight, None, Role.OTHER, torch.float32)  # type: ignore[arg-type]
            return lambda x: _applied(linear, x)

        return make

    formats: dict[str, _Make] = {"float32, torch": dense, "bfloat16, torch": bfloat16}
    if native.library() is not None:
        formats["float32, native"] = ours("none")
    return formats | {"int8": ours("int8"), "int4": ours("int4")}


def _applied(linear: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[], object]:
    return lambda: linear(x)


def formats_of(loaded: LoadedModel) -> tuple[str, ...]:
    """In which formats this model's matrices are multiplied."""
    if loaded.quantization == "int8":
        return ("int8",)
    if loaded.quantization == "int4":
        return ("int4", "int8")  # some matrices stay in 8 bits
    if loaded.dtype is torch.bfloat16:
        return ("bfloat16, torch",)
    return ("float32, native", "float32, torch")


# --- what the model does


def kept(loaded: LoadedModel, kv_dtype: Any) -> Kept:
    """What is read of it in a step. Of an embedding that is not the head too, a row a token."""
    head = loaded.model.head
    head_bytes = int(head.weight_bytes)  # type: ignore[attr-defined]
    assert loaded.model.embedding is not None, "the whole model is here"
    is_embedding = isinstance(head, DenseLinear) and not head.packed and loaded.config.tied
    table_bytes = loaded.model.embedding.table.nbytes
    layers = loaded.weight_bytes - table_bytes - (0 if is_embedding else head_bytes)
    block = KvPool.block_bytes(loaded.config, loaded.dtype, kv_dtype)
    return Kept(layers, head_bytes, block / BLOCK_TOKENS / loaded.config.layers)


def phases(sizes: Sizes, context_tokens: int) -> list[Phase]:
    """What is measured on a worker of these sizes."""
    chunk = min(PREFILL_TOKENS, sizes.step_tokens, context_tokens // 2)
    held = min(CONTEXT_TOKENS, context_tokens // 4) // BLOCK_TOKENS * BLOCK_TOKENS
    found = [Phase(f"prefill of {chunk}", chunk=chunk)]
    found += [
        Phase(f"decode, {rows} stream{'s' * (rows > 1)}", rows=rows, held=held)
        for rows in STREAMS
        if rows <= sizes.max_jobs
    ]
    room = sizes.kv_tokens - 2 * sizes.step_tokens
    return [phase for phase in found if cell_of(phase).kv_tokens <= room]


def cell_of(phase: Phase) -> Cell:
    return Cell(phase.rows, phase.held, phase.chunk, 0)


def step_s(bench: Bench, phase: Phase, limit_s: float) -> float:
    """The median duration of its steps."""
    cell = cell_of(phase)
    took: list[float] = []
    bench.visit(cell)
    end_s = time.monotonic() + limit_s
    visits = 0
    while visits < VISITS_MIN or time.monotonic() < end_s:
        took += bench.visit(cell)
        visits += 1
    return statistics.median(took) / 1000


# --- the report


@dataclass(frozen=True, slots=True)
class Row:
    """One phase: what a step has to do, what bounds it, what it reached."""

    phase: Phase
    work: Work
    ceiling: Ceiling
    tokens_per_s: float

    @property
    def fraction(self) -> float:
        return self.tokens_per_s / self.ceiling.tokens_per_s


@dataclass(frozen=True)
class Report:
    """All that was measured. Rates are bytes and operations a second."""

    name: str
    kernels: str
    threads: int
    buffer_bytes: int
    cache_bytes: int
    bandwidth: float
    products: dict[str, float]
    multiplied_in: str
    kept: Kept
    rows: tuple[Row, ...]

    def facts(self) -> dict[str, Any]:
        """For JSON."""
        rows = [{**asdict(row), "fraction": row.fraction} for row in self.rows]
        return {**asdict(self), "rows": rows}

    def text(self) -> str:
        """For people."""
        rates = ", ".join(f"{name} {rate / 1e9:,.0f}" for name, rate in self.products.items())
        weights = (self.kept.layers_bytes + self.kept.head_bytes) / 1e6
        lines = [
            f"{self.name}; kernels: {self.kernels}",
            f"memory: {self.bandwidth / 1e9:.1f} GB/s read by {self.threads} threads "
            f"({self.buffer_bytes >> 20:,} MiB; the cache has {self.cache_bytes >> 20} MiB)",
            f"products, Gflop/s: {rates}; this model: {self.multiplied_in}",
            f"a step reads {weights:,.1f} MB of weights",
            f"{'':<20}{'tokens/s':>10}{'ceiling':>10}{'reached':>9}  {'bound by':<18}"
            f"{'MB/step':>9}{'Gflop/step':>12}{'GB/s':>7}{'Gflop/s':>9}",
        ]
        for row in self.rows:
            steps = row.tokens_per_s / row.phase.tokens
            lines.append(
                f"{row.phase.name:<20}{row.tokens_per_s:>10,.1f}{row.ceiling.tokens_per_s:>10,.1f}"
                f"{row.fraction:>9.0%}  {row.ceiling.by:<18}{row.work.size_bytes / 1e6:>9,.1f}"
                f"{row.work.flops / 1e9:>12,.2f}{row.work.size_bytes * steps / 1e9:>7.1f}"
                f"{row.work.flops * steps / 1e9:>9,.0f}"
            )
        if any(row.fraction > 1 for row in self.rows):
            lines.append(
                "beyond a ceiling: part of the weights stays in the cache from step to step"
            )
        return "\n".join(lines)


def measure(settings: WorkerSettings, limit_s: float) -> Report:
    """A sixth of the time goes to memory, a third to products. Raises HeadraceError.

    All is measured in rounds, and the medians are told: a machine that changes its speed shall do
    so to the ceilings and to what is held against them alike.
    """
    bench, sizes = prepare(settings)
    loaded = bench.loaded
    shape = shape_of(loaded.config)
    wanted = phases(sizes, loaded.record.context_tokens)
    if not wanted:
        raise SettingsError("the KV pool is too small for any step")
    threads, cache = torch.get_num_threads(), cache_bytes()
    room = (available_bytes() or BUFFER_BYTES_MAX) // 4
    size = min(max(CACHES * cache, BUFFER_BYTES_MIN), BUFFER_BYTES_MAX, room)
    round_s = limit_s / ROUNDS
    read, made, took = [], [], []
    for _ in range(ROUNDS):
        read.append(read_rate(threads, size, round_s / 6))
        made.append(product_rates(shape, PREFILL_TOKENS, round_s / 3))
        took.append([step_s(bench, phase, round_s / 2 / len(wanted)) for phase in wanted])
    bandwidth = statistics.median(read)
    products = {name: statistics.median(rates[name] for rates in made) for name in made[0]}
    steps = [
        (phase, statistics.median(times))
        for phase, times in zip(wanted, zip(*took, strict=True), strict=True)
    ]
    best = max((f for f in formats_of(loaded) if f in products), key=lambda f: products[f])
    held = kept(loaded, settings.kv_dtype)
    rows = _rows(shape, held, steps, bandwidth, products[best])
    return Report(
        sizes.name,
        native.state(),
        threads,
        size,
        cache,
        bandwidth,
        products,
        best,
        held,
        tuple(rows),
    )


def _rows(
    shape: ModelShape,
    held: Kept,
    steps: Sequence[tuple[Phase, float]],
    bandwidth: float,
    flops_per_s: float,
) -> list[Row]:
    rows = []
    for phase, took_s in steps:
        work = work_of(shape, held, phase)
        bound = ceiling(work, phase.tokens, bandwidth, flops_per_s)
        rows.append(Row(phase, work, bound, phase.tokens / took_s))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=30.0, help="about how long to measure")
    parser.add_argument("--out", type=Path, help="where the figures go, as JSON")
    args = parser.parse_args()
    settings = load_or_exit(WorkerSettings)
    keep_freed_memory()
    try:
        found = measure(settings, args.seconds)
    except HeadraceError as error:
        print(f"headrace roofline: {error.message}", file=sys.stderr)
        raise SystemExit(1) from error
    print(found.text())
    if args.out is not None:
        args.out.write_text(json.dumps(found.facts(), indent=1) + "\n")
        print(f"written to {args.out}")


if __name__ == "__main__":
    main()
