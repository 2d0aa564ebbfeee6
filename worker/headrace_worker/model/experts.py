"""Mixtures of experts: each token goes to the few MLPs that a router chooses for it.

Source: Shazeer et al., "Outrageously Large Neural Networks", 2017; Fedus et al., "Switch
Transformers", 2021.

Invariant: what a token gets depends on itself alone. Its experts' outputs are summed in the order
of their weights, whoever else is in the step. Only experts that some token chose are computed; the
router is never quantized, since its choices are discrete. Where ranks hold some experts each, all
route alike, from equal numbers, compute what is theirs, and add it up.

Rejected: all experts over all tokens (128 experts for 8), and sorting by index_add_, which sums in
the order of the experts' numbers and costs a scattered write each.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from headrace_worker.model import config
from headrace_worker.model.linear import Linear
from headrace_worker.model.weights import Weights


class Experts:
    """One layer's experts and their router. A Linear to its caller."""

    def __init__(
        self,
        shape: config.Experts,
        weights: Weights,
        hidden: int,
        activation: Callable[[Tensor], Tensor],
        *,
        router: str,
        experts: str,
        gate_up: tuple[str, str],
        down: str,
    ) -> None:
        """`router`, `experts`: full names; `gate_up`, `down`: below `experts.N.`."""
        inner = shape.intermediate_size
        self.shape, self.activation, self.total = shape, activation, weights.total
        self.router = weights.router(f"{router}.weight", (shape.count, hidden))
        self.experts: dict[int, tuple[Linear, Linear]] = {
            i: (
                weights.linear(
                    [f"{experts}.{i}.{name}" for name in gate_up], [inner, inner], hidden
                ),
                weights.linear([f"{experts}.{i}.{down}"], [hidden], inner),
            )
            for i in shape.here
        }

    def __call__(self, x: Tensor) -> Tensor:
        per_token = self.shape.per_token
        scores = torch.softmax(self.router(x), dim=-1, dtype=torch.float32)
        shares, chosen = scores.topk(per_token, dim=-1)
        if self.shape.normalized:
            shares = shares / shares.sum(-1, keepdim=True)
        # the N * per_token pairs (token, expert), ordered by expert
        order = chosen.view(-1).argsort(stable=True)
        sorted_x = x[order // per_token]
        counts = torch.bincount(chosen.view(-1), minlength=self.shape.count).tolist()
        begin = start = sum(counts[: self.shape.here.start])
        parts = []
        for expert in self.shape.here:
            if counts[expert]:
                parts.append(self._expert(expert, sorted_x[start : start + counts[expert]]))
                start += counts[expert]
        # what other ranks' experts make is zero here, and comes with the sum
        make = torch.empty_like if self.shape.held is None else torch.zeros_like
        outputs = make(sorted_x)
        if parts:
            outputs[order[begin:start]] = torch.cat(parts)
        weighted = outputs.view(-1, per_token, x.shape[-1]) * shares.to(x.dtype)[..., None]
        return self.total(weighted.sum(1))

    def _expert(self, index: int, x: Tensor) -> Tensor:
        gate_up, down = self.experts[index]
        gate, up = gate_up(x).chunk(2, dim=-1)
        return down(self.activation(gate) * up)

    def added(self, x: Tensor, residual: Tensor) -> Tensor:
        return residual + self(x)
