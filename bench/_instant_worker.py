"""A worker whose engine answers at once: all of a real one but the model.

Consumer, engine thread and publisher are the worker's own, so what travels through Redis is what a
fleet's workers write. Each step gives every running job its next token; with `--step-ms` the steps
keep that distance, as those of a model do, so that nothing can be told in larger pieces than it is
made. `python -m bench._instant_worker` is started by `python -m bench gateway`.
"""

from __future__ import annotations

import argparse
import asyncio
import signal
import time
from dataclasses import dataclass
from typing import Any, cast

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from headrace import logs, loops, telemetry
from headrace.clock import SystemClock
from headrace.config import load_or_exit
from headrace.types import Delta, Finish, FinishReason, Job, JobProgress, ModelRecord
from headrace_worker.consumer import Consumer
from headrace_worker.engine import Engine
from headrace_worker.membership import Capacity
from headrace_worker.results import JobStory, Outlook, StepResult, StepWork
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


@dataclass(slots=True)
class _Running:
    job: Job
    made: int
    added_ns: int
    first_ns: int = 0


class InstantEngine:
    """What a Consumer needs of an Engine. `step_s`: the distance between two steps."""

    layout = b"instant"
    block_bytes = 1

    def __init__(self, step_s: float) -> None:
        self._step_s = step_s
        self._due_s = 0.0
        self._said = output(4_096)
        self._jobs: dict[str, _Running] = {}
        self._ended: list[Delta] = []
        self._stories: list[JobStory] = []

    @property
    def has_work(self) -> bool:
        return bool(self._jobs or self._ended)

    def counts(self) -> tuple[int, int, int]:
        return len(self._jobs), 0, KV_TOKENS

    def outlook(self) -> Outlook:
        return Outlook()

    def refuse(self, job: Job) -> str | None:
        return "too long" if job.sampling.max_tokens > len(self._said) else None

    def add(self, job: Job, *_: object) -> None:
        self._jobs[job.id] = _Running(job, len(job.logged), time.time_ns())

    def cancel(self, job_id: str) -> bool:
        running = self._jobs.get(job_id)
        if running is not None:
            delta = Delta(job_id, running.job.attempt, running.made)
            self._end(running, delta, FinishReason.CANCELLED)
        return running is not None

    def abort_all(self) -> None:
        self._jobs.clear()
        self._ended.clear()
        self._stories.clear()

    def check_integrity(self) -> None:
        """There is nothing that could leak."""

    def step(self) -> StepResult:
        self._wait()
        began_ns = time.time_ns()
        for running in list(self._jobs.values()):
            job, at = running.job, running.made
            running.made += 1
            running.first_ns = running.first_ns or began_ns
            delta = Delta(job.id, job.attempt, at, (self._said[at],))
            if running.made == job.sampling.max_tokens:
                self._end(running, delta, FinishReason.LENGTH)
            else:
                self._ended.append(delta)
        deltas, self._ended = self._ended, []
        stories, self._stories = self._stories, []
        work = StepWork(
            moved=tuple(_progress(running) for running in self._jobs.values()),
            busy_ns=time.time_ns() - began_ns,
            output_tokens=len(deltas),
        )
        return StepResult(deltas, [], stories, work)

    def _wait(self) -> None:
        """For the next step's time; the first one after a pause comes at once."""
        now_s = time.perf_counter()
        if now_s < self._due_s:
            time.sleep(self._due_s - now_s)
        self._due_s = max(self._due_s, now_s - self._step_s) + self._step_s

    def _end(self, running: _Running, delta: Delta, reason: FinishReason) -> None:
        job = running.job
        del self._jobs[job.id]
        self._ended.append(Delta(job.id, job.attempt, delta.first, delta.tokens, Finish(reason)))
        now_ns = time.time_ns()
        self._stories.append(
            JobStory(
                job=job.id,
                attempt=job.attempt,
                reason=reason,
                progress=_progress(running),
                added_ns=running.added_ns,
                scheduled_ns=running.added_ns,
                first_token_ns=running.first_ns,
                finished_ns=now_ns,
                chunks=(),
                preemptions=0,
                cached_local=0,
                cached_imported=0,
                output_tokens=running.made,
            )
        )


def _progress(running: _Running) -> JobProgress:
    return JobProgress(running.job.id, len(running.job.prompt), 0, running.made)


async def serve(settings: WorkerSettings, step_s: float) -> None:
    engine: Any = InstantEngine(step_s)
    capacity = Capacity(KV_TOKENS, JOBS_MAX)
    consumer = Consumer(
        settings, cast(Engine, engine), record(), capacity, SystemClock(), None, threads=1
    )
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, consumer.drain)
    await consumer.run()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--step-ms", type=float, default=0.0)
    args = parser.parse_args()
    settings = load_or_exit(WorkerSettings)
    logs.setup("worker", level=settings.log_level, json=settings.log_json)
    telemetry.setup("worker", settings.otlp_endpoint, settings.worker_id)
    loops.run(serve(settings, args.step_ms / 1000))


if __name__ == "__main__":
    main()
