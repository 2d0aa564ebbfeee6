"""A worker that answers at once, in one loop: what a fleet's workers write, and nothing between.

Jobs are read, and tokens and ends are written, by the worker's own parts, so what travels through
Redis is the same; but there is no engine and no thread that steps one, so that what is measured is
the way to a worker and back. Each step gives every running job its next token; with `--step-ms` the
steps keep that distance, as those of a model do, so that nothing can be told in larger pieces than
it is made. What comes while nothing runs is answered before it is looked at any closer, so that the
time to a first token is not this worker's. `python -m bench gateway` starts it;
`_instant_engine.py` is the same behind all that a worker has.
"""

from __future__ import annotations

import argparse
import asyncio
import signal
from typing import Any

from redis.asyncio import Redis
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from headrace import keys, loops, wire
from headrace.clock import SystemClock
from headrace.config import load_or_exit
from headrace.garbage import settle_memory
from headrace.streams import Tail, connect, link_of
from headrace.types import (
    Delta,
    Finish,
    FinishReason,
    Job,
    JobProgress,
    ModelRecord,
    Progress,
    WorkerState,
    WorkerStatus,
)
from headrace.wire_reports import encode_progress
from headrace_worker.membership import Capacity, Membership
from headrace_worker.publisher import Addressed, Delivery, Publisher
from headrace_worker.settings import WorkerSettings

MODEL = "instant"
VOCABULARY = 600
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEXT = (
    "A headrace is the channel that leads water to the wheels of a mill. It admits, it steers and "
    "it never spills: a gate at its head decides how much of the river may enter, and what does "
    "not fit stays outside. Who waits is told how long. When a wheel breaks, the water finds its "
    "way to the others, and not a drop of it is lost. "
)
KV_TOKENS = 4_000_000
JOBS_MAX = 1_024
SAID_MAX = 4_096
"""Tokens that a job may ask for."""
AHEAD_MAX = 1_024
"""Steps that Redis does not have yet: as many as a real worker runs ahead."""
REPORT_S = 0.25
BEATS_A_LEASE = 3


