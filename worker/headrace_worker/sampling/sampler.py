"""From logits to tokens: greedy, temperature, top-k, top-p.

Invariant: a row's token depends on that row's logits, its parameters, its seed and its position,
on nothing else in the batch. Greedy rows are a pure argmax. Sampled rows are drawn by inverse CDF
from one uniform each; where top-k or top-p ask for an order, it is (probability falling, token
id rising), so that ties, which bfloat16 has plenty of, fall the same way every time.

Order of filters as elsewhere: temperature, then top-k, then top-p over what is left (Holtzman et
al., "The Curious Case of Neural Text Degeneration", 2020): the smallest set of most probable
tokens whose probability reaches top-p.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from headrace_worker.sampling.uniform import uniforms

CANDIDATES = 1024
"""Most probable tokens looked at first; a row that needs more has its whole vocabulary sorted."""


@dataclass(frozen=True, slots=True)
class SamplingRow:
    """How to choose one row's token. `temperature` 0: greedy. `top_k` 0: no limit."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    position: int = 0


def sample(logits: Tensor, rows: Sequence[SamplingRow]) -> list[int | None]:
    """One token per row of logits, float32 [M, vocab]; None where a row has no finite maximum."""
    best, tokens = logits.max(dim=-1)
    chosen: list[int | None] = list(tokens.tolist())
    finite = torch.isfinite(best).tolist()
    drawn = [i for i, row in enumerate(rows) if row.temperature > 0 and finite[i]]
    if drawn:
        for i, token in zip(drawn, _draw(logits, best, rows, drawn), strict=True):
            chosen[i] = token
    return [token if ok else None for token, ok in zip(chosen, finite, strict=True)]


def _draw(logits: Tensor, best: Tensor, rows: Sequence[SamplingRow], drawn: list[int]) -> list[int]:
    index = torch.tensor(drawn)
    temperature = torch.tensor([rows[i].temperature for i in drawn])
    # the maximum goes first: a tiny temperature must underflow, never overflow
    weights = ((logits[index] - best[index][:, None]) / temperature[:, None]).exp_()
    u = torch.from_numpy(uniforms([rows[i].seed for i in drawn], [rows[i].position for i in drawn]))
    tokens = [0] * len(drawn)
    plain = [n for n, i in enumerate(drawn) if rows[i].top_k == 0 and rows[i].top_p >= 1]
    if plain:
        for n, place in zip(plain, _invert(weights[plain], u[plain]), strict=True):
            tokens[n] = place
    plain_rows = set(plain)
    filtered = [n for n in range(len(drawn)) if n not in plain_rows]
    if filtered:
        found = _draw_filtered(weights[filtered], u[filtered], [rows[drawn[n]] for n in filtered])
        for n, token in zip(filtered, found, strict=True):
            tokens[n] = token
    return tokens


def _invert(weights: Tensor, u: Tensor) -> list[int]:
    """Index drawn per row of unnormalized weights [M, n], by uniforms, float64 [M]."""
    sums = weights.cumsum(-1, dtype=torch.float64)
    totals = sums[:, -1]
    # rounding may place a draw on the far end, where there is no weight any more
    targets = torch.minimum(u * totals, totals.nextafter(torch.zeros_like(totals)))
    places: list[int] = torch.searchsorted(sums, targets[:, None], right=True)[:, 0].tolist()
    return places


def _draw_filtered(weights: Tensor, u: Tensor, rows: Sequence[SamplingRow]) -> list[int]:
    totals = weights.sum(-1, dtype=torch.float64)
    count = min(CANDIDATES, weights.shape[1])
    top, ids = weights.topk(count, dim=-1)
    top, ids = _ordered(top, ids)
    tokens: list[int] = []
    for n, row in enumerate(rows):
        values, names = top[n], ids[n]
        enough = 0 < row.top_k < count or (
            row.top_k == 0
            and float(values.sum(dtype=torch.float64)) >= row.top_p * float(totals[n])
        )
        if not enough:
            values, names = weights[n].sort(descending=True, stable=True)
        tokens.append(_draw_one(values, names, row, totals[n], u[n : n + 1]))
    return tokens


def _ordered(values: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """The same [M, n] pairs by falling value, equal ones by rising id."""
    ids, by_id = ids.sort(dim=-1)
    values, by_value = values.gather(-1, by_id).sort(dim=-1, descending=True, stable=True)
    return values, ids.gather(-1, by_value)


def _draw_one(values: Tensor, ids: Tensor, row: SamplingRow, total: Tensor, u: Tensor) -> int:
    """Draws from falling weights [n] of a row that sums to `total`, its filters applied."""
    if row.top_k:
        values = values[: row.top_k]
        total = values.sum(dtype=torch.float64)
    if row.top_p < 1:
        before = values.cumsum(0, dtype=torch.float64) - values
        values = values[: max(1, int((before < row.top_p * total).sum()))]
    [place] = _invert(values[None], u)
    return int(ids[place])
