"""Requests as lists of prefix blocks, for replaying caches: from traces, and synthetic ones.

A block is a number; two requests that begin with the same numbers begin with the same tokens.
Everything drawn is drawn from a seed.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from itertools import accumulate, count
from pathlib import Path

from headrace_sim.trace import read_trace

Requests = list[list[int]]

AZURE_BLOCK_TOKENS = 64
TURN_TOKENS_MAX = 512
"""A prompt may continue an earlier one and its answer if it is longer by at most this much."""
SESSIONS_OPEN_MAX = 400


def from_trace(path: Path, seed: int) -> Requests:
    """The prefix blocks in a trace; where it has none, conversations that fit its lengths."""
    trace = read_trace(path)
    if any(request.blocks for request in trace.requests):
        return dense([list(request.blocks) for request in trace.requests])
    lengths = [(request.input_tokens, request.output_tokens) for request in trace.requests]
    return _conversations(lengths, random.Random(seed))


def _conversations(lengths: list[tuple[int, int]], rng: random.Random) -> Requests:
    """Each prompt continues, if it can, one of the open conversations that it just outgrew."""
    fresh = count()
    sessions: list[tuple[int, list[int]]] = []
    requests = []
    for prompt_tokens, output_tokens in lengths:
        fitting = [
            at
            for at, (tokens, _) in enumerate(sessions)
            if tokens < prompt_tokens <= tokens + TURN_TOKENS_MAX
        ]
        blocks = sessions.pop(rng.choice(fitting))[1] if fitting else []
        full = prompt_tokens // AZURE_BLOCK_TOKENS
        blocks = [*blocks[:full], *(next(fresh) for _ in range(full - len(blocks)))]
        requests.append(blocks)
        sessions.append((prompt_tokens + output_tokens, blocks))
        if len(sessions) > SESSIONS_OPEN_MAX:
            sessions.pop(rng.randrange(len(sessions)))
    return requests


def dense(requests: Requests) -> Requests:
    """The same with blocks numbered from 0 in order of appearance."""
    numbers: dict[int, int] = {}
    return [[numbers.setdefault(block, len(numbers)) for block in blocks] for blocks in requests]


def zipf(rng: random.Random, items: int, exponent: float) -> Callable[[], int]:
    """A draw from 0 to `items` - 1, rarer with the number's power."""
    weights = list(accumulate((item + 1) ** -exponent for item in range(items)))
    return lambda: rng.choices(range(items), cum_weights=weights)[0]


def chats(rng: random.Random, requests: int) -> Iterator[list[int]]:
    """Conversations of 1 to 12 turns behind one of 200 system prompts; returns after a while."""
    fresh = count(1_000_000)
    system = zipf(rng, 200, 1.1)
    waiting: list[tuple[float, list[int], int]] = []
    for now in range(requests):
        due = [item for item in waiting if item[0] <= now]
        if due and rng.random() < 0.7:
            item = min(due)
            waiting.remove(item)
            _, blocks, turns = item
        else:
            prompt = system()
            blocks, turns = [prompt * 100 + part for part in range(2 + prompt % 5)], 0
        blocks = [*blocks, *(next(fresh) for _ in range(rng.randint(1, 6)))]
        yield blocks
        if turns < 11 and rng.random() < 0.75:
            waiting.append((now + rng.expovariate(1 / 300), blocks, turns + 1))


def documents(rng: random.Random, requests: int) -> Iterator[list[int]]:
    """Questions about 3,000 documents of 4 to 40 blocks, some asked about far more often."""
    fresh = count(10_000_000)
    document = zipf(rng, 3_000, 0.8)
    for _ in range(requests):
        asked = document()
        size = 4 + asked * 7919 % 37
        yield [*(asked * 100 + part for part in range(size)), next(fresh), next(fresh)]


def rounds(rng: random.Random, requests: int) -> Iterator[list[int]]:
    """A batch job that goes over the same 200 texts again and again, beside passing requests."""
    fresh = count(10_000_000)
    for number in range(requests):
        if rng.random() < 0.5:
            yield [next(fresh) for _ in range(rng.randint(1, 20))]
        else:
            text = number // 2 % 200
            yield [text * 100 + part for part in range(12)]


def shifting(rng: random.Random, requests: int) -> Iterator[list[int]]:
    """A third of documents, then of rounds, then of chats: what was learned gets wrong twice."""
    for offset, part in enumerate((documents, rounds, chats)):
        for blocks in part(rng, requests // 3):
            yield [offset * 1_000_000_000 + block for block in blocks]


SYNTHETIC: Mapping[str, Callable[[random.Random, int], Iterator[list[int]]]] = {
    "chats": chats,
    "documents": documents,
    "rounds": rounds,
    "shifting": shifting,
}


def synthetic(name: str, requests: int, seed: int) -> Requests:
    return dense(list(SYNTHETIC[name](random.Random(f"{seed}/{name}"), requests)))
