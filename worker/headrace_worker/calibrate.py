"""`python -m headrace_worker.calibrate`: how long this worker's steps take, as a cost model.

The real engine runs synthetic batches whose composition is known (decoding rows at several context
lengths, prefill chunks at several offsets, both in one step), and the terms of
`headrace.policy.cost_model` are fitted to the times. Settings are the worker's own HEADRACE_
variables, so what is measured is what would serve.

Invariant: nothing about the prompts' past is computed: its KV is imported as zeros, which costs a
step exactly what real KV costs. The fit weighs each step's error by its duration (a decode step of
20 ms counts as much as a prefill step of 800 ms) and no term is negative. Rejected: fitting what a
serving worker reports, whose steps are all alike. Cells are visited in rounds, so that a slow
minute of the machine spoils a little of each instead of all of one, and in random order, so that
the time limit may come anywhere.
"""

from __future__ import annotations

import argparse
import random
import signal
import statistics
import subprocess
import sys
import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np
import torch

from headrace.clock import SystemClock
from headrace.config import load_or_exit
from headrace.errors import HeadraceError, SettingsError
from headrace.models import resolve
from headrace.policy.cost_model import (
    CONTEXT_UNIT_TOKENS,
    PREFILL_CONTEXT_UNIT,
    CostModel,
    attended,
)
from headrace.policy.hashing import block_hashes, root_hash
from headrace.types import BLOCK_TOKENS, Band, Job, Sampling, pack_tokens
from headrace_worker.allocator import keep_freed_memory
from headrace_worker.engine import Engine
from headrace_worker.engine_config import EngineConfig
from headrace_worker.kv.pool import KvPool
from headrace_worker.loading import LoadedModel, load_model
from headrace_worker.results import BlockPayload
from headrace_worker.settings import WorkerSettings
from headrace_worker.startup import kv_tokens_for

CONTEXTS = (0, 256, 1_024, 2_048)
"""Tokens before a decoding row or a prefill chunk; what the model or its pool cannot hold is
left out."""
CHUNKS = (16, 64, 128, 256, 512)
MIXED_ROWS = (2, 8)
CONTEXT_SPREAD = 0.75
"""How far the contexts of a batch's rows lie from their mean, as a part of it."""
DECODE_STEPS = 4
"""Timed in one visit of a decode cell."""
DECODE_KV_TOKENS_MAX = 16_384
"""Of all rows of a cell together: a step of more says nothing new and takes seconds."""
ROUNDS_MAX = 12
SEED = 1
TERMS = (
    "step_ms",
    "prefill_token_ms",
    "decode_row_ms",
    "decode_context_ms",
    "prefill_context_ms",
    "batch_ms",
)


