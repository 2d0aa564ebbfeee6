"""A fleet of its own that serves made-up requests for a while and logs its workers' steps.

Invariant: everything that serves is real, from the client's socket to the reply stream, on the
machine and with the settings that are asked about; nothing of it outlives the command. Every few
seconds other numbers of clients ask, from one for each worker to all that the workers take, in
random order. Prompts and outputs have lengths of several magnitudes, so that steps of many
compositions are logged, and workers decode most of the time, as they do when they serve: what a
step takes depends on whether the worker beside it computes or reads memory. Rejected: the load that
will be asked about, since a model that was fitted to it is right about it whatever it says of a
step.
"""

from __future__ import annotations

import asyncio
import json
import math
import random
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import aiohttp

from headrace import embedded, keys, wire
from headrace.cli.common import CommandError
from headrace.cli.stack import Fleet, UpOptions, free_port, has_model, until_serving
from headrace.streams import as_bytes
from headrace.supervisor import Launch, Service, Supervisor

WARM_UP_S = 4.0
"""With all clients, before what counts: the first steps of a process are slow."""
PHASE_S = 6.0
"""How long so many clients ask: longer than most requests take, so that fewer means fewer."""
CLIENTS_MAX = 64
PROMPT_TOKENS = (16, 512)
OUTPUT_TOKENS = (8, 128)
"""Each magnitude as often as another."""
REFUSED_PAUSE_S = 0.25
SEED = 7


@dataclass(frozen=True, slots=True)
class Shape:
    """How many workers there are, and what they take: jobs of all of them at a time, and tokens."""

    workers: int
    clients: int
    context_tokens: int
    vocab_size: int


def options_of(
    *,
    model: str,
    workers: int,
    threads: int,
    dtype: str = "",
    quantization: str = "",
    kv_dtype: str = "",
    kv_tokens: int | None = None,
    max_jobs: int | None = None,
) -> UpOptions:
    """A fleet of workers alone, as `up` starts them; '' and None leave the choice to them."""
    return UpOptions(
        host="127.0.0.1",
        port=0,
        workers=workers,
        roles=(0, 0),
        model=model,
        model_name="",
        dtype=dtype,
        quantization=quantization,
        kv_dtype=kv_dtype,
        speculation="off",  # no cost model knows how much it guesses right
        context_tokens=None,
        tensor_parallel=1,
        pipeline_parallel=1,
        threads=threads,
        data_dir=Path(),
        redis_url="",
        api_keys="",
        otlp_endpoint="",
        kv_tokens=kv_tokens,
        max_jobs=max_jobs,
        cache_bytes=None,
        cache_disk_path=None,
        cache_disk_bytes=None,
        no_cache=True,
    )


def log_steps(options: UpOptions, seconds: float, folder: Path) -> None:
    """Serve for `seconds` as `options` say, with the workers' steps in `folder`.

    Raises HeadraceError.
    """
    has_model(options.model)
    with tempfile.TemporaryDirectory(prefix="headrace-bench-") as place:
        data = Path(place)
        options = replace(options, data_dir=data, port=free_port(options.host, 0))
        binary = embedded.server_binary()
        fleet = Fleet(options, options.served_name, embedded.redis_url(data), data, binary)
        asyncio.run(_rehearse(options, fleet, seconds, folder))


async def _rehearse(options: UpOptions, fleet: Fleet, seconds: float, folder: Path) -> None:
    extra = {"HEADRACE_STEP_LOG": str(folder), "HEADRACE_LOG_LEVEL": "warning"}
    supervisor = Supervisor([_with(service, extra) for service in fleet.services()])
    supervisor.listen_to_signals()
    done = False

    async def on_ready() -> None:
        nonlocal done
        await until_serving(options)
        load = Load(options.http_url, fleet.model, await _shape(fleet))
        await load.run(seconds)
        done = True
        supervisor.request_stop()

    try:
        await supervisor.run(on_ready)
    finally:
        await fleet.redis.aclose()
    if not done:
        raise CommandError("stopped before anything was measured")


