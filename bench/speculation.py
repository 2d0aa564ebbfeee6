"""Tokens per second with and without speculation, side by side, where it helps and where not.

    python -m bench speculation [--model smollm2] [--tokens 128] [--threads 2] [--dtype auto]

`copy` asks the model for text that stands in its prompt, `story` for text that does not. Both
engines run in turns over the same prompts; texts may differ in bfloat16, whose rounding depends on
the number of rows.
"""

from __future__ import annotations

import argparse
import time

import torch
from tokenizers import Tokenizer

from headrace.clock import SystemClock
from headrace.models import resolve
from headrace.types import Band, Job, Sampling, pack_tokens
from headrace_worker.engine import Engine, EngineConfig
from headrace_worker.loading import LoadedModel, load_model

BATCHES = (1, 8, 32)
ROUNDS = 3
LINES = [
    "def area(width, height): return width * height",
    "The miller opened the gate and the water ran along the headrace to the wheel.",
    '{"name": "mill", "wheels": 3, "river": "Avon", "year": 1742}',
    "for index, wheel in enumerate(wheels): print(index, wheel.speed)",
]
ASKS = {
    "copy": "Repeat this text, word by word, three times:\n{line}\n{line}",
    "story": "Tell a story about number {number}, a wheel and a river, in your own words.",
}


def prompts(loaded: LoadedModel, kind: str, count: int) -> list[list[int]]:
    """`count` chat prompts of `kind`, no two of them the same."""
    tokenizer = Tokenizer.from_buffer(loaded.record.tokenizer_json)
    made = []
    for number in range(count):
        line = f"{LINES[number % len(LINES)]} #{number}"
        text = ASKS[kind].format(line=line, number=number)
        chat = f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"
        made.append(tokenizer.encode(chat, add_special_tokens=False).ids)
    return made


def run(engine: Engine, name: str, asked: list[list[int]], tokens: int) -> tuple[float, int, int]:
    """(tokens per second after the first step, guessed, of which right)."""
    sampling = Sampling(max_tokens=tokens, temperature=0.0, ignore_eos=True)
    for number, prompt in enumerate(asked):
        engine.add(
            Job(
                f"{name}-{number}",
                "bench",
                "bench",
                Band.STANDARD,
                number,
                "bench",
                pack_tokens(prompt),
                sampling,
            )
        )
    made = guessed = right = 0
    while engine.counts()[1]:
        engine.step()
    began = time.perf_counter()
    while engine.has_work:
        result = engine.step()
        made += sum(len(delta.tokens) for delta in result.deltas)
        guessed += sum(story.guessed for story in result.stories)
        right += sum(story.guessed_right for story in result.stories)
    return made / (time.perf_counter() - began), guessed, right


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    loaded = load_model(resolve(args.model), "bench", args.dtype)
    engines = {
        on: Engine(loaded, EngineConfig(16_384, offer_blocks=False, speculation=on), SystemClock())
        for on in (False, True)
    }
    print(
        f"{'text':>6} {'streams':>7} {'off tok/s':>10} {'on tok/s':>10} {'ratio':>6}  guesses right"
    )
    for kind in ASKS:
        for batch in BATCHES:
            asked = prompts(loaded, kind, batch)
            rates: dict[bool, float] = {}
            for turn in range(ROUNDS):
                for on, engine in engines.items():
                    name = f"{kind}-{batch}-{turn}"
                    rate, guessed, right = run(engine, name, asked, args.tokens)
                    rates[on] = max(rate, rates.get(on, 0.0))
            share = f"{right} of {guessed}" if guessed else "none tried"
            ratio = rates[True] / rates[False]
            figures = f"{rates[False]:>10.0f} {rates[True]:>10.0f} {ratio:>6.2f}"
            print(f"{kind:>6} {batch:>7} {figures}  {share}")


if __name__ == "__main__":
    main()
