"""Builders for tests of the API: a small model record, a scripted fleet, a running gateway.

`ScriptedFleet` is a whole implementation of the seam between API and fleet, without Redis: each
job plays the script that its test wrote for it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from functools import cache

import aiohttp
from aiohttp import web
from openai import AsyncOpenAI
from opentelemetry.trace import Span
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from headrace.clock import Clock, SystemClock
from headrace.errors import HeadraceError, NotFoundError
from headrace.streams import connect
from headrace.types import (
    NO_LOGPROBS,
    Finish,
    FinishReason,
    Job,
    ModelRecord,
    Sampling,
    TokenLogprobs,
)
from headrace_gateway.api.context import GATEWAY, Gateway
from headrace_gateway.app import make_app, make_runner
from headrace_gateway.generation import Chunk, Standing
from headrace_gateway.limits import Limiter
from headrace_gateway.policy.admission import Admission, Ask
from headrace_gateway.policy.lengths import Lengths
from headrace_gateway.settings import GatewaySettings
from headrace_gateway.tenants import load_tenants

MODEL = "tiny"
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CORPUS = (
    "the quick brown fox jumps over the lazy dog and says hello to the world again and again",
    "a headrace is the channel that leads water to a mill; it admits, steers and never spills",
)


@cache
def tiny_tokenizer() -> Tokenizer:
    """A byte-level BPE with chat tokens, trained here on two sentences."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens([AddedToken("<plain ñ>", normalized=False)])
    return tokenizer


def make_record(
    name: str = MODEL,
    *,
    context_tokens: int = 2_000,
    chat_template: str = CHATML,
    tokenizer: Tokenizer | None = None,
    add_bos: bool = False,
) -> ModelRecord:
    tokenizer = tokenizer or tiny_tokenizer()
    return ModelRecord(
        name=name,
        fingerprint=f"fingerprint-of-{name}",
        architecture="llama",
        context_tokens=context_tokens,
        vocab_size=tokenizer.get_vocab_size(),
        eos_token_ids=(2,),
        add_bos=add_bos,
        bos_token_id=0,
        chat_template=chat_template,
        template_tokens={"bos_token": "<|endoftext|>", "eos_token": "<|im_end|>"},
        tokenizer_json=tokenizer.to_str().encode(),
    )


Step = Chunk | asyncio.Event | Exception
"""What a scripted generation does next: deliver, wait until the test says so, or fail."""

Script = Callable[[Job], Sequence[Step]]


def encode(text: str) -> list[int]:
    ids: list[int] = tiny_tokenizer().encode(text, add_special_tokens=False).ids
    return ids


def say(
    text: str, *, per_chunk: int = 1, reason: FinishReason = FinishReason.STOP, cached: int = 0
) -> list[Step]:
    """Steps that deliver `text`, the end-of-turn token after it, and the finish."""
    tokens = [*encode(text), *([2] if reason is FinishReason.STOP else [])]
    chunks = [tuple(tokens[at : at + per_chunk]) for at in range(0, len(tokens), per_chunk)]
    return [
        *(Chunk(chunk, None, cached) for chunk in chunks[:-1]),
        Chunk(chunks[-1], Finish(reason), cached),
    ]


def queued(place: int, start_ms: int = 0, at_ms: int = 0) -> Chunk:
    """A step that tells of the queue; the first of a script may. `start_ms` is wall-clock time."""
    return Chunk((), None, standing=Standing(place, start_ms, at_ms))


HANDED_OFF = queued(0)


def logprobs_of(token: int, top: int) -> TokenLogprobs:
    """What the scripted engine reports of `token`: always the second most probable one."""
    own, vocab = -1 - token / 1_000, tiny_tokenizer().get_vocab_size()
    others = [((token + 1) % vocab, -0.5), (token, own)]
    others += [((token + 1 + at) % vocab, own - at) for at in range(1, top)]
    return TokenLogprobs(own, tuple(others[:top]))


def scored(job: Job, steps: Sequence[Step]) -> list[Step]:
    """`steps` with the logprobs that `job` asks for, as an engine adds them.

    A job of no output tokens ends at once, whatever `steps` say.
    """
    sampling: Sampling = job.sampling
    if sampling.max_tokens == 0:
        steps = [Chunk((), Finish(FinishReason.LENGTH))]
    made = list(steps)
    if sampling.logprobs != NO_LOGPROBS:
        made = [
            replace(s, logprobs=tuple(logprobs_of(t, sampling.logprobs) for t in s.tokens))
            if isinstance(s, Chunk)
            else s
            for s in made
        ]
    if sampling.prompt_logprobs != NO_LOGPROBS:
        found = tuple(logprobs_of(t, sampling.prompt_logprobs) for t in job.prompt[1:])
        at, first = next(
            (at, s) for at, s in enumerate(made) if isinstance(s, Chunk) and s.standing is None
        )
        made[at] = replace(first, prompt_logprobs=found)
    return made