def _with(service: Service, extra: dict[str, str]) -> Service:
    """The same service with more settings."""

    def launch() -> Launch:
        made = service.launch()
        return replace(made, env={**made.env, **extra})

    return replace(service, launch=launch)


async def _shape(fleet: Fleet) -> Shape:
    """What the workers that have joined say of themselves."""
    raw = await fleet.redis.get(keys.record(fleet.model))
    if raw is None:
        raise CommandError(f"no worker has told what {fleet.model} is")
    record = wire.decode_model(as_bytes(raw))
    cards = (await fleet.redis.hgetall(keys.workers(fleet.model))).values()
    jobs = sum(wire.decode_worker(as_bytes(card)).max_jobs for card in cards)
    clients = min(jobs, max(len(cards), CLIENTS_MAX))
    return Shape(len(cards), clients, record.context_tokens, record.vocab_size)


class Load:
    """Clients that each send their next request when the last one is answered."""

    def __init__(self, url: str, model: str, shape: Shape, seed: int = SEED) -> None:
        self._url = url
        self._model = model
        self._shape = shape
        self._dice = random.Random(seed)
        self._asking = 0
        self._changed = asyncio.Condition()

    async def run(self, seconds: float) -> None:
        """Ask for `seconds` after warming up. Raises CommandError when nothing is answered."""
        async with aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=None)
        ) as session:
            clients = [
                asyncio.create_task(self._client(session, n)) for n in range(self._shape.clients)
            ]
            try:
                await self._change(self._shape.clients, WARM_UP_S)
                end_s = time.monotonic() + seconds
                while time.monotonic() < end_s:
                    for count in self._dice.sample(self.phases(), len(self.phases())):
                        await self._change(count, min(PHASE_S, end_s - time.monotonic()))
                        _raise_of(clients)
            finally:
                for client in clients:
                    client.cancel()
                await asyncio.gather(*clients, return_exceptions=True)

    def phases(self) -> list[int]:
        """Numbers of clients: one for each worker, twice as many, and so on to all."""
        workers, clients = self._shape.workers, self._shape.clients
        doubled = (workers << power for power in range(clients.bit_length()))
        return [*(each for each in doubled if each < clients), clients]

    async def _change(self, count: int, pause_s: float) -> None:
        async with self._changed:
            self._asking = count
            self._changed.notify_all()
        await asyncio.sleep(max(0.0, pause_s))

    async def _client(self, session: aiohttp.ClientSession, number: int) -> None:
        while True:
            async with self._changed:
                await self._changed.wait_for(lambda: number < self._asking)
            async with session.post(
                f"{self._url}/v1/completions",
                data=self.body(),
                headers={"content-type": "application/json"},
            ) as answer:
                async for _ in answer.content.iter_any():
                    pass
                if answer.status in (429, 503):
                    await asyncio.sleep(REFUSED_PAUSE_S)
                elif answer.status != 200:
                    raise CommandError(f"a made-up request was answered with {answer.status}")

    def body(self) -> bytes:
        """A request of random tokens, which no other one shares."""
        longest = self._shape.context_tokens // 2
        prompt = self._length(*PROMPT_TOKENS, longest)
        return json.dumps(
            {
                "model": self._model,
                "prompt": [self._dice.randrange(self._shape.vocab_size) for _ in range(prompt)],
                "max_tokens": self._length(*OUTPUT_TOKENS, longest),
                "temperature": 0,
                "ignore_eos": True,
                "stream": True,
            }
        ).encode()

    def _length(self, least: int, most: int, limit: int) -> int:
        """Each magnitude as often as another."""
        drawn = math.exp(self._dice.uniform(math.log(least), math.log(most + 1)))
        return max(1, min(int(drawn), limit))


def _raise_of(clients: list[asyncio.Task[None]]) -> None:
    for client in clients:
        if client.done():
            client.result()
