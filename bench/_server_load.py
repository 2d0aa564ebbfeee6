"""What servers are given to do: the same texts for all of them, and what came of each.

Invariant: a prompt's number of tokens is known before it is sent, and every server's own count is
held against it; a text's tokens are counted by the server's usage, never by pieces, since servers
put several tokens into one. Two rounds share no prompt, so that no server finds an earlier
round's in a cache.
"""

from __future__ import annotations

import asyncio
import json
import random
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import aiohttp

from bench._load import Lag, open_loop, percentile, poisson
from bench._server_process import DIALECTS, Live
from headrace_sim.trace import read_trace

REQUEST_S_MAX = 600
WORD = re.compile(r"[a-z]{3,12}")
WORDS_MIN = 500
WARM_REQUESTS = 4
_TAIL_BYTES = 2_048
_TEXT = re.compile(rb'"text": ?"[^"]')
_USAGE = {
    name: re.compile(rb'"%s": ?(\d+)' % name.encode())
    for name in ("prompt_tokens", "completion_tokens", "cached_tokens")
}


@dataclass(frozen=True)
class Workload:
    """`requests` of `prefix` shared and `prompt` own tokens in and `output` out, `streams` at once.

    With a `file` the lengths are those of a trace, divided by `divide` and at most `prompt` and
    `output`, and requests arrive by themselves, `rate` a second on average.
    """

    name: str
    streams: int = 1
    requests: int = 8
    prefix: int = 0
    prompt: int = 128
    output: int = 128
    file: str = ""
    divide: float = 8.0
    rate: float = 1.0

    @classmethod
    def parse(cls, text: str, scale: float = 1.0) -> Workload:
        """`NAME`, one of WORKLOADS, or `NAME:field=value,…`. Raises ValueError.

        `scale` goes to the number of requests, which stays at least `streams`.
        """
        name, _, options = text.partition(":")
        if name not in WORKLOADS:
            raise ValueError(f"no workload {name!r}: there are {', '.join(WORKLOADS)}")
        kinds = {f.name: type(getattr(WORKLOADS[name], f.name)) for f in fields(cls)}
        given: dict[str, Any] = {}
        for option in filter(None, options.split(",")):
            key, separator, value = option.partition("=")
            if not separator or key not in kinds:
                raise ValueError(f"{text!r}: {option!r} is not one of {', '.join(kinds)}=…")
            try:
                given[key] = kinds[key](value)
            except ValueError:
                raise ValueError(f"{text!r}: {key} is a number, not {value!r}") from None
        made = replace(WORKLOADS[name], **given)
        made = replace(made, requests=max(made.streams, round(made.requests * scale)))
        least = min(made.streams, made.requests, made.prompt, made.output)
        if least < 1 or made.prefix < 0 or min(made.rate, made.divide) <= 0:
            raise ValueError(f"{text!r}: numbers have to be positive")
        if name == "trace" and not made.file:
            raise ValueError("the workload `trace` needs a file: trace:file=PATH")
        return made

    @property
    def says(self) -> str:
        """In words, for a report."""
        if self.file:
            return (
                f"{self.requests} requests of {Path(self.file).name}'s lengths / {self.divide:g}, "
                f"{self.rate:g} a second"
            )
        shared = f"{self.prefix} shared + " if self.prefix else ""
        return (
            f"{self.requests} requests, {shared}{self.prompt} tokens in, {self.output} out, "
            f"{self.streams} at a time"
        )

    def lengths(self) -> list[tuple[int, int]]:
        """Own tokens in and out of each request. Raises TraceError."""
        if not self.file:
            return [(self.prompt, self.output)] * self.requests
        trace = read_trace(Path(self.file), self.requests)
        return [
            (
                max(1, min(self.prompt, round(r.input_tokens / self.divide))),
                max(1, min(self.output, round(r.output_tokens / self.divide))),
            )
            for r in trace.requests
        ]