def tokenizer() -> Tokenizer:
    """A byte-level BPE, trained here on a few sentences: the same in every process."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=list(SPECIAL),
        show_progress=False,
    )
    made.train_from_iterator([TEXT], trainer)
    return made


def record() -> ModelRecord:
    made = tokenizer()
    return ModelRecord(
        name=MODEL,
        fingerprint="instant",
        architecture="llama",
        context_tokens=32_768,
        vocab_size=made.get_vocab_size(),
        eos_token_ids=(2,),
        add_bos=False,
        bos_token_id=0,
        chat_template=TEMPLATE,
        template_tokens={"bos_token": SPECIAL[0], "eos_token": SPECIAL[2]},
        tokenizer_json=made.to_str().encode(),
    )


def output(tokens: int) -> list[int]:
    """What every job says: TEXT, again and again."""
    ids: list[int] = tokenizer().encode(TEXT, add_special_tokens=False).ids
    return (ids * (tokens // len(ids) + 1))[:tokens]


class _Running:
    """A job as it was read: what its first token needs, and the rest once it is asked for."""

    __slots__ = ("_data", "_entry", "_job", "attempt", "gateway", "id", "made", "tokens_max")

    def __init__(self, data: bytes, entry: str) -> None:
        fields = wire.Fields("job", data)
        self.id, self.gateway = fields.get("id", str), fields.get("gateway", str)
        self.attempt, self.tokens_max = fields.get("attempt", int), fields.get("max", int)
        self.made = len(fields.get("logged", bytes)) // wire.TOKEN_BYTES
        self._data, self._entry = data, entry
        self._job: tuple[Job, Delivery] | None = None

    def whole(self, worker: str) -> tuple[Job, Delivery]:
        if self._job is None:
            job = wire.decode_job(self._data)
            to = Delivery(job.id, worker, self._entry, job.gateway, job.attempt, job.cost_tokens)
            self._job = job, to
        return self._job


class InstantWorker:
    """`step_s`: the distance between two steps; 0: each when the last one was handed over."""

    def __init__(self, settings: WorkerSettings, step_s: float) -> None:
        self._settings = settings
        self._step_s = step_s
        self._redis: Redis = connect(settings.redis_url)
        self._member = Membership(
            self._redis,
            record(),
            settings.worker_id,
            Capacity(KV_TOKENS, JOBS_MAX),
            settings.lease_ms,
            SystemClock(),
        )
        self._publisher = Publisher(self._redis, MODEL, self._note_sent)
        self._said = output(SAID_MAX)
        self._jobs: dict[str, _Running] = {}
        self._stop = asyncio.Event()
        self._stepping = False
        self._ahead = 0
        self._due_s = 0.0
        self._made = self._steps = self._reports = 0

    def stop(self) -> None:
        self._stop.set()

    async def run(self) -> None:
        """Serve until told to stop."""
        if not await self._member.join(self._status()):
            raise SystemExit(f"the id {self._member.id!r} was used before")
        parts = [self._read(), self._publisher.run(), self._beat(), self._report()]
        tasks = [asyncio.create_task(part) for part in parts]
        stopped = asyncio.create_task(self._stop.wait())
        await asyncio.wait([*tasks, stopped], return_when=asyncio.FIRST_COMPLETED)
        failed = [task.exception() for task in tasks if task.done()]
        for task in (*tasks, stopped):
            task.cancel()
        await asyncio.gather(*tasks, stopped, return_exceptions=True)
        await self._member.leave()
        await self._redis.aclose()
        if failed:
            raise RuntimeError("a part of this worker ended") from failed[0]

    def _status(self) -> WorkerStatus:
        return WorkerStatus(WorkerState.READY, len(self._jobs), 0, KV_TOKENS, self._steps)

    async def _beat(self) -> None:
        while await self._member.beat(self._status()):
            await asyncio.sleep(self._settings.lease_ms / 1000 / BEATS_A_LEASE)

    async def _report(self) -> None:
        """Tells the dispatcher that tokens are made, as workers do."""
        while True:
            await asyncio.sleep(REPORT_S)
            made, self._made = self._made, 0
            if not made:
                continue
            self._reports += 1
            told = encode_progress(
                Progress(self._member.id, self._reports, busy_ms=1, output_tokens=made)
            )
            await self._redis.xadd(keys.events(MODEL), {"e": told}, maxlen=keys.EVENTS_MAX)

    async def _read(self) -> None:
        stream = keys.jobs(MODEL, self._member.id)
        tail = Tail(self._settings.redis_url, stream)
        try:
            async for entries in tail:
                for entry in entries:
                    if entry.kind == "job":
                        self._take(_Running(entry.data, entry.id))
                        continue
                    if entry.kind == "cancel":
                        self._cancel(entry.data.decode())
                    await self._redis.xdel(stream, entry.id)
                if self._jobs and not self._stepping:
                    self._due_s = asyncio.get_running_loop().time()
                    self._begin()
        finally:
            await tail.close()

    def _take(self, running: _Running) -> None:
        assert running.tokens_max <= len(self._said), "who asks for this is the benchmark"
        self._jobs[running.id] = running

    def _begin(self) -> None:
        """The first step after a pause: straight to Redis, where no job ends with it."""
        link, running = link_of(self._redis), list(self._jobs.values())
        if not link.is_open or any(each.made + 1 >= each.tokens_max for each in running):
            self._step()
            return
        frames: dict[str, list[Delta]] = {}
        for each in running:
            delta = Delta(each.id, each.attempt, each.made, (self._said[each.made],))
            frames.setdefault(each.gateway, []).append(delta)
        told = link.send(
            [
                ("XADD", keys.replies(MODEL, gateway), "*", "d", wire.encode_deltas(frame))
                for gateway, frame in frames.items()
            ]
        )
        told.add_done_callback(_check)
        for each in running:
            each.made += 1
        self._steps += 1
        self._made += len(running)
        self._stepping = True
        self._step_later()

    def _cancel(self, job_id: str) -> None:
        running = self._jobs.pop(job_id, None)
        if running is not None:
            end = _end(running, (), FinishReason.CANCELLED, self._member.id)
            self._publisher.put([end], steps=0)

    def _step(self) -> None:
        """The next token of every job, and the next step's time."""
        step: list[Addressed] = []
        for job_id, running in list(self._jobs.items()):
            token = (self._said[running.made],)
            running.made += 1
            if running.made == running.tokens_max:
                del self._jobs[job_id]
                step.append(_end(running, token, FinishReason.LENGTH, self._member.id))
            else:
                delta = Delta(job_id, running.attempt, running.made - 1, token)
                step.append(Addressed(delta, running.whole(self._member.id)[1]))
        self._steps += 1
        self._made += len(step)
        if step:
            self._ahead += 1
            self._publisher.put(step, steps=1)
        self._stepping = bool(self._jobs) and self._ahead < AHEAD_MAX
        if self._stepping:
            self._step_later()

    def _step_later(self) -> None:
        loop = asyncio.get_running_loop()
        if not self._step_s:
            loop.call_soon(self._step)
            return
        # one that comes late does not move the others
        self._due_s = max(self._due_s + self._step_s, loop.time())
        loop.call_at(self._due_s, self._step)

    def _note_sent(self, steps: int) -> None:
        self._ahead -= steps
        if self._jobs and not self._stepping:
            self._step()


def _check(told: asyncio.Future[list[Any]]) -> None:
    """A benchmark without its first token would wait for it."""
    for answer in told.result():
        if isinstance(answer, Exception):
            raise answer


def _end(
    running: _Running, tokens: tuple[int, ...], reason: FinishReason, worker: str
) -> Addressed:
    """A job's last words."""
    (job, to), first = running.whole(worker), running.made - len(tokens)
    delta = Delta(job.id, job.attempt, first, tokens, Finish(reason))
    progress = JobProgress(job.id, len(job.prompt), 0, running.made)
    return Addressed(delta, to, progress)


async def serve(settings: WorkerSettings, step_s: float) -> None:
    worker = InstantWorker(settings, step_s)
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, worker.stop)
    settle_memory()
    await worker.run()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--step-ms", type=float, default=0.0)
    args = parser.parse_args()
    loops.run(serve(load_or_exit(WorkerSettings), args.step_ms / 1000))


if __name__ == "__main__":
    main()
