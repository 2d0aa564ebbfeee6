"""Is the simulator right? One workload on real workers and in the simulator, side by side.

    python -m bench sim_reality [--cost cost.json] [--seconds 300] [--json sim_reality.json]

Requests come at Poisson times (seeded); their prompt and output lengths are drawn from a trace's
and scaled down to what a small model on a CPU can do in the time. No two prompts share anything,
and answers have exactly the length that was drawn. `--load` is the part of the capacity that is
asked for, as the cost model sees it at a batch of eight. The real workers get the sizes that the
cost model names, and do not speculate, which it knows nothing of.

Without `--cost` the same workers are calibrated while they serve (_calibrating.py): the workload is
cut into pieces of `--piece` seconds, and before, between and behind them a load with other lengths
is sent for `--calibrate` seconds. Machines whose cores are shared with others are a tenth faster or
slower from one minute to the next, which is not what is asked here: each piece is simulated with
what the calibrations on either side of it say. It is printed how they differ; and how the steps of
the judged requests, which are in no cost model, compare with it.

Printed are TTFT, time between tokens, time in all and throughput of both, and by how much the
simulator is off. `--real FILE` takes reality from the JSON of an earlier run, to try another cost
model on it, or without `--cost` a changed simulator.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench._calibrating import Plan, StepLogs, capacity, load_plan, slower
from bench._fleet import Fleet, settings_of
from bench._load import Answer, Ask, Client, Lag, closed_loop, open_loop, poisson, run, spread
from headrace.cli.rehearsal import Load, Shape
from headrace.policy.cost_model import CostModel
from headrace.types import Band
from headrace_sim.fleet import Fleet as SimulatedFleet
from headrace_sim.fleet import FleetConfig
from headrace_sim.metrics import Outcome
from headrace_sim.presets import cost_model
from headrace_sim.trace import read_trace
from headrace_sim.workload import SimRequest

Row = tuple[float, float, float, int]
"""Arrival in s, TTFT and total in ms, tokens: of a request that was answered whole."""

PILOT_S = 8.0
"""Of a load that keeps all workers busy, before the first calibration."""
SETTLE_S = 1.0
"""For requests whose clients have gone to leave the workers."""
APART_S = 30.0
"""Between calibration and piece, in the simulator: all of the one is over."""


def make_plan(args: argparse.Namespace, cost: CostModel) -> Plan:
    """(seconds, Ask) in order of time."""
    dice = random.Random(args.seed)
    rows = read_trace(args.trace).requests
    lengths = [
        (
            max(1, min(args.prompt_max, round(row.input_tokens * args.scale_prompt))),
            max(1, min(args.output_max, round(row.output_tokens * args.scale_output))),
        )
        for row in rows
    ]
    rate = args.rate or args.load * capacity(lengths, cost, args.workers)
    return [
        (at_s, Ask(*dice.choice(lengths), int(Band.STANDARD)))
        for at_s in poisson(rate, args.seconds, dice)
    ]


def in_pieces(plan: Plan, seconds: float) -> list[Plan]:
    """`plan` cut every so many seconds, each piece from 0 on."""
    pieces: dict[int, Plan] = {}
    for at_s, ask in plan:
        number = int(at_s / seconds)
        pieces.setdefault(number, []).append((at_s - number * seconds, ask))
    return list(pieces.values())


def figures(pieces: Sequence[Sequence[Row]]) -> dict[str, Any]:
    """Of the requests of all pieces together; time between the pieces does not count."""
    rows = [row for piece in pieces for row in piece]
    span_s = sum(
        max(at + total / 1000 for at, _, total, _ in piece) - piece[0][0] for piece in pieces
    )
    return {
        "complete": len(rows),
        "ttft_ms": spread(ttft for _, ttft, _, _ in rows),
        "itl_ms": spread((total - ttft) / (n - 1) for _, ttft, total, n in rows if n > 1),
        "total_ms": spread(total for _, _, total, _ in rows),
        "output_tokens_per_s": sum(n for *_, n in rows) / span_s,
        "requests_per_s": len(rows) / span_s,
    }


# --- reality


@dataclass
class Reality:
    """What came of the pieces that were sent to real workers."""

    pieces: list[list[Row]] = field(default_factory=list)
    lost: int = 0
    took_s: float = 0.0
    cpu_s: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    lag: Lag = field(default_factory=Lag)

    def send(self, fleet: Fleet, plan: Plan, seed: int) -> None:
        """One piece, to the end of its last answer."""
        before, own, began = fleet.cpu(), time.process_time(), time.perf_counter()
        answers: list[Answer] = run(sent(fleet, plan, self.lag, seed))
        self.took_s += time.perf_counter() - began
        for name, now in fleet.cpu().items():
            self.cpu_s[name] += now - before[name]
        self.cpu_s["load"] += time.process_time() - own
        start_s = answers[0].sent_s
        rows = [
            (a.sent_s - start_s, a.ttft_ms, (a.end_s - a.sent_s) * 1000, a.tokens)
            for a in answers
            if a.complete
        ]
        self.lost += len(answers) - len(rows)
        self.pieces.append(rows)

    def figures(self) -> dict[str, Any]:
        cores = {name: cpu_s / self.took_s for name, cpu_s in self.cpu_s.items()}
        lag_ms = spread(self.lag.values)
        return figures(self.pieces) | {"lost": self.lost, "cores": cores, "lag_ms": lag_ms}


async def sent(fleet: Fleet, plan: Plan, lag: Lag, seed: int) -> list[Answer]:
    async with Client(fleet.urls, fleet.model, seed) as client:
        return list(await asyncio.gather(*await open_loop(plan, client.send, lag)))


async def warm_up(fleet: Fleet) -> None:
    """The first steps of a process are slow, and the dispatcher knows no speeds yet."""
    async with Client(fleet.urls, fleet.model, 0) as client:
        await closed_loop(8, lambda: Ask(64, 16), client.send, 5)


@dataclass
class Judged:
    """What is compared: pieces, the cost model of each, what was sent before it, and reality."""

    pieces: list[Plan]
    costs: list[CostModel]
    lead: Plan
    real: dict[str, Any]


def calibrated(args: argparse.Namespace) -> Judged:
    """Pieces on real workers that are calibrated before, between and after them."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = str(args.steps or temporary)
        logs, real = StepLogs(Path(folder)), Reality()
        env = {"HEADRACE_MAX_JOBS": str(args.max_jobs), "HEADRACE_STEP_LOG": folder}
        with a_fleet(args, env) as fleet:
            shape = Shape(args.workers, args.workers * args.max_jobs, 2_048, 40_000)
            run(Load(fleet.urls[0], fleet.model, shape).run(PILOT_S))
            time.sleep(SETTLE_S)
            logs.cut()
            rough = logs.model([0])
            pieces = in_pieces(make_plan(args, rough), args.piece)
            lead = load_plan(args.load, args.calibrate, rough, args.workers)
            count = sum(map(len, pieces))
            print(f"{count} requests in {args.seconds:.0f} s, {len(lead)} in each calibration")
            for number, plan in enumerate([p for piece in pieces for p in (lead, piece)] + [lead]):
                seed = 1_000 * args.seed + number
                if number % 2:
                    real.send(fleet, plan, seed)
                else:
                    run(sent(fleet, plan, Lag(), seed))
                logs.cut()
        return Judged(pieces, costs(logs, len(pieces)), lead, real.figures())


