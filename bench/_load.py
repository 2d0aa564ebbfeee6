"""A light load generator: one process, one event loop, answers scanned as bytes.

It shares the cores with what it measures, so an answer's text is never parsed: the first `data:`
is the first token, the last bytes tell how it ended, and the tokens are counted from the usage.
`Lag` says how late requests were sent, which is what the generator adds to every figure.
"""

from __future__ import annotations

import asyncio
import json
import math
import random
import re
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp

_USAGE = re.compile(rb'"completion_tokens": ?(\d+)')
_FINISH = re.compile(rb'"finish_reason": ?"(\w+)"')
_CODE = re.compile(rb'"code": ?"(\w+)"')
_TAIL_BYTES = 2_048
TIERS = ("priority", "default", "flex")
BANDS = ("interactive", "standard", "batch")
COMPLETE = (b"length", b"stop")


@dataclass(frozen=True, slots=True)
class Ask:
    """One request: `prompt` tokens of its own, `output` tokens, by Band and API key."""

    prompt: int
    output: int
    band: int = 1
    key: str = ""
    gateway: int = 0


@dataclass(slots=True)
class Answer:
    """What came of an Ask. Instants are seconds of `time.perf_counter`.

    `status` 0: the connection broke. `how`: the finish reason, or the error's code.
    """

    ask: Ask
    sent_s: float
    status: int = 0
    head_s: float = 0.0
    first_s: float = 0.0
    end_s: float = 0.0
    tokens: int = 0
    how: str = ""
    retry_after_ms: int = 0
    complete: bool = False

    @property
    def ttft_ms(self) -> float:
        return (self.first_s - self.sent_s) * 1000

    @property
    def refused(self) -> bool:
        return self.status in (429, 503)

    @property
    def admitted(self) -> bool:
        return self.status == 200


Watch = Callable[[int], None]
"""Told of output as it comes: so many more pieces of text, which are about as many tokens."""


@dataclass(slots=True)
class Client:
    """Sends Asks to gateways; use it as a context manager."""

    urls: Sequence[str]
    model: str
    seed: int = 1
    _dice: random.Random = field(init=False)
    _session: aiohttp.ClientSession | None = None

    def __post_init__(self) -> None:
        self._dice = random.Random(self.seed)

    async def __aenter__(self) -> Client:
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=None)
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._session is not None
        await self._session.close()

    def body(self, ask: Ask) -> bytes:
        """Random tokens: no two prompts share a block."""
        prompt = [self._dice.randrange(100, 40_000) for _ in range(ask.prompt)]
        return json.dumps(
            {
                "model": self.model,
                "prompt": prompt,
                "max_tokens": ask.output,
                "temperature": 0,
                "ignore_eos": True,
                "stream": True,
                "stream_options": {"include_usage": True},
                "service_tier": TIERS[ask.band],
            }
        ).encode()

    async def send(
        self, ask: Ask, watch: Watch | None = None, answer: Answer | None = None
    ) -> Answer:
        """One request to its end. Never raises for what a service did.

        Who wants to look at it while it is under way gives the `answer` that is filled in.
        """
        assert self._session is not None
        body = self.body(ask)
        headers = {"content-type": "application/json"}
        if ask.key:
            headers["authorization"] = f"Bearer {ask.key}"
        url = f"{self.urls[ask.gateway]}/v1/completions"
        answer = answer or Answer(ask, 0.0)
        answer.sent_s = time.perf_counter()
        try:
            async with self._session.post(url, data=body, headers=headers) as got:
                answer.head_s = time.perf_counter()
                answer.status = got.status
                if got.status == 200:
                    await self._read(got, answer, watch)
                else:
                    answer.retry_after_ms = int(got.headers.get("retry-after-ms", 0))
                    code = _CODE.search(await got.read())
                    answer.how = code[1].decode() if code else ""
        except (aiohttp.ClientError, OSError) as error:
            answer.how = type(error).__name__
        answer.end_s = time.perf_counter()
        return answer

    async def _read(self, got: aiohttp.ClientResponse, answer: Answer, watch: Watch | None) -> None:
        tail = b""
        async for data in got.content.iter_any():
            pieces = data.count(b"data: {")  # comments begin with a colon
            if pieces:
                if not answer.first_s:
                    answer.first_s = time.perf_counter()
                if watch is not None:
                    watch(pieces)
            tail = (tail + data)[-_TAIL_BYTES:]
        usage, finish, code = (find.search(tail) for find in (_USAGE, _FINISH, _CODE))
        answer.tokens = int(usage[1]) if usage else 0
        answer.how = (finish or code or [b"", b"cut off"])[1].decode()
        ended = b"data: [DONE]" in tail and finish is not None and finish[1] in COMPLETE
        answer.complete = ended and answer.tokens == answer.ask.output