@dataclass
class ScriptedGeneration:
    job: Job
    steps: list[Step]
    fleet: ScriptedFleet
    cancelled: asyncio.Event = field(default_factory=asyncio.Event)
    waiting: asyncio.Event = field(default_factory=asyncio.Event)

    async def next(self) -> Chunk:
        assert not self.cancelled.is_set(), "nobody reads a generation that was cancelled"
        while True:
            step = self.steps.pop(0)
            if isinstance(step, asyncio.Event):
                self.waiting.set()
                await step.wait()
            elif isinstance(step, Exception):
                self.fleet.live.discard(self.job.id)
                raise step
            else:
                if step.finish is not None:
                    self.fleet.live.discard(self.job.id)
                return step

    async def cancel(self) -> None:
        self.fleet.live.discard(self.job.id)
        self.cancelled.set()


class ScriptedFleet:
    """Plays `script` for each job, with logprobs for those that ask for them.

    `refusal` is raised instead of accepting; `admission` is what `admit` answers. Limits of keys
    need a `limiter` that has a Redis. A job is known to be handed off at once, unless its script
    begins with its place in the queue, or `silent` says that nothing is known of that.
    """

    def __init__(self, *records: ModelRecord, script: Script | None = None) -> None:
        self.gateway_id = "gw-test"
        self.limiter = Limiter(connect("redis://nowhere.invalid"), SystemClock())
        self.admission = Admission(200, "admitted", "nothing waits")
        self.asks: list[Ask] = []
        self.learned: dict[str, Lengths] = {}
        self.records = {record.name: record for record in records or (make_record(),)}
        self.script = script or (lambda job: say("Hello, world!"))
        self.refusal: HeadraceError | None = None
        self.silent = False
        self.held = 0
        self.reason = ""
        self.generations: list[ScriptedGeneration] = []
        self.spans: list[Span] = []
        self.live: set[str] = set()
        self.submitted = asyncio.Event()

    @property
    def jobs(self) -> list[Job]:
        return [generation.job for generation in self.generations]

    def models(self) -> list[ModelRecord]:
        return list(self.records.values())

    def model(self, name: str) -> ModelRecord:
        if name not in self.records:
            raise NotFoundError(
                f"the model {name!r} does not exist", param="model", code="model_not_found"
            )
        return self.records[name]

    def ready(self) -> str:
        return self.reason

    def lengths(self, model: str) -> Lengths:
        return self.learned.setdefault(model, Lengths())

    def admit(self, model: str, ask: Ask) -> Admission:
        self.asks.append(ask)
        return self.admission

    def held_tokens(self, model: str, blocks: bytes) -> int:
        return self.held

    def calm(self, model: str) -> bool:
        return False

    def flights(self, model: str) -> None:
        """There is no other gateway."""

    async def submit(self, job: Job, span: Span) -> ScriptedGeneration:
        if self.refusal is not None:
            raise self.refusal
        assert job.id not in {known.id for known in self.jobs}, "job ids are unique for ever"
        steps = scored(job, self.script(job))
        if not (self.silent or (isinstance(steps[0], Chunk) and steps[0].standing)):
            steps.insert(0, HANDED_OFF)
        generation = ScriptedGeneration(job, steps, self)
        self.generations.append(generation)
        self.spans.append(span)
        self.live.add(job.id)
        self.submitted.set()
        return generation

    def counts(self) -> dict[str, int]:
        return {"live_generations": len(self.live)}


@dataclass
class Running:
    """A gateway that listens, and clients for it."""

    url: str
    fleet: ScriptedFleet
    gateway: Gateway
    http: aiohttp.ClientSession
    openai: AsyncOpenAI

    async def post(self, path: str, body: object, **headers: str) -> tuple[int, dict[str, object]]:
        async with self.http.post(path, json=body, headers=headers) as response:
            return response.status, await response.json()

    async def settled(self) -> None:
        """Wait until nothing is being served, and check that nothing was left behind."""
        async with asyncio.timeout(10):
            while any(self.gateway.counts()[name] for name in ("active_turns", "live_generations")):
                await asyncio.sleep(0.005)


@asynccontextmanager
async def running_gateway(
    fleet: ScriptedFleet | None = None,
    *,
    api_keys: str = "",
    api_key: str = "sk-test",
    clock: Clock | None = None,
    **settings: object,
) -> AsyncIterator[Running]:
    """The real application on a free port of this machine, in front of `fleet`."""
    fleet = fleet or ScriptedFleet()
    made = GatewaySettings(port=0, api_keys=api_keys, **settings)  # type: ignore[arg-type]
    app = make_app(made, fleet, load_tenants(api_keys), clock or SystemClock())
    runner = make_runner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    async with (
        aiohttp.ClientSession(url) as http,
        AsyncOpenAI(base_url=f"{url}/v1", api_key=api_key, max_retries=0) as openai,
    ):
        try:
            yield Running(url, fleet, app[GATEWAY], http, openai)
        finally:
            await runner.cleanup()
