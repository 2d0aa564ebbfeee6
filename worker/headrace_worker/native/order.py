"""In which order the columns of a matrix are summed, so that ranks come to one process's bits.

A matrix whose columns tensor ranks share (attention output, down) is summed rank by rank, and sums
of floats depend on their order. So one process sums in runs too, those that RANKS ranks would hold,
and adds the runs up two by two, as the ranks do: what 1, 2 and 4 ranks compute is the same, bit for
bit, and with weights of 8 or 4 bits no number is rounded to another step because of a last bit.

Invariant: a matrix has 1, 2 or 4 runs, cut between groups of columns that are rounded together.
Where the runs of four ranks are not halves of those of two, two ranks are what is followed; where
neither can share the model, or a group would be cut, columns are summed in one go.
Rejected: sums over ranks in a wider type, which still begin with each rank's own rounding.
"""

from __future__ import annotations

from headrace.errors import ModelError
from headrace_worker.model.config import ModelConfig
from headrace_worker.native.abi import GROUP
from headrace_worker.parallel.shape import Part, Shape, part_of

RANKS = 4
"""Up to so many ranks are followed; twice as many would cost all others more."""


def orders(config: ModelConfig, part: Part | None) -> dict[str, tuple[int, ...]]:
    """Where the columns of matrices of these names are cut, in columns of `part`, or of all.

    `config` is the whole model's.
    """
    total = {"o_proj": config.heads * config.head_dim, "down_proj": config.intermediate_size}
    runs = {name: range(count) for name, count in total.items()}
    if part is not None:
        runs = _runs(part)
    two, four = _bounds(config, 2), _bounds(config, RANKS)
    found = {}
    for name, run in runs.items():
        bounds = two.get(name, [])
        if name in four and four[name][1:2] == bounds:
            bounds = four[name]
        ends = {0, *bounds, total[name]}
        inside = [bound - run.start for bound in bounds if run.start < bound < run.stop]
        of_others = run.start not in ends or run.stop not in ends or len(inside) == 2
        if of_others or any(bound % GROUP for bound in inside):
            inside = []
        found[name] = tuple(inside)
    return found


def _runs(part: Part) -> dict[str, range]:
    size = part.whole.head_dim
    return {
        "o_proj": range(part.heads.start * size, part.heads.stop * size),
        "down_proj": part.inner,
    }


def _bounds(config: ModelConfig, ranks: int) -> dict[str, list[int]]:
    """Where each rank's columns end but the last one's; empty if so many cannot share the model."""
    try:
        parts = [_runs(part_of(config, Shape(ranks), rank)) for rank in range(ranks - 1)]
    except ModelError:
        return {}
    return {name: [runs[name].stop for runs in parts] for name in parts[0]}