@dataclass(slots=True)
class Lag:
    """How late the generator sent its requests, in ms."""

    values: list[float] = field(default_factory=list)


def poisson(rate: float, duration_s: float, dice: random.Random) -> Iterable[float]:
    """Instants of a Poisson process, in seconds from its start."""
    at = dice.expovariate(rate)
    while at < duration_s:
        yield at
        at += dice.expovariate(rate)


async def open_loop(
    plan: Iterable[tuple[float, Ask]], send: Callable[[Ask], Coroutine[Any, Any, Answer]], lag: Lag
) -> list[asyncio.Task[Answer]]:
    """Sends each Ask at its instant, whatever became of those before; the tasks, all started."""
    began = time.perf_counter()
    tasks = []
    for at_s, ask in plan:
        late_s = time.perf_counter() - began - at_s
        if late_s < 0:
            await asyncio.sleep(-late_s)
            late_s = time.perf_counter() - began - at_s
        lag.values.append(late_s * 1000)
        tasks.append(asyncio.create_task(send(ask)))
    return tasks


async def closed_loop(
    streams: int,
    asks: Callable[[], Ask],
    send: Callable[[Ask], Awaitable[Answer]],
    duration_s: float,
) -> list[Answer]:
    """`streams` clients, each sends its next Ask when the last one ended, for `duration_s`.

    What is under way then is waited for.
    """
    end_s = time.perf_counter() + duration_s
    answers: list[Answer] = []

    async def client() -> None:
        while time.perf_counter() < end_s:
            answer = await send(asks())
            answers.append(answer)
            if not answer.admitted:
                await asyncio.sleep(max(0.25, answer.retry_after_ms / 1000))

    await asyncio.gather(*(client() for _ in range(streams)))
    return answers


def percentile(values: Iterable[float], percent: float) -> float:
    """The nearest rank; NaN of nothing."""
    ordered = sorted(values)
    if not ordered:
        return math.nan
    return ordered[max(0, math.ceil(percent / 100 * len(ordered)) - 1)]


def spread(values: Iterable[float]) -> dict[str, float]:
    """Count, mean, p50, p99."""
    kept = list(values)
    return {
        "count": len(kept),
        "mean": sum(kept) / len(kept) if kept else math.nan,
        "p50": percentile(kept, 50),
        "p99": percentile(kept, 99),
    }


def run(main: Coroutine[Any, Any, Any]) -> Any:
    """`asyncio.run`, on uvloop: the generator takes less of the cores it shares."""
    try:
        import uvloop
    except ImportError:
        return asyncio.run(main)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(main)


def parse_shape(text: str) -> tuple[int, int]:
    """`96:8` is a prompt of 96 tokens and 8 of output."""
    prompt, _, output = text.partition(":")
    if not (prompt.isdigit() and output.isdigit() and int(prompt) and int(output)):
        raise SystemExit(f"{text!r} is not a shape: write it like 96:8")
    return int(prompt), int(output)