WORKLOADS = {
    w.name: w
    for w in (
        Workload("unique-1", streams=1, requests=4),
        Workload("unique-8", streams=8, requests=24),
        Workload("unique-32", streams=32, requests=64),
        Workload("shared", streams=8, requests=24, prefix=1_024, prompt=32, output=32),
        Workload("cold", streams=8, requests=16, prompt=1_056, output=32),
        Workload("prefill", streams=2, requests=6, prompt=2_048, output=16),
        Workload("trace", requests=40, prompt=2_048, output=256, rate=0.5),
    )
}


@dataclass(frozen=True)
class Request:
    """A prompt as text, how many tokens it has, and how many are to come; `shares`: a prefix."""

    text: str
    prompt: int
    output: int
    shares: bool = False


@dataclass(slots=True)
class Reply:
    """What came of a Request. Instants are seconds of `time.perf_counter`.

    `gaps_s`: between pieces of text as they arrived. `failed` says why, if it did.
    """

    request: Request
    sent_s: float
    first_s: float = 0.0
    last_s: float = 0.0
    end_s: float = 0.0
    gaps_s: list[float] = field(default_factory=list)
    prompt_tokens: int = 0
    tokens: int = 0
    cached_tokens: int = 0
    failed: str = ""


class Words:
    """Texts of an exact number of tokens: words that are one token each, after a space."""

    def __init__(self, encode: Callable[[str], Sequence[int]], vocabulary: Sequence[str]) -> None:
        """`encode` adds no special tokens. Raises ValueError where there are few words."""
        plain = sorted({word.lstrip("Ġ▁") for word in vocabulary if word[:1] in "Ġ▁"})
        words = [word for word in plain if WORD.fullmatch(word)]
        self._words = [f" {word}" for word in words if len(encode(f" {word}")) == 1]
        self._encode = encode
        if len(self._words) < WORDS_MIN:
            raise ValueError(f"the tokenizer has {len(self._words)} whole words: too few for texts")

    def text(self, tokens: int, dice: random.Random) -> str:
        made = "".join(dice.choices(self._words, k=tokens))
        count = len(self._encode(made))
        if count != tokens:
            raise ValueError(f"a text of {tokens} words has {count} tokens")
        return made


def requests_of(workload: Workload, words: Words, seed: str) -> list[Request]:
    """The same for the same seed."""
    dice = random.Random(f"{seed}/{workload.name}")
    prefix = words.text(workload.prefix, dice) if workload.prefix else ""
    return [
        Request(prefix + words.text(own, dice), workload.prefix + own, output, bool(prefix))
        for own, output in workload.lengths()
    ]


