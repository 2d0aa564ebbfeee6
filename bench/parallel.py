"""What several ranks cost and bring: bytes and messages, counted; tokens a second.

    python -m bench parallel [--model smollm2] [--shapes 1x1 2x1 1x2] [--batches 1 8]
        [--links torch]

A shape is tensor ranks x stages, all on this machine, with the cores divided over them. Counted is
what rank 0 receives in sums and for choosing tokens, passes on to the next stage, and tells of a
step. Beside it stands the least that any way of doing it has to move: for a sum over n ranks
2 (n - 1) / n of its bytes, two sums a layer and one for the embedding; a logit and an id per rank
and row; a row's activations per stage. `prefill` is one prompt of 512 tokens, the rest is decoding,
greedy unless --temperature says otherwise, without speculation. The median step. `--links torch` is
ranks as on several hosts, over gloo.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import statistics
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from headrace import logs
from headrace.clock import SystemClock
from headrace.types import Band, Job, Sampling, pack_tokens
from headrace_worker import startup
from headrace_worker.engine import Engine
from headrace_worker.engine_config import EngineConfig
from headrace_worker.parallel.collective import Counts, minimal_bytes
from headrace_worker.parallel.ranks import Ranks
from headrace_worker.parallel.shape import Shape
from headrace_worker.parallel.torch_links import join, launch
from headrace_worker.settings import WorkerSettings

PROMPT_TOKENS, PREFILL_TOKENS = 24, 512
WARM_STEPS = 4


@dataclass
class Opened:
    """An engine, and what its rank 0 has moved since `clear`."""

    engine: Engine
    shape: Shape
    layers: int
    hidden: int
    itemsize: int
    sums: Counts
    passed: Counts
    told: Counts

    def clear(self) -> None:
        for counts in (self.sums, self.passed, self.told):
            counts.messages = counts.bytes = 0

    def least_bytes(self, rows: int) -> float:
        """What a step of `rows`, each with a token to choose, has to move through rank 0."""
        row_bytes = self.hidden * self.itemsize
        tensor, pipeline = self.shape.tensor, self.shape.pipeline
        sums = minimal_bytes(tensor, rows * row_bytes) * (2 * self.layers + 1)
        chosen = (tensor - 1) * 8 * rows if pipeline == 1 else 0
        return sums + chosen + (rows * row_bytes if pipeline > 1 else 0)


@contextlib.contextmanager
def opened(args: argparse.Namespace, shape: Shape) -> Iterator[Opened]:
    """An engine of this shape, its other ranks running."""
    env = {
        "HEADRACE_MODEL": args.model,
        "HEADRACE_DTYPE": args.dtype,
        "HEADRACE_QUANTIZATION": args.quantization,
        "HEADRACE_THREADS": str(args.threads),
        "HEADRACE_TENSOR_PARALLEL": str(shape.tensor),
        "HEADRACE_PIPELINE_PARALLEL": str(shape.pipeline),
        "HEADRACE_LOG_LEVEL": "warning",
    }
    os.environ.update(env)
    settings = WorkerSettings()
    torch.set_num_threads(startup.threads_each(settings, shape.ranks))
    ranks = _started(args.links, shape, env) if shape.ranks > 1 else None
    try:
        loaded = startup.load(settings, None if ranks is None else ranks.links)
        if ranks is not None:
            ranks.await_loaded(loaded.record.fingerprint)
        config = EngineConfig(
            8192, step_tokens_max=PREFILL_TOKENS, offer_blocks=False, speculation=False
        )
        engine = Engine(loaded, config, SystemClock(), ranks)
        sums, passed, told = Counts(), Counts(), Counts()
        if ranks is not None:
            sums = ranks.links.group.counts
            _count(ranks, passed, told)
        yield Opened(
            engine, shape, loaded.config.layers, loaded.config.hidden_size,
            _itemsize(engine), sums, passed, told,
        )  # fmt: skip
    finally:
        if ranks is not None:
            ranks.close()


def _started(links: str, shape: Shape, env: Mapping[str, str]) -> Ranks:
    if links == "shared":
        return Ranks.spawn(shape, env)
    children = launch(shape, env)
    return Ranks(join(shape, "cpu"), children)


def _itemsize(engine: Engine) -> int:
    """Bytes of a number that ranks add up or pass on: float32 where the native kernels compute."""
    steps = engine._runner._steps
    stage = steps._stage if isinstance(steps, Ranks) else None
    return 4 if stage is None else stage._executor.passed_dtype.itemsize


def _count(ranks: Ranks, passed: Counts, told: Counts) -> None:
    """Has rank 0's links count what goes through them."""
    links = ranks.links
    pass_on, command = links.pass_on, links.command

    def counted_pass_on(x: torch.Tensor) -> None:
        passed.note(x.nbytes)
        pass_on(x)

    def counted_command(data: bytes) -> None:
        told.note(len(data))
        command(data)

    links.pass_on = counted_pass_on  # type: ignore[method-assign]
    links.command = counted_command  # type: ignore[method-assign]


