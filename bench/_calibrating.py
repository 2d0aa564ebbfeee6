"""A fleet's cost model on a machine that is faster in one minute than in the next.

The workers log their steps (step_log.py) while a load of its own is served for some seconds, again
and again: before what is judged, between its pieces and after it. One model is fitted to the steps
of all calibrations; each calibration then says by how much longer than the model's its steps took,
and a piece gets the model times the mean of what the two on either side of it said. Every
calibration sends the same lengths at the same instants, so that they differ in the machine alone.

Invariant: steps of what is judged are in no model; how they compare is told.
Requests come as Poisson processes do, for the same part of the capacity as those that are judged:
a step takes less while the worker beside it has nothing to do. Their lengths are others, each
magnitude as often as another. Rejected: clients that keep all workers busy (`headrace bench
calibrate`): they serve here for a few seconds before all else, to tell what the capacity is, and it
is told how their steps compare.
"""

from __future__ import annotations

import json
import math
import random
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from bench._load import Ask, poisson
from headrace.cli.rehearsal import OUTPUT_TOKENS, PROMPT_TOKENS
from headrace.policy.cost_model import CostModel
from headrace.types import Band

Plan = list[tuple[float, Ask]]
BATCH = 8
SEED = 7
LENGTHS = 400

_TERMS = (
    "step_ms",
    "batch_ms",
    "prefill_token_ms",
    "decode_row_ms",
    "decode_context_ms",
    "prefill_context_ms",
)


def capacity(lengths: Sequence[tuple[int, int]], cost: CostModel, workers: int) -> float:
    """Requests per second of these (prompt, output) lengths, at a batch of BATCH."""
    prompt = sum(each for each, _ in lengths) / len(lengths)
    output = sum(each for _, each in lengths) / len(lengths)
    context = BATCH * (prompt + output / 2)
    step_ms = cost.step_duration_ms(0, BATCH, round(context), 0.0)
    return workers * 1000 / (prompt * cost.prefill_token_ms + output * step_ms / BATCH)


def load_plan(load: float, seconds: float, cost: CostModel, workers: int) -> Plan:
    """What a calibration sends; the same for the same arguments."""
    dice = random.Random(SEED)
    lengths = [(_magnitude(dice, *PROMPT_TOKENS), _magnitude(dice, *OUTPUT_TOKENS))
               for _ in range(LENGTHS)]  # fmt: skip
    rate = load * capacity(lengths, cost, workers)
    return [
        (at_s, Ask(*dice.choice(lengths), int(Band.STANDARD)))
        for at_s in poisson(rate, seconds, dice)
    ]


def _magnitude(dice: random.Random, least: int, most: int) -> int:
    return int(math.exp(dice.uniform(math.log(least), math.log(most + 1))))


def slower(cost: CostModel, times: float) -> CostModel:
    """A worker whose steps take so many times as long."""
    return replace(cost, **{term: getattr(cost, term) * times for term in _TERMS})


Cut = dict[Path, int]
"""Lines of each log so far."""


@dataclass
class StepLogs:
    """What workers log in `folder`, cut into parts; number 0 ends with the first cut."""

    folder: Path
    cuts: list[Cut] = field(default_factory=list)

    def cut(self) -> None:
        """A part ends here, and the next one begins. The workers are idle."""
        from headrace_worker.step_log import WARM_STEPS

        lines = self._lines()
        if not self.cuts:
            self.cuts.append(dict.fromkeys(lines, 1 + WARM_STEPS))
        self.cuts.append({path: len(some) for path, some in lines.items()})

    def _lines(self) -> dict[Path, list[str]]:
        return {path: path.read_text().splitlines() for path in self.folder.glob("*.steps")}

    def model(self, parts: Sequence[int]) -> CostModel:
        """The model of the steps between cuts number `part` and the one after it."""
        # they import torch: not before the load has to be sent
        from headrace_worker.fitting import fit, grouped
        from headrace_worker.step_log import read_logs

        with tempfile.TemporaryDirectory() as kept:
            self._keep(Path(kept), parts)
            sizes, steps = read_logs(Path(kept).glob("*.steps"))
        return fit(grouped(steps), sizes)

    def taken(self, part: int, cost: CostModel) -> dict[str, tuple[float, float]]:
        """What the steps of a part took in ms, and would have by `cost`, by kind of step."""
        sums: dict[str, tuple[float, float]] = {}
        for path, lines in self._lines().items():
            for line in lines[self.cuts[part][path] : self.cuts[part + 1][path]]:
                took_us, prefill, rows, context, pairs = json.loads(line)
                kind = "mixed" if prefill and rows else "prefill" if prefill else "decode"
                took, said = sums.get(kind, (0.0, 0.0))
                by_cost = cost.step_duration_ms(prefill, rows, context, pairs)
                sums[kind] = took + took_us / 1000, said + by_cost
        return sums

    def slowness(self, part: int, cost: CostModel) -> float:
        """How many times as long as by `cost` the steps of a part took, all together."""
        sums = self.taken(part, cost).values()
        return sum(took for took, _ in sums) / sum(said for _, said in sums)

    def _keep(self, folder: Path, parts: Sequence[int]) -> None:
        """The logs of some parts alone, in `folder`, behind the head and what is read by nobody."""
        for path, lines in self._lines().items():
            kept = lines[: self.cuts[0][path]]
            for part in parts:
                kept += lines[self.cuts[part][path] : self.cuts[part + 1][path]]
            (folder / path.name).write_text("\n".join(kept) + "\n")
