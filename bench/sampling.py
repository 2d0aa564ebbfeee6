"""Choosing tokens: microseconds of one `sample` call, with the native kernels and without.

    python -m bench sampling [--rows 1 8 32 64] [--vocab 49152 151936] [--each] [--threads N]

Logits look like a language model's: a few tokens have most of the probability. `mixed` goes through
`OPTIONS`, so that a batch of 16 has each once; `--each` times a batch of every single one. Jobs
have 300 tokens of prompt and 200 of output. Highest logits are known, as they are after a native
step. The median of a few calls, by turns with the kernels and without.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from headrace.types import Sampling
from headrace_worker import native
from headrace_worker.allocator import keep_freed_memory
from headrace_worker.sampling.choosing import Choosing
from headrace_worker.sampling.sampler import Row, sample

PROMPT_TOKENS, OUTPUT_TOKENS = 300, 200

OPTIONS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "temperature": {"temperature": 0.8},
    "top_p": {"temperature": 0.7, "top_p": 0.9},
    "top_k": {"temperature": 0.7, "top_k": 40},
    "top_k, top_p": {"temperature": 1.0, "top_k": 50, "top_p": 0.95},
    "min_p": {"temperature": 1.2, "min_p": 0.05},
    "typical_p": {"temperature": 1.0, "typical_p": 0.9},
    "frequency_penalty": {"frequency_penalty": 0.5},
    "repetition_penalty": {"temperature": 0.8, "top_p": 0.9, "repetition_penalty": 1.1},
    "logit_bias": {"temperature": 0.8, "logit_bias": tuple((i, -5.0) for i in range(100))},
    "bad_words": {"bad_words": tuple((i, i + 1) for i in range(100))},
    "min_tokens": {"temperature": 0.8, "top_k": 20, "min_tokens": 1000},
    "logprobs": {"logprobs": 5},
    "grammar": {"masked": True},
    "grammar, top_p": {"temperature": 0.7, "top_p": 0.9, "masked": True},
    "penalties, logprobs": {"temperature": 1.0, "presence_penalty": 0.3, "logprobs": 20},
}


def make_row(number: int, vocab: int, options: dict[str, Any]) -> Row:
    dice = np.random.default_rng(number)
    fields = dict(options)
    mask: NDArray[np.int32] | None = None
    if fields.pop("masked", False):
        words = dice.integers(0, 2**32, -(-vocab // 32), np.uint32)
        mask = words.view(np.int32)
    fields.setdefault("temperature", 0.0)
    tokens = dice.integers(0, vocab, PROMPT_TOKENS + OUTPUT_TOKENS).tolist()
    sampling = Sampling(max_tokens=2000, seed=number, **fields)
    return Row(Choosing(sampling, tokens, PROMPT_TOKENS, frozenset({2}), vocab), mask=mask)


def make_logits(rows: int, vocab: int) -> torch.Tensor:
    """Normal noise, and 30 tokens a row that stand out of it."""
    source = torch.Generator().manual_seed(rows)
    logits = torch.randn(rows, vocab, generator=source) * 2
    likely = torch.randint(vocab, (rows, 30), generator=source)
    return logits.scatter_add_(1, likely, torch.rand(rows, 30, generator=source) * 16)


def medians_us(logits: torch.Tensor, rows: list[Row], calls: int) -> list[float]:
    """Of `calls` calls by numpy, and by the kernels if they are here; each on fresh logits."""
    tops = logits.argmax(1).tolist()
    library = native.library()
    ways = [None] if library is None else [None, library]
    times: list[list[float]] = [[] for _ in ways]
    for _ in range(calls + 1):
        for way, taken in zip(ways, times, strict=True):
            fresh = logits.numpy().copy()  # they may be overwritten
            began = time.perf_counter()
            sample(fresh, rows, tops, way)
            taken.append(time.perf_counter() - began)
    return [statistics.median(taken[1:]) * 1e6 for taken in times]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32, 64])
    parser.add_argument("--vocab", type=int, nargs="+", default=[49_152, 151_936])
    parser.add_argument("--calls", type=int, default=9)
    parser.add_argument("--each", action="store_true", help="a line for every option")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    keep_freed_memory()
    print(f"kernels: {native.state()}, {args.threads} threads")
    kinds = {"greedy": [OPTIONS["greedy"]], "plain": [OPTIONS["temperature"]]}
    kinds["mixed"] = list(OPTIONS.values())
    if args.each:
        kinds |= {name: [options] for name, options in OPTIONS.items()}
    for vocab in args.vocab:
        for count in args.rows:
            logits = make_logits(count, vocab)
            for kind, options in kinds.items():
                rows = [
                    make_row(i, vocab, options[(2 + 5 * i) % len(options)]) for i in range(count)
                ]
                took = [us / count for us in medians_us(logits, rows, args.calls)]
                print(
                    f"vocabulary {vocab:>7}, {count:>3} rows, {kind:<20} us a row: numpy "
                    f"{took[0]:7.1f}" + "".join(f", kernels {us:7.1f}" for us in took[1:]),
                    flush=True,
                )


if __name__ == "__main__":
    main()
