"""The dispatcher's speed: its pure decisions, and the real process against a Valkey.

    python -m bench dispatch [--part policy|process|both] [--json dispatch.json]

`policy`: `DispatchPolicy` with 500 workers, 1,000 tenants and 10,000 queued jobs. The fleet is kept
busy and the queue at its length: for each decision one job comes in and one ends. Counted is CPU
time of this one thread, apart for deciding and booking (`next`, `handed_off`), taking in (`push`)
and ends (`done`), without reading the clock; decisions/s means deciding and booking, `all in` all
of it. Two states of the fleet: one with some room everywhere, and one where each end frees the only
place. Then the same over queue lengths from 100 to 100,000: if a decision's cost grows
logarithmically, each row adds about the same. Each row ends with a hash of all decisions so far,
who goes where for what reason: a change of the policy that is only about speed leaves it as it was.
As in a gateway that writes no traces, garbage is collected seldom and who cannot win is not scored.

`process`: a gateway process leads and hands jobs that stand in the intake stream to scripted
workers, which finish each at once: jobs/s from intake to finish, and CPU time per job of the
gateway (which does little else here), Valkey and the script. All share this machine's cores.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import random
import time
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from redis.asyncio import Redis
from tokenizers import Tokenizer, models

from bench._fleet import Fleet
from bench._load import percentile, spread
from headrace import keys, scripts, wire, wire_reports
from headrace.garbage import settle_memory
from headrace.streams import Scripts, connect, parse_entries
from headrace.types import (
    BLOCK_KEY_BYTES,
    BLOCK_TOKENS,
    Band,
    Delta,
    Finish,
    FinishReason,
    Job,
    JobDone,
    JobProgress,
    ModelRecord,
    Progress,
    Sampling,
    WorkerRecord,
    WorkerRole,
    WorkerState,
    WorkerStatus,
    pack_tokens,
)
from headrace.wire_reports import encode_done, encode_news
from headrace_gateway.policy.dispatch import DispatchPolicy
from headrace_gateway.policy.fair_queue import Queued
from headrace_gateway.policy.workload import WorkerFacts

LENGTHS = (100, 300, 1_000, 3_000, 10_000, 30_000, 100_000)
MIX = (0.1, 0.6, 0.3)
PROMPTS = (64, 256, 512, 1_024, 2_048)
OUTPUTS = (32, 128, 256, 512)
SHARED_BLOCKS = 8
"""Of each prompt: its tenant's system prompt."""
ROOM_SHARE = 0.7
LEAD_S_MAX = 30
NOW_MS = 1_700_000_000_000


# --- the policies


@dataclass
class Clock:
    """CPU microseconds by what they were used for, without what reading the clock takes."""

    used_us: dict[str, float] = field(default_factory=dict)
    _began_ns: int = 0

    def begin(self) -> None:
        self._began_ns = time.process_time_ns()

    def end(self, what: str) -> None:
        spent = time.process_time_ns() - self._began_ns - reading_ns()
        self.used_us[what] = self.used_us.get(what, 0.0) + spent / 1000

    @contextmanager
    def on(self, what: str) -> Iterator[None]:
        self.begin()
        yield
        self.end(what)


