"""`python -m headrace_worker.calibrate`: how long this worker's steps take, as a cost model.

With `--steps FOLDER` the model is fitted to the steps that serving workers have logged there
(step_log.py), which is what callers see of them. Without, the bare engine runs synthetic batches
whose composition is known (decoding rows at several context lengths, prefill chunks at several
offsets, both in one step). Settings are the worker's own HEADRACE_ variables, so what is measured
is what would serve.

Invariant: of the bare engine's prompts nothing of their past is computed: its KV is imported as
zeros, which costs a step exactly what real KV costs. Cells are visited in rounds, so that a slow
minute of the machine spoils a little of each instead of all of one, and in random order, so that
the time limit may come anywhere. Rejected: scaling what the bare engine takes by what a fleet's
steps take longer: what shares its cores costs short steps another part than long ones.
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
from pathlib import Path

import torch

from headrace.clock import SystemClock
from headrace.config import load_or_exit
from headrace.errors import HeadraceError, SettingsError
from headrace.policy.cost_model import CostModel, attended
from headrace.policy.hashing import block_hashes, root_hash
from headrace.types import BLOCK_TOKENS, Band, Job, Sampling, pack_tokens
from headrace_worker.allocator import keep_freed_memory
from headrace_worker.engine import Engine
from headrace_worker.engine_config import EngineConfig
from headrace_worker.fitting import Sizes, Timing, fit, grouped, report, timing_of
from headrace_worker.kv.pool import KvPool
from headrace_worker.loading import LoadedModel
from headrace_worker.policy.plan import StepShape
from headrace_worker.results import BlockPayload
from headrace_worker.settings import WorkerSettings
from headrace_worker.startup import kv_tokens_for, load
from headrace_worker.step_log import about, read_logs

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

    @property
    def shape(self) -> StepShape:
        return StepShape(
            self.chunk,
            self.rows,
            self.rows * (self.context + 1),
            attended(self.offset, self.chunk),
        )


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
        self.loaded = loaded
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


def measure(bench: Bench, wanted: Sequence[Cell], limit_s: float) -> dict[Cell, float]:
    """Visits `wanted` in rounds until `limit_s` are over, at least one cell of each kind.

    The median durations of their steps in ms.
    """
    took: dict[Cell, list[float]] = {}
    dice, kinds = random.Random(SEED), {cell.kind for cell in wanted}
    order = [c for _ in range(ROUNDS_MAX) for c in dice.sample(wanted, len(wanted))]
    bench.visit(wanted[0])  # the first step of a process is slow
    end_s = time.monotonic() + limit_s
    for cell in order:
        if time.monotonic() > end_s and {seen.kind for seen in took} == kinds:
            break
        took.setdefault(cell, []).extend(bench.visit(cell))
    return {cell: statistics.median(took[cell]) for cell in wanted if cell in took}


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


def prepare(settings: WorkerSettings, *, cpu_time: bool = False) -> tuple[Bench, Sizes]:
    """Raises ModelError, and SettingsError for CPU time of several threads, which add up."""
    if cpu_time and settings.threads != 1:
        raise SettingsError("CPU time tells how long a step takes only with one thread")
    if settings.threads:
        torch.set_num_threads(settings.threads)
    loaded = load(settings)
    kv_tokens = kv_tokens_for(settings, loaded)
    config = EngineConfig(
        kv_tokens=kv_tokens,
        max_running=settings.max_jobs,
        step_tokens_max=settings.step_tokens,
        offer_blocks=False,
        speculation=False,
        kv_dtype=settings.kv_dtype,
    )
    sizes = about(settings, loaded, kv_tokens, torch.get_num_threads())
    return Bench(loaded, config, time.process_time if cpu_time else time.perf_counter), sizes


def keep_busy(bench: Bench, wanted: Sequence[Cell]) -> None:
    """What a companion does until it is killed, or its parent is."""
    print("ready", flush=True)
    while True:
        for cell in wanted:
            bench.visit(cell)


def measured(
    settings: WorkerSettings, seconds: float, beside: int, *, cpu_time: bool, table: bool
) -> tuple[list[Timing], Sizes]:
    """Of the bare engine with these settings. Raises HeadraceError."""
    bench, sizes = prepare(settings, cpu_time=cpu_time)
    wanted = cells_of(bench, sizes)
    with companions(beside):
        began, cpu = time.monotonic(), time.process_time()
        took = measure(bench, wanted, seconds)
        cores = (time.process_time() - cpu) / (time.monotonic() - began)
    print(f"it had {cores:.2f} cores for {torch.get_num_threads()} threads on average")
    for cell in took if table else ():
        print(f"{cell} {took[cell]:.1f} ms")
    return [timing_of(cell.shape, ms) for cell, ms in took.items()], sizes


def cells_of(bench: Bench, sizes: Sizes) -> list[Cell]:
    """What to measure. Raises SettingsError."""
    context = bench.engine.record.context_tokens
    wanted = cells(sizes.kv_tokens, context, sizes.max_jobs, sizes.step_tokens)
    if not wanted:
        raise SettingsError("the KV pool is too small for any step")
    return wanted


def logged(folder: Path, *, table: bool) -> tuple[list[Timing], Sizes]:
    """Of serving workers that have logged their steps there. Raises SettingsError."""
    sizes, steps = read_logs(folder.glob("*.steps"))
    if not steps:
        raise SettingsError("no worker has taken a step that counts")
    timings = grouped(steps)
    for timing in sorted(timings, key=lambda timing: timing.features) if table else ():
        _, prefill, rows, context, *_ = timing.features
        print(
            f"{timing.count} steps of {rows:.0f} rows with {1000 * context:.0f} tokens and "
            f"{prefill:.0f} tokens of prompts: {timing.took_ms:.1f} ms"
        )
    return timings, sizes


def write(model: CostModel, timings: Sequence[Timing], out: Path | None) -> None:
    print(report(model, timings))
    if out is not None:
        out.write_text(model.to_json() + "\n")
        print(f"written to {out}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, help="where the cost model's JSON goes")
    parser.add_argument("--steps", type=Path, help="a folder in which workers logged their steps")
    parser.add_argument("--seconds", type=float, default=75.0, help="about how long to measure")
    parser.add_argument("--beside", type=int, default=0, help="workers that step beside this one")
    parser.add_argument("--cpu-time", action="store_true", help="for a machine that is busy now")
    parser.add_argument("--companion", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--table", action="store_true", help="print every measured composition")
    args = parser.parse_args()
    keep_freed_memory()
    try:
        if args.companion:
            bench, sizes = prepare(load_or_exit(WorkerSettings))
            keep_busy(bench, cells_of(bench, sizes))
        if args.steps is not None:
            timings, sizes = logged(args.steps, table=args.table)
        else:
            timings, sizes = measured(
                load_or_exit(WorkerSettings),
                args.seconds,
                args.beside,
                cpu_time=args.cpu_time,
                table=args.table,
            )
        write(fit(timings, sizes), timings, args.out)
    except HeadraceError as error:
        print(f"headrace calibrate: {error.message}", file=sys.stderr)
        raise SystemExit(1) from error


if __name__ == "__main__":
    main()