@dataclass(frozen=True, slots=True)
class Cell:
    """One composition of a step: `rows` decode after `context` tokens each, and a prompt's chunk of
    `chunk` tokens is computed after `offset` tokens."""

    rows: int
    context: int
    chunk: int
    offset: int

    @property
    def kind(self) -> str:
        if self.rows and self.chunk:
            return "mixed"
        return "decode" if self.rows else "prefill"

    def contexts(self) -> list[int]:
        """Of each decoding row: `context` on average, by turns CONTEXT_SPREAD below and above it.

        In a real batch no two are alike, which costs attention a call for each size.
        """
        spread = int(self.context * CONTEXT_SPREAD) // BLOCK_TOKENS * BLOCK_TOKENS
        pairs = [self.context - spread, self.context + spread] * (self.rows // 2)
        return [*pairs, self.context] if self.rows % 2 else pairs

    @property
    def kv_tokens(self) -> int:
        """KV that has to be in the pool for it, with room to go on."""
        return self.rows * (self.context + 4 * BLOCK_TOKENS) + self.offset + self.chunk


@dataclass(frozen=True, slots=True)
class Timing:
    """The median duration of a cell's steps."""

    cell: Cell
    took_ms: float

    def features(self) -> tuple[float, ...]:
        """What CostModel multiplies with TERMS, in their order and units."""
        c = self.cell
        return (
            1.0,
            float(c.chunk),
            float(c.rows),
            c.rows * (c.context + 1) / CONTEXT_UNIT_TOKENS,
            attended(c.offset, c.chunk) / PREFILL_CONTEXT_UNIT,
            float(c.chunk + c.rows > 1),
        )


@dataclass(frozen=True, slots=True)
class FitError:
    """How far a model is off for one kind of step, as shares of what was measured."""

    kind: str
    steps: int
    mean: float
    worst: float
    bias: float


# --- the fit


def fit_terms(timings: Sequence[Timing]) -> tuple[float, ...]:
    """The values of TERMS, none negative, with the least sum of squared relative errors.

    Exact: the best non-negative solution is the best unrestricted one over some subset of the
    terms, and there are only 63 of them (Lawson and Hanson, "Solving Least Squares Problems", 1974,
    chapter 23). Raises ValueError without timings.
    """
    if not timings:
        raise ValueError("nothing was measured")
    took = np.array([timing.took_ms for timing in timings])
    rows = np.array([timing.features() for timing in timings]) / took[:, None]
    best, best_loss = np.zeros(len(TERMS)), float(len(took))
    for size in range(1, len(TERMS) + 1):
        for subset in combinations(range(len(TERMS)), size):
            some = np.linalg.lstsq(rows[:, subset], np.ones(len(took)), rcond=None)[0]
            if (some < 0).any():
                continue
            values = np.zeros(len(TERMS))
            values[list(subset)] = some
            loss = float(((rows @ values - 1) ** 2).sum())
            if loss < best_loss:
                best, best_loss = values, loss
    return tuple(float(value) for value in best)


def fit(
    timings: Sequence[Timing], *, kv_tokens: int, max_jobs: int, step_tokens: int, name: str
) -> CostModel:
    """The CostModel of a worker of these sizes. Raises SettingsError where it makes no sense."""
    terms = (round(value, 6) for value in fit_terms(timings))
    return CostModel(
        **dict(zip(TERMS, terms, strict=True)),
        kv_tokens=kv_tokens,
        max_jobs=max_jobs,
        step_tokens=step_tokens,
        name=name,
    )


def predicted_ms(model: CostModel, cell: Cell) -> float:
    return model.step_duration_ms(
        cell.chunk, cell.rows, cell.rows * (cell.context + 1), attended(cell.offset, cell.chunk)
    )


def errors(model: CostModel, timings: Sequence[Timing]) -> list[FitError]:
    """One FitError for each kind of step that was measured."""
    found = []
    for kind in ("decode", "prefill", "mixed"):
        off = [
            predicted_ms(model, timing.cell) / timing.took_ms - 1
            for timing in timings
            if timing.cell.kind == kind
        ]
        if off:
            sizes = [abs(value) for value in off]
            mean = statistics.mean(sizes)
            found.append(FitError(kind, len(off), mean, max(sizes), statistics.mean(off)))
    return found


# --- the measuring


def cells(kv_tokens: int, context_tokens: int, max_jobs: int, step_tokens: int) -> list[Cell]:
    """What to measure on a worker of these sizes."""
    rows = sorted({1, 2, 4, 8, 16, 32, max_jobs} & set(range(1, max_jobs + 1)))
    chunks = sorted({min(chunk, step_tokens) for chunk in CHUNKS})
    found = [Cell(n, context, 0, 0) for context in CONTEXTS for n in rows]
    found += [Cell(0, 0, chunk, offset) for offset in CONTEXTS for chunk in chunks]
    found += [
        Cell(n, CONTEXTS[1], min(chunk, step_tokens - n), 0)
        for n in MIXED_ROWS
        for chunk in chunks[1:]
        if n < min(max_jobs, step_tokens)  # the prompt takes a place as well
    ]
    longest = context_tokens - 4 * BLOCK_TOKENS
    return [
        cell
        for cell in found
        if max([*cell.contexts(), cell.offset + cell.chunk]) <= longest
        and cell.rows * cell.context <= DECODE_KV_TOKENS_MAX
        # decoding rows keep their past in the pool from visit to visit
        and cell.kv_tokens + 2 * step_tokens <= kv_tokens
    ]


class Bench:
    """An engine that is brought into any cell's state, stepped and timed."""

    def __init__(
        self,
        loaded: LoadedModel,
        config: EngineConfig,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """`clock` counts seconds. Raises ModelError when the KV pool does not fit into memory."""
        self._clock = clock
        self.engine = Engine(loaded, config, SystemClock())
        self._dice = random.Random(SEED)
        size_bytes = KvPool.block_bytes(loaded.config, loaded.dtype, config.kv_dtype)
        self._zeros = bytes(size_bytes)
        self._vocab = loaded.record.vocab_size
        longest = int(max(CONTEXTS) * (1 + CONTEXT_SPREAD)) + BLOCK_TOKENS
        self._pasts = [self._tokens(longest) for _ in range(config.max_running)]
        self._offset_past = self._tokens(longest)
        self._jobs = 0

    def visit(self, cell: Cell) -> list[float]:
        """Durations in ms of steps of `cell`'s composition."""
        running = [
            self._add([*self._pasts[row][:context], *self._tokens(1)], context)
            for row, context in enumerate(cell.contexts())
        ]
        if running:
            self._step(expect=cell.rows)  # their first step, which nothing is known of yet
        if not cell.chunk:
            took = [self._step(expect=cell.rows) for _ in range(DECODE_STEPS)]
        else:
            past = [*self._offset_past[: cell.offset], *self._tokens(cell.chunk)]
            running.append(self._add(past, cell.offset))
            took = [self._step(expect=cell.rows + 1)]
        for job in running:
            self.engine.cancel(job)
        self.engine.step()
        return took

    def _step(self, expect: int) -> float:
        began = self._clock()
        result = self.engine.step()
        took = (self._clock() - began) * 1000
        got = sum(len(delta.tokens) for delta in result.deltas)
        assert got == expect, f"a step made {got} tokens, {expect} were planned"
        return took

    def _tokens(self, count: int) -> list[int]:
        return [self._dice.randrange(self._vocab) for _ in range(count)]

    def _add(self, prompt: list[int], past: int) -> str:
        """A job whose first `past` tokens have KV; the rest of its prompt is to be computed."""
        self._jobs += 1
        job = Job(
            id=f"calibrate-{self._jobs}",
            model=self.engine.record.name,
            tenant="calibrate",
            band=Band.STANDARD,
            arrived_ms=self._jobs,
            gateway="calibrate",
            prompt=pack_tokens(prompt),
            sampling=Sampling(max_tokens=4 * BLOCK_TOKENS, temperature=0.0, ignore_eos=True),
        )
        self.engine.add(job, self._past(job.prompt, past))
        return job.id

    def _past(self, prompt: array[int], tokens: int) -> Iterator[BlockPayload]:
        parent = root_hash(self.engine.record.fingerprint, b"")
        for depth, block in enumerate(block_hashes(parent, prompt, tokens // BLOCK_TOKENS)):
            yield BlockPayload(block, parent, depth, self._zeros)
            parent = block


def measure(bench: Bench, wanted: Sequence[Cell], limit_s: float) -> list[Timing]:
    """Visits `wanted` in rounds until `limit_s` are over, at least one cell of each kind."""
    took: dict[Cell, list[float]] = {}
    dice, kinds = random.Random(SEED), {cell.kind for cell in wanted}
    order = [c for _ in range(ROUNDS_MAX) for c in dice.sample(wanted, len(wanted))]
    bench.visit(wanted[0])  # the first step of a process is slow
    end_s = time.monotonic() + limit_s
    for cell in order:
        if time.monotonic() > end_s and {seen.kind for seen in took} == kinds:
            break
        took.setdefault(cell, []).extend(bench.visit(cell))
    return [Timing(cell, statistics.median(took[cell])) for cell in wanted if cell in took]


@contextmanager
def companions(count: int) -> Iterator[None]:
    """So many workers beside this one, which step all the time: what they take from it counts."""
    argv = [sys.executable, "-m", "headrace_worker.calibrate", "--companion"]
    processes = [
        subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) for _ in range(count)
    ]
    try:
        for process in processes:
            assert process.stdout is not None
            if not process.stdout.readline():
                raise SystemExit("a worker beside this one did not start")
        yield
    finally:
        for process in processes:
            process.send_signal(signal.SIGKILL)
            process.wait()


@dataclass(frozen=True, slots=True)
class Sizes:
    """What a CostModel says of its worker beside the times."""

    kv_tokens: int
    max_jobs: int
    step_tokens: int
    name: str

    def cells(self, context_tokens: int) -> list[Cell]:
        return cells(self.kv_tokens, context_tokens, self.max_jobs, self.step_tokens)


def prepare(settings: WorkerSettings, *, cpu_time: bool = False) -> tuple[Bench, Sizes]:
    """Raises ModelError, and SettingsError for CPU time of several threads, which add up."""
    if cpu_time and settings.threads != 1:
        raise SettingsError("CPU time tells how long a step takes only with one thread")
    if settings.threads:
        torch.set_num_threads(settings.threads)
    name = settings.model_name or settings.model.rstrip("/").rsplit("/", 1)[-1]
    loaded = load_model(
        resolve(settings.model),
        name,
        settings.dtype,
        settings.quantization,
        context_tokens=settings.context_tokens,
    )
    kv_tokens = kv_tokens_for(settings, loaded)
    config = EngineConfig(
        kv_tokens=kv_tokens,
        max_running=settings.max_jobs,
        step_tokens_max=settings.step_tokens,
        offer_blocks=False,
        speculation=False,
        kv_dtype=settings.kv_dtype,
    )
    dtype = str(loaded.dtype).removeprefix("torch.")
    about = f"{name} {dtype} {loaded.quantization}, {torch.get_num_threads()} threads"
    sizes = Sizes(kv_tokens, settings.max_jobs, settings.step_tokens, about)
    return Bench(loaded, config, time.process_time if cpu_time else time.perf_counter), sizes


def keep_busy(bench: Bench, wanted: Sequence[Cell]) -> None:
    """What a companion does until it is killed, or its parent is."""
    print("ready", flush=True)
    while True:
        for cell in wanted:
            bench.visit(cell)


def report(model: CostModel, timings: Sequence[Timing]) -> str:
    """The terms and how well they say what was measured, for people."""
    terms = "\n".join(f"  {term:<20}{getattr(model, term):10.4f}" for term in TERMS)
    lines = [
        f"  {e.kind:<8} {e.steps:>3} kinds of step: off by {e.mean:6.1%} on average, "
        f"{e.worst:6.1%} at worst, bias {e.bias:+6.1%}"
        for e in errors(model, timings)
    ]
    return f"{model.name}\n{terms}\nthe model against what was measured\n" + "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, help="where the cost model's JSON goes")
    parser.add_argument("--seconds", type=float, default=75.0, help="about how long to measure")
    parser.add_argument("--beside", type=int, default=0, help="workers that step beside this one")
    parser.add_argument("--cpu-time", action="store_true", help="for a machine that is busy now")
    parser.add_argument("--companion", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--table", action="store_true", help="print every measured cell")
    args = parser.parse_args()
    settings = load_or_exit(WorkerSettings)
    keep_freed_memory()
    try:
        bench, sizes = prepare(settings, cpu_time=args.cpu_time)
        wanted = sizes.cells(bench.engine.record.context_tokens)
        if not wanted:
            raise SystemExit("headrace calibrate: the KV pool is too small for any step")
        if args.companion:
            keep_busy(bench, wanted)
        with companions(args.beside):
            began, cpu = time.monotonic(), time.process_time()
            timings = measure(bench, wanted, args.seconds)
            cores = (time.process_time() - cpu) / (time.monotonic() - began)
        model = fit(
            timings,
            kv_tokens=sizes.kv_tokens,
            max_jobs=sizes.max_jobs,
            step_tokens=sizes.step_tokens,
            name=sizes.name,
        )
    except HeadraceError as error:
        print(f"headrace calibrate: {error.message}", file=sys.stderr)
        raise SystemExit(1) from error
    if args.table:
        for timing in timings:
            print(f"{timing.cell} {timing.took_ms:.1f} ms, {predicted_ms(model, timing.cell):.1f}")
    print(report(model, timings))
    print(f"it had {cores:.2f} cores for {torch.get_num_threads()} threads on average")
    if args.out is not None:
        args.out.write_text(model.to_json() + "\n")
        print(f"written to {args.out}")


if __name__ == "__main__":
    main()