def costs(logs: StepLogs, pieces: int) -> list[CostModel]:
    """The cost model of each piece: parts of `logs` are a pilot, and calibrations and pieces in
    turn. Prints how they compare."""
    calibrations = [1 + 2 * number for number in range(pieces + 1)]
    cost = logs.model(calibrations)
    print(f"{cost.to_json()}\nsteps, and how many times as long as that says they took")
    print(f"pilot: {_compared(logs, 0, cost)}")
    for number, part in enumerate(calibrations, 1):
        print(f"calibration {number}: {_compared(logs, part, cost)}")
    said = [logs.slowness(part, cost) for part in calibrations]
    found = []
    for number in range(pieces):
        times = (said[number] + said[number + 1]) / 2
        found.append(slower(cost, times))
        own = _compared(logs, 2 + 2 * number, found[-1])
        print(f"piece {number + 1} is simulated at {times:.3f}; its own steps by that: {own}")
    return found


def _compared(logs: StepLogs, part: int, cost: CostModel) -> str:
    kinds = ", ".join(
        f"{kind} {took / by_cost:.3f} ({took / 1000:.0f} s)"
        for kind, (took, by_cost) in sorted(logs.taken(part, cost).items())
    )
    return f"{logs.slowness(part, cost):.3f}: {kinds}"


