"""What quantization costs and gives: perplexity, memory and speed of each mode, side by side.

    python -m bench perplexity [--model smollm2] [--quantization none,int8,int4]
        [--kv-dtype auto,int8] [--text FILE] [--tokens 4096] [--window 1024] [--batches 1,8,32]

The text, unless one is given, is prose of Python's language reference, as the interpreter's own
help has it; each Python version has its own wording, so compare numbers of one run. Every token
is scored once: windows overlap by half, and only their second half counts. Model and attention are
the worker's, keys and values go through its KV pool. Ratios are to the first line. Speeds are of
the worker's engine without speculation, decoding after a prompt of 128 tokens each.
"""

from __future__ import annotations

import argparse
import math
import pydoc_data.topics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch.nn import functional

from headrace.clock import SystemClock
from headrace.models import resolve
from headrace.types import BLOCK_TOKENS, Band, Job, Sampling, pack_tokens
from headrace_worker.attention.choice import attention_over
from headrace_worker.attention.interface import AttentionBatch
from headrace_worker.engine import Engine, EngineConfig
from headrace_worker.kv.pool import KvDtype, KvPool
from headrace_worker.loading import LoadedModel, load_model

TOPICS = (
    "execmodel", "naming", "objects", "import", "typesmodules", "atom-identifiers", "global", "del",
    "exceptions", "lambda", "with", "async", "dynamic-features", "context-managers", "numbers",
    "attribute-access", "comparisons", "calls", "assignment", "try",
)  # fmt: skip
PIECE_TOKENS = 256
"""Tokens of a window that are computed at a time, each piece reading the KV of those before."""
PROMPT_TOKENS = 128


def sample_text() -> str:
    return "\n\n".join(pydoc_data.topics.topics[name] for name in TOPICS)


def windows(count: int, size: int) -> Iterator[tuple[int, int, int]]:
    """(start, stop, first scored) of windows over `count` tokens; every token but the first is
    scored once."""
    start, scored = 0, 1
    while scored < count:
        stop = min(start + size, count)
        yield start, stop, scored
        start, scored = stop - size // 2, stop