def body(live: Live, request: Request) -> bytes:
    """What is posted, in the server's dialect."""
    theirs = {
        "ignore_eos": True,
        "min_tokens": request.output,
        "n_predict": request.output,
        "cache_prompt": request.shares,
    }
    fields = {
        "model": live.model,
        "prompt": request.text,
        "max_tokens": request.output,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    return json.dumps(fields | {name: theirs[name] for name in DIALECTS[live.dialect]}).encode()


async def send(session: aiohttp.ClientSession, live: Live, request: Request) -> Reply:
    """One request to its end. Never raises for what a server did."""
    data, reply = body(live, request), Reply(request, time.perf_counter())
    try:
        async with session.post(f"{live.url}/v1/completions", data=data) as got:
            if got.status == 200:
                await _read(got, reply)
            else:
                reply.failed = f"{got.status}: {(await got.text())[:200]}"
    except (aiohttp.ClientError, OSError, TimeoutError) as error:
        reply.failed = f"{type(error).__name__}: {error}"
    reply.end_s = time.perf_counter()
    return reply


async def _read(got: aiohttp.ClientResponse, reply: Reply) -> None:
    tail = left = b""
    async for data in got.content.iter_any():
        now = time.perf_counter()
        whole, _, left = (left + data).rpartition(b"\n")
        pieces = len(_TEXT.findall(whole))
        if pieces:
            if reply.first_s:
                reply.gaps_s += [now - reply.last_s, *[0.0] * (pieces - 1)]
            else:
                reply.first_s = now
                reply.gaps_s += [0.0] * (pieces - 1)
            reply.last_s = now
        tail = (tail + data)[-_TAIL_BYTES:]
    found = {name: [int(n) for n in pattern.findall(tail)] for name, pattern in _USAGE.items()}
    reply.prompt_tokens, reply.tokens, reply.cached_tokens = (
        values[-1] if values else 0 for values in found.values()
    )
    if not reply.first_s or not reply.tokens:
        reply.failed = f"no text, or no usage at its end: {tail[-200:].decode(errors='replace')}"
    elif reply.tokens != reply.request.output:
        reply.failed = f"{reply.tokens} tokens came, not {reply.request.output}"


async def play(
    live: Live, workload: Workload, requests: Sequence[Request], seed: str, lag: Lag
) -> list[Reply]:
    """All requests to their ends, in the workload's manner."""
    timeout = aiohttp.ClientTimeout(total=REQUEST_S_MAX)
    headers = {"content-type": "application/json"}
    # a connection each: one that is kept may be closed by the server as it is used again
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    async with aiohttp.ClientSession(
        connector=connector, timeout=timeout, headers=headers
    ) as session:
        if workload.file:
            dice = random.Random(f"{seed}/{workload.name}/arrivals")
            instants = poisson(workload.rate, float("inf"), dice)
            plan = zip(instants, requests, strict=False)
            tasks = await open_loop(plan, lambda request: send(session, live, request), lag)
            return list(await asyncio.gather(*tasks))
        waiting = iter(requests)
        found: list[Reply] = []

        async def stream(mine: Iterator[Request]) -> None:
            for request in mine:
                found.append(await send(session, live, request))

        await asyncio.gather(*(stream(waiting) for _ in range(workload.streams)))
        return found


def warm_up(words: Words, seed: str) -> tuple[Workload, list[Request]]:
    """A few requests that do not count: first steps of a process are slow."""
    small = Workload("warm-up", streams=2, requests=WARM_REQUESTS, prompt=64, output=16)
    return small, requests_of(small, words, seed)


def figures(replies: Sequence[Reply], lag: Lag) -> dict[str, float]:
    """Numbers of one workload on one server; failed requests only count as such.

    `took_s` is from the first request's sending to the last one's end.
    """
    good = [reply for reply in replies if not reply.failed]
    found: dict[str, float] = {"requests": len(replies), "failed": len(replies) - len(good)}
    if lag.values:
        found["lag_p99_ms"] = percentile(lag.values, 99)
    if not good:
        return found
    took_s = max(r.end_s for r in good) - min(r.sent_s for r in good)
    tokens = sum(r.tokens for r in good)
    ttft = [(r.first_s - r.sent_s) * 1000 for r in good]
    gaps = [gap * 1000 for r in good for gap in r.gaps_s]
    spans = [(r.last_s - r.first_s, r.tokens - 1) for r in good if r.tokens > 1]
    found |= {
        "took_s": took_s,
        "output_tokens": tokens,
        "prompt_tokens": sum(r.prompt_tokens for r in good),
        "cached_tokens": sum(r.cached_tokens for r in good),
        "prompt_tokens_off": sum(abs(r.prompt_tokens - r.request.prompt) for r in good),
        "output_tok_s": tokens / took_s,
        "all_tok_s": sum(r.prompt_tokens + r.tokens for r in good) / took_s,
        "ttft_p50_ms": percentile(ttft, 50),
        "ttft_p99_ms": percentile(ttft, 99),
        "tokens_per_piece": tokens / sum(len(r.gaps_s) + 1 for r in good),
    }
    if gaps:
        found["itl_p50_ms"], found["itl_p99_ms"] = percentile(gaps, 50), percentile(gaps, 99)
    if spans:
        found["itl_mean_ms"] = 1000 * sum(s for s, _ in spans) / sum(n for _, n in spans)
    return found