def a_fleet(args: argparse.Namespace, env: dict[str, str]) -> Fleet:
    env = env | {"HEADRACE_SPECULATION": "off"} | settings_of(args.set)
    return Fleet(args.workers, model=args.model, threads=args.threads, env=env)


def reality(args: argparse.Namespace, cost: CostModel, plan: Plan) -> dict[str, Any]:
    """Of workers that `cost` is said to be of."""
    env = {
        "HEADRACE_KV_TOKENS": str(cost.kv_tokens),
        "HEADRACE_MAX_JOBS": str(cost.max_jobs),
        "HEADRACE_STEP_TOKENS": str(cost.step_tokens),
    }
    real = Reality()
    with a_fleet(args, env) as fleet:
        run(warm_up(fleet))
        real.send(fleet, plan, args.seed)
    return real.figures()


# --- simulation


class Fixed:
    """The plan as the simulator's stream."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan

    def start(self) -> Iterator[SimRequest]:
        for number, (at_s, ask) in enumerate(self._plan):
            yield SimRequest(
                id=f"r{number}",
                at_ms=at_s * 1000,
                tenant="default",
                weight=1.0,
                band=Band(ask.band),
                input_tokens=ask.prompt,
                output_tokens=ask.output,
                max_tokens=ask.output,
                session=number.to_bytes(16, "big"),
            )

    def ended(self, _request: SimRequest, _now_ms: float) -> SimRequest | None:
        return None


def simulation(args: argparse.Namespace, judged: Judged) -> dict[str, Any]:
    """Each piece behind the calibration that was before it, so that nobody is new to the load."""
    began = time.process_time()
    pieces: list[list[Row]] = []
    lost, busy_ms = 0, 0.0
    since_s = judged.lead[-1][0] + APART_S if judged.lead else 0.0
    for plan, cost in zip(judged.pieces, judged.costs, strict=True):
        asked = judged.lead + [(since_s + at_s, ask) for at_s, ask in plan]
        fleet = SimulatedFleet(FleetConfig(args.workers, cost, seed=args.seed), Fixed(asked)).run()
        r = fleet.records
        mine = [i for i in range(len(r)) if r.arrived_ms[i] >= 1000 * since_s]
        rows = [
            (
                r.arrived_ms[i] / 1000,
                r.ttft_ms[i],
                r.end_ms[i] - r.arrived_ms[i],
                r.output_tokens[i],
            )
            for i in mine
            if r.outcome[i] == Outcome.COMPLETE
        ]
        pieces.append(sorted(rows))
        lost += len(mine) - len(rows)
        busy_ms += sum(worker.busy_ms for worker in fleet.workers.values())
    took_cpu_s = time.process_time() - began
    return figures(pieces) | {"lost": lost, "busy_ms": busy_ms, "took_cpu_s": took_cpu_s}


def show(real: dict[str, Any], simulated: dict[str, Any]) -> None:
    print(f"{'':<24}{'real':>12}{'simulated':>12}{'off by':>9}")
    lines = [
        (f"{label} {part}, ms", real[key][part], simulated[key][part])
        for label, key in (("TTFT", "ttft_ms"), ("ITL", "itl_ms"), ("total", "total_ms"))
        for part in ("mean", "p50", "p99")
    ]
    lines += [
        (key.replace("_", " "), real[key], simulated[key])
        for key in ("output_tokens_per_s", "requests_per_s", "complete", "lost")
    ]
    for label, a, b in lines:
        off = f"{b / a - 1:+.1%}" if a else ""
        print(f"{label:<24}{a:>12.2f}{b:>12.2f}{off:>9}")
    cores = ", ".join(f"{name} {share:.2f}" for name, share in real["cores"].items())
    lag_ms = real["lag_ms"]["p99"]
    print(
        f"cores used in reality: {cores}; requests left late by p99 {lag_ms:.1f} ms\n"
        f"the simulation took {simulated['took_cpu_s']:.1f} s of CPU"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cost", help="a preset, or what `calibrate` wrote; none: measure it")
    parser.add_argument(
        "--calibrate", type=float, default=18.0, help="seconds of each, without --cost"
    )
    parser.add_argument("--piece", type=float, default=100.0, help="seconds between calibrations")
    parser.add_argument("--max-jobs", type=int, default=8, help="of each worker, without --cost")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1, help="of each worker")
    parser.add_argument(
        "--trace", type=Path, default=Path("../shared/traces/azure_2023_conversation.csv")
    )
    parser.add_argument("--scale-prompt", type=float, default=0.1)
    parser.add_argument("--scale-output", type=float, default=0.2)
    parser.add_argument("--prompt-max", type=int, default=512)
    parser.add_argument("--output-max", type=int, default=128)
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--load", type=float, default=0.7, help="part of the capacity")
    parser.add_argument("--rate", type=float, default=0.0, help="requests/s; 0: from --load")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--set", action="append", default=[], metavar="HEADRACE_X=VALUE")
    parser.add_argument("--real", type=Path, help="reality as an earlier run's --json has it")
    parser.add_argument("--steps", type=Path, help="an empty folder for the workers' logs of steps")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.real:
        judged = earlier(args)
    elif args.cost:
        cost = cost_model(args.cost)
        plan = make_plan(args, cost)
        print(f"{len(plan)} requests in {args.seconds:.0f} s on {args.workers} workers", flush=True)
        judged = Judged([plan], [cost], [], reality(args, cost, plan))
    else:
        judged = calibrated(args)
    simulated = simulation(args, judged)
    show(judged.real, simulated)
    if args.json:
        facts = {
            "workers": args.workers,
            "costs": [json.loads(cost.to_json()) for cost in judged.costs],
            "pieces": [_told(piece) for piece in judged.pieces],
            "lead": _told(judged.lead),
            "real": judged.real,
            "simulated": simulated,
        }
        args.json.write_text(json.dumps(facts, indent=2))


def earlier(args: argparse.Namespace) -> Judged:
    """Reality of an earlier run, by its own cost models or by that of `--cost`."""
    facts = json.loads(args.real.read_text())
    args.workers = facts["workers"]
    costs = [CostModel(**each) for each in facts["costs"]]
    if args.cost:
        costs = [cost_model(args.cost)] * len(costs)
    return Judged(list(map(_plan, facts["pieces"])), costs, _plan(facts["lead"]), facts["real"])


def _told(plan: Plan) -> list[list[float]]:
    return [[at_s, ask.prompt, ask.output] for at_s, ask in plan]


def _plan(rows: list[list[Any]]) -> Plan:
    return [(at_s, Ask(prompt, output)) for at_s, prompt, output in rows]


if __name__ == "__main__":
    main()
