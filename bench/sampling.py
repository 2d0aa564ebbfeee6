"""Choosing tokens: microseconds of one `sample` call, greedy, plain temperature, and mixed options.

    python -m bench sampling [--rows 1 8 32 64] [--vocab 49152 151936] [--each]

Logits look like a language model's: a few tokens have most of the probability. `mixed` goes through
`OPTIONS`, so that a batch of 16 has each once; `--each` times a batch of every single one. Jobs
have 300 tokens of prompt and 200 of output. One thread, the median of a few calls.
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


def median_us(logits: torch.Tensor, rows: list[Row], calls: int) -> float:
    """Of `calls` calls, each on logits of its own: they may be overwritten."""
    times = []
    for _ in range(calls + 1):
        fresh = logits.clone()
        began = time.perf_counter()
        sample(fresh, rows)
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:]) * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32, 64])
    parser.add_argument("--vocab", type=int, nargs="+", default=[49_152, 151_936])
    parser.add_argument("--calls", type=int, default=9)
    parser.add_argument("--each", action="store_true", help="a line for every option")
    args = parser.parse_args()
    torch.set_num_threads(1)
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
                took_us = median_us(logits, rows, args.calls)
                print(
                    f"vocabulary {vocab:>7}, {count:>3} rows, {kind:<20} {took_us:9.0f} us, "
                    f"{took_us / count:7.1f} us a row",
                    flush=True,
                )


if __name__ == "__main__":
    main()