def add(world: Opened, name: str, prompt_tokens: int, tokens: int, temperature: float) -> None:
    dice = random.Random(name)
    prompt = [dice.randrange(100, 20_000) for _ in range(prompt_tokens)]
    sampling = Sampling(max_tokens=tokens, temperature=temperature, ignore_eos=True)
    record = world.engine.record
    world.engine.add(
        Job(
            id=name,
            model=record.name,
            tenant="bench",
            band=Band.STANDARD,
            arrived_ms=0,
            gateway="bench",
            prompt=pack_tokens(prompt),
            sampling=sampling,
        )
    )


def prefill_ms(world: Opened) -> float:
    """One prompt of a step's whole budget, the best of three."""
    found = []
    for attempt in range(3):
        add(world, f"prefill-{attempt}", PREFILL_TOKENS, 1, 0.0)
        start = time.perf_counter()
        while world.engine.has_work:
            world.engine.step()
        found.append((time.perf_counter() - start) * 1e3)
    return min(found)


def decode(world: Opened, batch: int, args: argparse.Namespace) -> str:
    """A line of figures of `batch` streams."""
    for number in range(batch):
        add(world, f"d{batch}-{number}", PROMPT_TOKENS, args.tokens, args.temperature)
    taken, tokens, left = [], 0, WARM_STEPS
    while world.engine.has_work:
        start = time.perf_counter()
        result = world.engine.step()
        if left:
            left -= 1
            world.clear()
            continue
        taken.append(time.perf_counter() - start)
        tokens += sum(len(delta.tokens) for delta in result.deltas)
    steps = len(taken)
    rate = tokens / sum(taken)
    moved = world.sums.bytes + world.passed.bytes
    messages = world.sums.messages + world.passed.messages
    least = world.least_bytes(1)
    ratio = f"{moved / tokens / least:6.2f}x" if least else "      –"
    return (
        f"{batch:5} {statistics.median(taken) * 1e3:8.2f} {rate:8.1f} {messages / steps:9.1f} "
        f"{moved / steps:12,.0f} {moved / tokens:11,.0f} {least:11,.0f} {ratio} "
        f"{world.told.bytes / steps:9,.0f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench parallel")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16"])
    parser.add_argument("--quantization", default="none", choices=["none", "int8", "int4"])
    parser.add_argument("--shapes", nargs="+", default=["1x1", "2x1", "1x2"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--links", default="shared", choices=["shared", "torch"])
    args = parser.parse_args()
    if args.links == "torch" and sum(shape != "1x1" for shape in args.shapes) > 1:
        parser.error("--links torch takes one shape of several ranks: a process joins once")
    logs.setup("bench", level="warning", json=False)
    for name in args.shapes:
        tensor, pipeline = (int(part) for part in name.split("x"))
        with opened(args, Shape(tensor, pipeline)) as world:
            prefill = prefill_ms(world)
            print(
                f"{tensor} tensor rank(s) x {pipeline} stage(s), {args.threads} core(s): prefill "
                f"{PREFILL_TOKENS / prefill * 1e3:,.0f} tokens/s\n"
                f"{'batch':>5} {'step ms':>8} {'tokens/s':>8} {'msgs/step':>9} {'bytes/step':>12} "
                f"{'bytes/token':>11} {'least':>11}   ratio plan bytes",
                flush=True,
            )
            for batch in args.batches:
                print(decode(world, batch, args), flush=True)
    if args.links == "torch":
        os._exit(0)  # gloo's threads would abort the interpreter's end, once in a while


if __name__ == "__main__":
    main()
