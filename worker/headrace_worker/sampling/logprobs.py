"""What the model itself thought: log probabilities of raw logits.

Invariant: they are taken before masks, penalties, temperature and filters, so that they do not
depend on a job's options. Rows are worked on one by one: memory is bounded by one row however many
there are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from torch import Tensor

from headrace.types import TokenLogprobs
from headrace_worker.sampling.ranking import Floats, leading, rows_of
from headrace_worker.sampling.weights import total


def position_logprobs(
    logits: Tensor | Floats, tokens: Sequence[int], top: int
) -> list[TokenLogprobs | None]:
    """What raw `logits`, float32 [N, vocab], say of the token that follows each row.

    `tokens`: [N]. `top`: how many of the most probable tokens to name. None where a row has no
    finite maximum. A token that the model rules out has logprob -inf.
    """
    values = rows_of(logits)
    assert len(values) == len(tokens), "a token for each row"
    room = np.empty(values.shape[1], np.float32)
    found: list[TokenLogprobs | None] = []
    with np.errstate(over="ignore", under="ignore"):
        for row, token in zip(values, tokens, strict=True):
            best = row[row.argmax()]
            found.append(row_logprobs(row, best, token, top, room) if np.isfinite(best) else None)
    return found


def row_logprobs(
    logits: Floats, best: np.float32, token: int, top: int, room: Floats
) -> TokenLogprobs:
    """Of `token` and of the `top` most probable tokens by one row of raw logits, float32 [vocab].

    `best` is the highest logit, finite. `room`: for [vocab] float32. Equal ones come by rising id;
    tokens that the model rules out (-inf) are not named.
    """
    np.subtract(logits, best, out=room)
    np.exp(room, out=room)
    normal = float(best) + math.log(total(room))
    ids = leading(logits, top).tolist() if top else ()
    named = tuple((t, float(logits[t]) - normal) for t in ids)
    return TokenLogprobs(float(logits[token]) - normal, named)