@cache
def reading_ns() -> float:
    """What two readings of the clock in a row are apart: a system call, often a slow one."""
    apart = []
    for _ in range(1_000):
        began = time.process_time_ns()
        apart.append(time.process_time_ns() - began)
    return sorted(apart)[len(apart) // 2]


class Crowd:
    """A policy with a busy fleet and a queue that is kept at a length."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._dice = random.Random(args.seed)
        self._tenants = args.tenants
        self._prompts = {size: array("I", [7]) * size for size in PROMPTS}
        self._systems = [self._dice.randbytes(SHARED_BLOCKS * BLOCK_KEY_BYTES) for _ in range(997)]
        self._made = 0
        self.now_ms = NOW_MS
        self.policy = DispatchPolicy(explains=False)
        self._facts = [
            WorkerFacts(f"w{i}", args.kv_tokens, args.max_jobs) for i in range(args.workers)
        ]
        self.policy.set_workers(self._facts, self.now_ms)
        self.running: list[tuple[str, Job]] = []
        self.told = hashlib.blake2b(digest_size=4)
        self._slots = args.workers * args.max_jobs

    def make(self) -> Queued:
        dice = self._dice
        self._made += 1
        tenant = dice.randrange(self._tenants)
        prompt = self._prompts[dice.choice(PROMPTS)]
        own = max(0, len(prompt) // BLOCK_TOKENS - SHARED_BLOCKS)
        system = self._systems[tenant % len(self._systems)]
        blocks = system[: len(prompt) // BLOCK_TOKENS * BLOCK_KEY_BYTES]
        job = Job(
            id=f"job-{self._made}",
            model="m",
            tenant=f"t{tenant}",
            band=Band(dice.choices(range(3), MIX)[0]),
            arrived_ms=self.now_ms,
            gateway="g",
            prompt=prompt,
            sampling=Sampling(max_tokens=1_024),
            affinity=system[:16],
            weight=1.0 if tenant % 4 else 4.0,
            expected_tokens=dice.choice(OUTPUTS),
            blocks=blocks + dice.randbytes(own * BLOCK_KEY_BYTES),
        )
        return Queued(job, "intake", str(self._made), self.now_ms * 1_000_000)

    def fill(self, length: int) -> None:
        while len(self.policy.queue) < length:
            self.policy.push(self.make())

    def start_some(self, share: float) -> None:
        """Until so many of the fleet's places are taken, or nothing can go any more."""
        while len(self.running) < share * self._slots:
            self.fill(max(100, len(self.policy.queue)))
            if not self.decide(Clock()):
                return

    def decide(self, clock: Clock) -> bool:
        clock.begin()
        decision = self.policy.next(self.now_ms)
        if decision is not None:
            self.policy.handed_off(decision, self.now_ms)
        clock.end("decide")
        if decision is None:
            return False
        job, route = decision.item.job, decision.route
        self.told.update(f"{job.id} {decision.virtual!r} {route.worker} {route.reason}".encode())
        self.running.append((route.worker, job))
        return True

    def end_one(self, clock: Clock) -> None:
        place = self._dice.randrange(len(self.running))
        self.running[place], self.running[-1] = self.running[-1], self.running[place]
        worker, job = self.running.pop()
        progress = JobProgress(job.id, len(job.prompt), 0, self._dice.choice(OUTPUTS))
        done = JobDone(worker, progress, FinishReason.STOP)
        clock.begin()
        self.policy.done(done, self.now_ms)
        clock.end("end")

    def measure(self, decisions: int) -> dict[str, float]:
        """Microseconds a decision, with the queue at its length and the fleet as busy as it is."""
        clock, made, blocked = Clock(), 0, 0
        while made < decisions:
            item = self.make()
            self.now_ms += 1
            clock.begin()
            self.policy.push(item)
            clock.end("take in")
            self.end_one(clock)
            while not self.decide(clock):
                blocked += 1
                self.end_one(clock)
            made += 1
        used = {what: us / made for what, us in clock.used_us.items()}
        return used | {
            "all in": sum(used.values()),
            "per_s": 1e6 / used["decide"],
            "per_s_all_in": 1e6 / sum(used.values()),
            "blocked": blocked / made,
        }

    def chores(self) -> dict[str, float]:
        """Milliseconds of what the dispatcher does a few times a second."""
        clock = Clock()
        with clock.on("outlook"):
            self.policy.outlook(self.now_ms)
        with clock.on("places of 1,000"):
            self.policy.places(1_000, self.now_ms)
        with clock.on("set_workers"):
            self.policy.set_workers(self._facts, self.now_ms)
        with clock.on("late"):
            self.policy.late(self.now_ms)
        for what, output in (("a first report", 1), ("a report", 5)):
            raws = [wire_reports.encode_progress(each) for each in self.reports(output)]
            with clock.on(what):
                for raw in raws:
                    report = wire_reports.decode_event(raw)
                    assert isinstance(report, Progress)
                    self.policy.progress(report, self.now_ms)
            clock.used_us[what] /= max(1, len(raws))
        return {what: us / 1000 for what, us in clock.used_us.items()}

    def reports(self, output: int) -> list[Progress]:
        """Of each worker that has jobs: they have all got this far."""
        by_worker: dict[str, list[JobProgress]] = {}
        for worker, job in self.running:
            rows = by_worker.setdefault(worker, [])
            rows.append(JobProgress(job.id, len(job.prompt), 0, output))
        return [
            Progress(worker, 1, tuple(rows), self._dice.randbytes(64), b"", 250, 100, len(rows))
            for worker, rows in by_worker.items()
        ]


def policy_part(args: argparse.Namespace) -> dict[str, Any]:
    facts: dict[str, Any] = {}
    settle_memory()
    print(
        f"{args.workers} workers, {args.tenants} tenants, CPU time of one core\n"
        f"{'fleet':<8}{'queued':>8}{'decisions/s':>13}{'all in/s':>10}"
        f"{'us: decide':>12}{'take in':>9}{'end':>7}{'found no room':>15}{'hash':>10}"
    )
    for fleet, share in (("room", ROOM_SHARE), ("full", 10.0)):
        crowd = Crowd(args)
        crowd.start_some(share)
        rows: list[dict[str, Any]] = []
        for length in LENGTHS if args.table else (args.queued,):
            crowd.fill(length)
            crowd.measure(200)  # what a first look costs more
            row = crowd.measure(args.decisions) | {"queued": length, "running": len(crowd.running)}
            told = crowd.told.hexdigest()
            rows.append(row | {"hash": told})
            print(
                f"{fleet:<8}{length:>8}{row['per_s']:>13.0f}{row['per_s_all_in']:>10.0f}"
                f"{row['decide']:>12.0f}{row['take in']:>9.0f}{row['end']:>7.0f}"
                f"{row['blocked']:>15.2f}{told:>10}",
                flush=True,
            )
            if length == args.queued:
                facts["chores_ms"] = crowd.chores()
        crowd.policy.check_integrity()
        facts[fleet] = rows
    chores = ", ".join(f"{what} {ms:.2f} ms" for what, ms in facts["chores_ms"].items())
    print(
        f"beside it, with {args.queued} queued: {chores}; a report is of "
        f"{len(crowd.running) / args.workers:.0f} jobs"
    )
    return facts


# --- the process


def model_record() -> ModelRecord:
    """A model of which nobody needs anything but the name."""
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    return ModelRecord(
        name="m",
        fingerprint="f",
        architecture="llama",
        context_tokens=8_192,
        vocab_size=50_000,
        eos_token_ids=(2,),
        add_bos=False,
        bos_token_id=None,
        chat_template="",
        template_tokens={},
        tokenizer_json=tokenizer.to_str().encode(),
    )


@dataclass
class Script:
    """Workers without engines: what reaches them is finished at once."""

    redis: Redis
    count: int
    lua: Scripts = field(init=False)
    reached_s: dict[str, float] = field(default_factory=dict)
    finished: int = 0

    def __post_init__(self) -> None:
        self.lua = Scripts(self.redis)

    def names(self) -> list[str]:
        return [f"s{number}" for number in range(self.count)]

    async def announce(self) -> None:
        """The model is known, nobody serves it yet."""
        record = model_record()
        await self.redis.set(keys.record(record.name), wire.encode_model(record))
        await self.redis.hset(keys.MODELS, record.name, record.fingerprint)

    async def join(self) -> None:
        now = int(time.time() * 1000)
        status = wire_reports.encode_status(WorkerStatus(WorkerState.READY, 0, 0, 1_000_000, 0))
        pipe = self.redis.pipeline(transaction=False)
        for name in self.names():
            card = WorkerRecord(name, "m", WorkerRole.BOTH, "here", 1, 1_000_000, 64, now)
            pipe.hset(keys.workers("m"), name, wire.encode_worker(card))
            pipe.set(keys.status("m", name), status, px=3_600_000)
            pipe.set(keys.lease("m", name), 1, px=3_600_000)
        pipe.xadd(keys.events("m"), {"e": encode_news("join", "s0")})
        await pipe.execute()

    async def work(self, until: int) -> None:
        """Finish jobs until `until` of them are."""
        after = {keys.jobs("m", name): "0-0" for name in self.names()}
        sha = self.lua.sha(scripts.FINISH)
        await self.redis.script_load(scripts.FINISH)
        quiet_since = time.monotonic()
        while self.finished < until:
            if time.monotonic() > quiet_since + LEAD_S_MAX:
                raise SystemExit(f"only {self.finished} of {until} jobs reached a worker")
            answer: Any = await self.redis.xread(after, count=64, block=1_000)
            pipe = self.redis.pipeline(transaction=False)
            pages = answer.items() if isinstance(answer, dict) else (answer or ())
            for raw, rows in pages:
                stream = raw.decode()
                nested = rows and isinstance(rows[0], list) and isinstance(rows[0][0], list | tuple)
                entries = parse_entries(rows[0] if nested else rows)
                after[stream] = entries[-1].id
                for entry in entries:
                    self.finish(pipe, sha, stream, entry.id, wire.decode_job(entry.data))
            if len(pipe.command_stack):
                self.finished += sum(map(int, await pipe.execute()))
                quiet_since = time.monotonic()

    def finish(self, pipe: Any, sha: str, stream: str, entry: str, job: Job) -> None:
        self.reached_s[job.id] = time.perf_counter()
        worker = stream.rpartition(":")[2]
        progress = JobProgress(job.id, len(job.prompt), 0, 1)
        delta = Delta(job.id, job.attempt, 0, (5,), Finish(FinishReason.STOP))
        names = [
            keys.job("m", job.id), stream, keys.load("m", worker), keys.replies("m", job.gateway),
            keys.events("m"), keys.lease("m", worker),
        ]  # fmt: skip
        values = [
            job.attempt, entry, wire.encode_deltas([delta]), job.cost_tokens, keys.JOB_LINGER_MS,
            keys.REPLIES_TTL_MS, encode_done(JobDone(worker, progress, FinishReason.STOP)),
        ]  # fmt: skip
        pipe.evalsha(sha, len(names), *names, *values)


async def accept(redis: Redis, jobs: list[Job]) -> None:
    lua = Scripts(redis)
    await redis.script_load(scripts.ACCEPT)
    sha = lua.sha(scripts.ACCEPT)
    for start in range(0, len(jobs), 500):
        pipe = redis.pipeline(transaction=False)
        for job in jobs[start : start + 500]:
            names = [keys.job("m", job.id), keys.intake("m")]
            pipe.evalsha(sha, 2, *names, wire.encode_job(job), keys.JOB_TTL_MS, job.attempt)
        await pipe.execute()


def jobs_of(prefix: str, count: int, tenants: int, dice: random.Random) -> list[Job]:
    now = int(time.time() * 1000)
    return [
        Job(
            id=f"{prefix}-{number}",
            model="m",
            tenant=f"t{dice.randrange(tenants)}",
            band=Band(dice.choices(range(3), MIX)[0]),
            arrived_ms=now,
            gateway="nobody",
            prompt=pack_tokens(range(256)),
            sampling=Sampling(max_tokens=64),
            affinity=dice.randbytes(8),
            expected_tokens=64,
            blocks=dice.randbytes(15 * BLOCK_KEY_BYTES),
        )
        for number in range(count)
    ]


async def process_part(fleet: Fleet, args: argparse.Namespace) -> dict[str, Any]:
    dice = random.Random(args.seed)
    redis = connect(fleet.redis_url)
    script = Script(redis, args.scripted)
    try:
        await script.announce()
        await accept(redis, jobs_of("backlog", args.jobs, args.tenants, dice))
        await until_led(fleet, redis)
        await asyncio.sleep(2 + args.jobs / 10_000)  # it reads the intake stream
        before, own, began = fleet.cpu(), time.process_time(), time.perf_counter()
        await script.join()
        await script.work(args.jobs)
        took_s = time.perf_counter() - began
        used = {name: now - before[name] for name, now in fleet.cpu().items()}
        used["script"] = time.process_time() - own
        trickle = jobs_of("trickle", args.trickle, args.tenants, dice)
        waits = await one_by_one(redis, script, trickle)
    finally:
        await redis.aclose()
    per_job = {name: cpu / args.jobs * 1e6 for name, cpu in used.items()}
    cpus = ", ".join(f"{name} {us:.0f} us" for name, us in per_job.items())
    print(
        f"{args.jobs} jobs that waited, {args.scripted} scripted workers: "
        f"{args.jobs / took_s:.0f} jobs/s from queue to finish; CPU per job: {cpus}\n"
        f"one job at a time: from intake to its worker p50 {percentile(waits, 50):.2f} ms, "
        f"p99 {percentile(waits, 99):.2f} ms"
    )
    return {"jobs_per_s": args.jobs / took_s, "cpu_us_per_job": per_job, "hop_ms": spread(waits)}


async def until_led(fleet: Fleet, redis: Redis) -> None:
    """Until a dispatcher has published what it sees."""
    deadline = time.monotonic() + LEAD_S_MAX
    while not await redis.get(keys.board("m")):
        if time.monotonic() > deadline:
            raise SystemExit(f"nobody leads:\n{fleet.log_of('gw0')[-4000:]}")
        await asyncio.sleep(0.05)


async def one_by_one(redis: Redis, script: Script, jobs: list[Job]) -> list[float]:
    """Milliseconds from the intake to the worker, with nothing else going on."""
    working = asyncio.create_task(script.work(script.finished + len(jobs)))
    waits = []
    for job in jobs:
        began = time.perf_counter()
        await accept(redis, [job])
        while job.id not in script.reached_s:
            await asyncio.sleep(0.0005)
        waits.append((script.reached_s[job.id] - began) * 1000)
    await working
    return waits


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--part", choices=("policy", "process", "both"), default="both")
    parser.add_argument("--queued", type=int, default=10_000, choices=LENGTHS)
    parser.add_argument("--workers", type=int, default=500)
    parser.add_argument("--tenants", type=int, default=1_000)
    parser.add_argument("--max-jobs", type=int, default=32, help="of each worker")
    parser.add_argument("--kv-tokens", type=int, default=65_536, help="of each worker")
    parser.add_argument("--decisions", type=int, default=5_000, help="measured for each row")
    parser.add_argument("--table", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--jobs", type=int, default=20_000, help="for the process")
    parser.add_argument("--scripted", type=int, default=16, help="workers for the process")
    parser.add_argument("--trickle", type=int, default=300, help="jobs one at a time")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    facts: dict[str, Any] = {}
    if args.part != "process":
        facts["policy"] = policy_part(args)
    if args.part != "policy":
        with Fleet(0) as fleet:
            facts["process"] = asyncio.run(process_part(fleet, args))
    if args.json:
        args.json.write_text(json.dumps(facts, indent=2))


if __name__ == "__main__":
    main()
