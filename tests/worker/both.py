"""`sample` twice: by numpy, and by the native kernels where there are some; they have to agree."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from headrace_worker import native
from headrace_worker.sampling import sampler
from headrace_worker.sampling.ranking import Floats, rows_of
from headrace_worker.sampling.sampler import Chosen, Row

ROWS_TWICE_MAX = 100


def sample(logits: Tensor | Floats, rows: Sequence[Row]) -> list[Chosen | None]:
    """What both choose, logprobs and all; with the highest logits known and without."""
    values = rows_of(logits)
    expected = sampler.sample(values.copy(), rows)
    library = native.library()
    if library is None:
        return expected
    known = sampler._tops(values)
    ways = [(values, known)]
    if len(rows) <= ROWS_TWICE_MAX:
        ways.insert(0, (values.copy(), None))
    for mine, tops in ways:
        found = sampler.sample(mine, rows, tops, library)
        assert found == expected, differences(rows, expected, found)
    return expected


def differences(
    rows: Sequence[Row], expected: Sequence[Chosen | None], found: Sequence[Chosen | None]
) -> str:
    parted = [i for i, (a, b) in enumerate(zip(expected, found, strict=True)) if a != b]
    return "\n".join(f"{rows[i].choosing.sampling}: {expected[i]}, {found[i]}" for i in parted)


def noise(kind: str, rows: int, vocab: int, seed: int) -> Floats:
    """Logits of some kind, float32 [rows, vocab]."""
    dice = np.random.default_rng(seed)
    logits = (dice.standard_normal((rows, vocab)) * 3).astype(np.float32)
    if kind == "ties":
        return dice.integers(-1, 3, (rows, vocab)).astype(np.float32)
    if kind == "flat":
        logits[:] = 1.5
    elif kind == "gaps":
        logits[dice.random((rows, vocab)) < 0.7] = -np.inf
    elif kind == "large":
        logits *= 1e37
    elif kind == "peaked":
        logits[:, :: max(1, vocab // 20)] += 12
    elif kind == "coarse":
        logits = (logits.view(np.uint32) & np.uint32(0xFFFF_0000)).view(np.float32)
    return logits