def losses(
    loaded: LoadedModel, kv_dtype: KvDtype, tokens: Sequence[int], first: int
) -> torch.Tensor:
    """-log of the probability of tokens[first:], each after all tokens before it; float32."""
    pool = KvPool(loaded.config, -(-len(tokens) // BLOCK_TOKENS), loaded.dtype, kv_dtype)
    backend = attention_over(pool, loaded.config)
    ids, found = torch.tensor(tokens), []
    for start in range(0, len(tokens) - 1, PIECE_TOKENS):
        stop = min(start + PIECE_TOKENS, len(tokens) - 1)
        places = torch.arange(start, stop)
        attend = backend.prepare(
            AttentionBatch(
                block_tables=[list(range(pool.blocks))],
                lengths=[stop],
                query_starts=[0, stop - start],
                slots=places,
            )
        )
        rows = places[places + 1 >= first] - start
        logits = loaded.model(ids[start:stop], places, rows, attend)
        found.append(functional.cross_entropy(logits, ids[start + rows + 1], reduction="none"))
    return torch.cat(found)


def perplexity(loaded: LoadedModel, kv_dtype: KvDtype, tokens: Sequence[int], size: int) -> float:
    record, found = loaded.record, []
    begin = [record.bos_token_id] if record.add_bos and record.bos_token_id is not None else []
    with torch.inference_mode():
        for start, stop, scored in windows(len(tokens), size):
            window = [*begin, *tokens[start:stop]]
            found.append(losses(loaded, kv_dtype, window, scored - start + len(begin)))
    return math.exp(torch.cat(found).double().mean().item())


def speeds(
    loaded: LoadedModel, kv_dtype: KvDtype, prompt: int, batches: Sequence[int], steps: int
) -> tuple[float, list[float]]:
    """Tokens a second: prefill of `prompt` tokens, then decoding for each batch size."""
    largest = max(batches)
    room = largest * (PROMPT_TOKENS + steps + BLOCK_TOKENS) + prompt + BLOCK_TOKENS
    config = EngineConfig(
        kv_tokens=room, max_running=largest, step_tokens_max=max(512, prompt), offer_blocks=False,
        speculation=False, kv_dtype=kv_dtype,
    )  # fmt: skip
    engine = Engine(loaded, config, SystemClock())
    vocab, seen = loaded.config.vocab_size, 0

    def add(tokens: int, output: int) -> None:
        nonlocal seen
        seen += 1  # another prompt each time, so that no prefix is found
        ids = [(place * 37 + seen * 911) % (vocab - 100) + 100 for place in range(tokens)]
        sampling = Sampling(max_tokens=output, temperature=0, ignore_eos=True)
        job = Job(f"{seen}", loaded.record.name, "t", Band.STANDARD, 0, "g", pack_tokens(ids),
                  sampling)  # fmt: skip
        engine.add(job)

    def run(batch: int, tokens: int, output: int) -> float:
        """Median seconds of a step that computes the whole batch."""
        for _ in range(batch):
            add(tokens, output)
        times = []
        while engine.has_work:
            running, began = engine.counts()[0], time.perf_counter()
            engine.step()
            if output == 1 or running == batch:
                times.append(time.perf_counter() - began)
        return sorted(times)[len(times) // 2]

    run(1, prompt, 1)  # warms up
    prefill = prompt / min(run(1, prompt, 1) for _ in range(3))
    return prefill, [batch / run(batch, PROMPT_TOKENS, steps) for batch in batches]


def measure(arguments: argparse.Namespace) -> None:
    path, text = resolve(arguments.model), arguments.text
    text = text.read_text() if text else sample_text()
    baseline = None
    names = ["weights", "KV", "perplexity", "ratio", "weights MiB", "KV bytes/token", "prefill/s"]
    print(*(f"{name:>14}" for name in names), *(f"decode/s x{b:<3}" for b in arguments.batches))
    for quantization in arguments.quantization:
        loaded = load_model(path, "bench", arguments.dtype, quantization)
        tokenizer = Tokenizer.from_str(loaded.record.tokenizer_json.decode())
        tokens = tokenizer.encode(text, add_special_tokens=False).ids[: arguments.tokens]
        size = min(arguments.window, loaded.config.context_tokens)
        for kv_dtype in arguments.kv_dtype:
            found = perplexity(loaded, kv_dtype, tokens, size)
            baseline = baseline or found
            kv_bytes = KvPool.block_bytes(loaded.config, loaded.dtype, kv_dtype) // BLOCK_TOKENS
            prefill, decodes = speeds(
                loaded, kv_dtype, min(512, size - 1), arguments.batches, arguments.steps
            )
            print(
                f"{quantization:>14} {kv_dtype:>14} {found:14.4f} {found / baseline:14.4f} "
                f"{loaded.weight_bytes / 2**20:14.1f} {kv_bytes:14} {prefill:14.0f}",
                *(f"{rate:13.1f}" for rate in decodes),
                flush=True,
            )
    dtype = str(loaded.dtype)[6:]
    print(f"{len(tokens)} tokens in windows of {size}, {dtype}, {torch.get_num_threads()} threads")


def names_of(text: str) -> list[str]:
    return text.split(",")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2", help="alias, Hugging Face id or path")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--quantization", type=names_of, default=["none", "int8", "int4"])
    parser.add_argument("--kv-dtype", type=names_of, default=["auto", "int8"])
    parser.add_argument("--text", type=Path, help="a file to take perplexity of")
    parser.add_argument("--tokens", type=int, default=4096, help="of the text, at most")
    parser.add_argument("--window", type=int, default=1024, help="tokens a token is scored after")
    parser.add_argument(
        "--batches", type=lambda t: [int(n) for n in t.split(",")], default=[1, 8, 32]
    )
    parser.add_argument("--steps", type=int, default=24, help="decode steps to time")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    measure(arguments)


if __name__ == "__main__":
    main()
