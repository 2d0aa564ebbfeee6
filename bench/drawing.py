"""Tokens per second of greedy streams and of streams that draw, by turns in one engine.

    python -m bench drawing [--streams 1 8 32] [--tokens 96] [--quantization int4] [--threads 2]

`ways` are greedy, the OpenAI default (temperature 1), and temperature 0.8 with top_p 0.95. Prompts
are 64 random tokens; nothing is guessed. The medians of a few rounds, and what a step costs besides
in milliseconds.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import numpy as np
import torch

from headrace.clock import SystemClock
from headrace.models import resolve
from headrace.types import Band, Job, Sampling, pack_tokens
from headrace_worker.allocator import keep_freed_memory
from headrace_worker.engine import Engine, EngineConfig
from headrace_worker.loading import load_model

PROMPT_TOKENS = 64
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "temperature 1": {"temperature": 1.0},
    "temperature 0.8, top_p 0.95": {"temperature": 0.8, "top_p": 0.95},
}


def run(engine: Engine, name: str, streams: int, tokens: int, way: dict[str, Any]) -> float:
    """Milliseconds of a step in which all `streams` decode, the median."""
    dice = np.random.default_rng(streams)
    for number in range(streams):
        prompt = pack_tokens(dice.integers(100, 40_000, PROMPT_TOKENS).tolist())
        sampling = Sampling(max_tokens=tokens, seed=number, ignore_eos=True, **way)
        job = Job(
            f"{name}-{number}", "bench", "bench", Band.STANDARD, number, "bench", prompt, sampling
        )
        engine.add(job)
    took = []
    while engine.has_work:
        began = time.perf_counter()
        result = engine.step()
        took_ms = (time.perf_counter() - began) * 1000
        if result.work.output_tokens == streams and not result.work.prefill_tokens:
            took.append(took_ms)
    return statistics.median(took)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quantization", default="int4")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    keep_freed_memory()
    loaded = load_model(resolve(args.model), "bench", "bfloat16", args.quantization)
    engine = Engine(loaded, EngineConfig(kv_tokens=16_384, speculation=False), SystemClock())
    run(engine, "warm", 1, 8, WAYS["greedy"])
    for streams in args.streams:
        steps: dict[str, list[float]] = {name: [] for name in WAYS}
        for number in range(args.rounds):
            for name, way in WAYS.items():
                took = run(engine, f"{streams}-{number}-{name}", streams, args.tokens, way)
                steps[name].append(took)
        greedy = steps["greedy"]
        for name, took in steps.items():
            more = statistics.median(a - b for a, b in zip(took, greedy, strict=True))
            each = statistics.median(took)
            print(
                f"{streams:>3} streams, {name:<28} {streams / each * 1000:7.1f} tokens a second, "
                f"{each:6.2f} ms a step, {more:+6.2f} ms",
                flush=True,
            )


if __name__ == "__main__":
    main()
