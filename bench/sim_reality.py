"""Is the simulator right? One workload on real workers and in the simulator, side by side.

    python -m bench sim_reality [--cost cost.json] [--seconds 300] [--json sim_reality.json]

Requests come at Poisson times (seeded); their prompt and output lengths are drawn from a trace's
and scaled down to what a small model on a CPU can do in the time. No two prompts share anything,
and answers have exactly the length that was drawn. `--load` is the part of the capacity that is
asked for, as the cost model sees it at a batch of eight. The real workers get the sizes that the
cost model names, and do not speculate, which it knows nothing of.

Without `--cost` the same workers are calibrated, as `headrace bench calibrate` does it, half before
and half after the requests: machines whose cores are shared with others are a tenth faster or
slower from one minute to the next, which is not what is asked here. The calibration has a load of
its own, with other lengths and as many clients at a time as it likes; what the workers log while
the judged requests are under way is left out.

Printed are TTFT, time between tokens, time in all and throughput of both, and by how much the
simulator is off. `--real FILE` takes reality from the JSON of an earlier run, to try another cost
model on it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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

BATCH = 8
Plan = list[tuple[float, Ask]]


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


def capacity(lengths: list[tuple[int, int]], cost: CostModel, workers: int) -> float:
    """Requests per second of these lengths, at a batch of BATCH."""
    prompt = sum(each for each, _ in lengths) / len(lengths)
    output = sum(each for _, each in lengths) / len(lengths)
    context = BATCH * (prompt + output / 2)
    step_ms = cost.step_duration_ms(0, BATCH, round(context), 0.0)
    return workers * 1000 / (prompt * cost.prefill_token_ms + output * step_ms / BATCH)


def figures(rows: list[tuple[float, float, float, int]]) -> dict[str, Any]:
    """From (arrival s, TTFT ms, total ms, tokens) of complete requests."""
    span_s = max(at + total / 1000 for at, _, total, _ in rows) - rows[0][0]
    return {
        "complete": len(rows),
        "ttft_ms": spread(ttft for _, ttft, _, _ in rows),
        "itl_ms": spread((total - ttft) / (n - 1) for _, ttft, total, n in rows if n > 1),
        "total_ms": spread(total for _, _, total, _ in rows),
        "output_tokens_per_s": sum(n for *_, n in rows) / span_s,
        "requests_per_s": len(rows) / span_s,
    }


# --- reality


async def really(fleet: Fleet, plan: Plan, lag: Lag, seed: int) -> list[Answer]:
    async with Client(fleet.urls, fleet.model, seed) as client:
        # the first steps of a process are slow, and the dispatcher knows no speeds yet
        await closed_loop(8, lambda: Ask(64, 16), client.send, 5)
        return list(await asyncio.gather(*await open_loop(plan, client.send, lag)))


@dataclass
class StepLogs:
    """What the workers log in `folder`, without what they log while the plan is under way."""

    folder: Path
    left_out: dict[Path, tuple[int, int]]

    def lines(self) -> dict[Path, list[str]]:
        return {path: path.read_text().splitlines() for path in self.folder.glob("*.steps")}

    def cost(self) -> CostModel:
        """The model of all steps that count so far."""
        # they import torch: not before the load has to be sent
        from headrace_worker.fitting import fit, grouped
        from headrace_worker.step_log import read_logs

        with tempfile.TemporaryDirectory() as kept:
            for path, lines in self.lines().items():
                since, until = self.left_out.get(path, (0, 0))
                Path(kept, path.name).write_text("\n".join(lines[:since] + lines[until:]) + "\n")
            sizes, steps = read_logs(Path(kept).glob("*.steps"))
        return fit(grouped(steps), sizes)


def rehearse(fleet: Fleet, args: argparse.Namespace, seed: int) -> None:
    """Half of a calibration."""
    shape = Shape(args.workers, args.workers * args.max_jobs, 2_048, 40_000)
    run(Load(fleet.urls[0], fleet.model, shape, seed).run(args.calibrate / 2))


def calibrated(args: argparse.Namespace) -> tuple[CostModel, Plan, dict[str, Any]]:
    """Cost model, plan and reality of workers that are calibrated before and after it."""
    with tempfile.TemporaryDirectory() as folder:
        logs = StepLogs(Path(folder), {})
        env = {"HEADRACE_MAX_JOBS": str(args.max_jobs), "HEADRACE_STEP_LOG": folder}
        with a_fleet(args, env) as fleet:
            rehearse(fleet, args, 7)
            plan = make_plan(args, logs.cost())
            print(f"{len(plan)} requests in {args.seconds:.0f} s on {args.workers} workers")
            before = {path: len(lines) for path, lines in logs.lines().items()}
            real = measure(fleet, args, plan)
            after = {path: len(lines) for path, lines in logs.lines().items()}
            logs.left_out = {path: (before[path], after[path]) for path in after}
            rehearse(fleet, args, 8)
            return logs.cost(), plan, real


def a_fleet(args: argparse.Namespace, env: dict[str, str]) -> Fleet:
    env = env | {"HEADRACE_SPECULATION": "off"} | settings_of(args.set)
    return Fleet(args.workers, model=args.model, threads=args.threads, env=env)


def reality(args: argparse.Namespace, cost: CostModel, plan: Plan) -> dict[str, Any]:
    env = {
        "HEADRACE_KV_TOKENS": str(cost.kv_tokens),
        "HEADRACE_MAX_JOBS": str(cost.max_jobs),
        "HEADRACE_STEP_TOKENS": str(cost.step_tokens),
    }
    with a_fleet(args, env) as fleet:
        return measure(fleet, args, plan)


def measure(fleet: Fleet, args: argparse.Namespace, plan: Plan) -> dict[str, Any]:
    lag = Lag()
    before, own, began = fleet.cpu(), time.process_time(), time.perf_counter()
    answers: list[Answer] = run(really(fleet, plan, lag, args.seed))
    took_s = time.perf_counter() - began
    cpus = {name: (now - before[name]) / took_s for name, now in fleet.cpu().items()}
    cpus["load"] = (time.process_time() - own) / took_s
    start_s = answers[0].sent_s
    rows = [
        (a.sent_s - start_s, a.ttft_ms, (a.end_s - a.sent_s) * 1000, a.tokens)
        for a in answers
        if a.complete
    ]
    lost = len(answers) - len(rows)
    return figures(rows) | {"lost": lost, "cores": cpus, "lag_ms": spread(lag.values)}


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


def simulation(args: argparse.Namespace, cost: CostModel, plan: Plan) -> dict[str, Any]:
    began = time.process_time()
    fleet = SimulatedFleet(FleetConfig(args.workers, cost, seed=args.seed), Fixed(plan)).run()
    r = fleet.records
    rows = [
        (r.arrived_ms[i] / 1000, r.ttft_ms[i], r.end_ms[i] - r.arrived_ms[i], r.output_tokens[i])
        for i in range(len(r))
        if r.outcome[i] == Outcome.COMPLETE
    ]
    busy_ms = sum(worker.busy_ms for worker in fleet.workers.values())
    return figures(sorted(rows)) | {
        "lost": len(r) - len(rows),
        "busy_ms": busy_ms,
        "took_cpu_s": time.process_time() - began,
    }


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
    parser.add_argument("--calibrate", type=float, default=60.0, help="seconds, without --cost")
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
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.real and not args.cost:
        raise SystemExit("--real needs --cost")
    if not args.cost:
        cost, plan, real = calibrated(args)
        print(cost.to_json())
    elif args.real:
        cost = cost_model(args.cost)
        earlier = json.loads(args.real.read_text())
        plan = [(at_s, Ask(prompt, output)) for at_s, prompt, output in earlier["plan"]]
        args.workers, real = earlier["workers"], earlier["real"]
    else:
        cost = cost_model(args.cost)
        plan = make_plan(args, cost)
        print(f"{len(plan)} requests in {args.seconds:.0f} s on {args.workers} workers", flush=True)
        real = reality(args, cost, plan)
    simulated = simulation(args, cost, plan)
    show(real, simulated)
    if args.json:
        facts = {
            "workers": args.workers,
            "cost": json.loads(cost.to_json()),
            "plan": [[at_s, ask.prompt, ask.output] for at_s, ask in plan],
            "real": real,
            "simulated": simulated,
        }
        args.json.write_text(json.dumps(facts, indent=2))


if __name__ == "__main__":
    main()
