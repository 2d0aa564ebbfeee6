"""What changes a row of logits before its token is chosen, greedy or not.

Invariant: what the grammar's mask forbids stays forbidden, and bans leave something to choose:
where nothing else is left, first the ends that `min_tokens` held back are allowed again, then the
bad words, because an output that its grammar does not know is worse than either.

The order is mask, logit_bias, bad_words, min_tokens, repetition penalty, then frequency and
presence penalty. vLLM has logit_bias after the bans, which makes no difference, and before the
penalties, which does. The repetition penalty divides positive logits and multiplies negative ones
(Keskar et al., "CTRL: A Conditional Transformer Language Model for Controllable Generation", 2019);
the other two are OpenAI's.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from headrace.types import Sampling
from headrace_worker.sampling.choosing import Choosing
from headrace_worker.sampling.ranking import Floats, Indices

_FORBIDDEN = np.uint32(0xFF80_0000)
"""-inf in float32, as bits."""
_HIGHEST = float(np.finfo(np.float32).max)


def edit(
    logits: Floats, choosing: Choosing, draft: tuple[int, ...], mask: NDArray[np.int32] | None
) -> None:
    """Changes one row of logits, float32 [vocab], into those of the token after `draft`.

    A row whose mask allows nothing that is possible becomes -inf everywhere.
    """
    if mask is not None:
        forbid(logits, mask)
    if choosing.bias is not None:
        ids, biases = choosing.bias
        logits[ids] += biases
    _ban(logits, choosing.words_banned(draft), choosing.ends_banned(draft))
    counts = choosing.counts(draft)
    if counts is not None:
        _penalize(logits, *counts, choosing.sampling)


def forbid(logits: Floats, mask: NDArray[np.int32]) -> None:
    """Sets to -inf the logits, float32 [vocab], of tokens whose bit in `mask` is 0.

    `mask`: int32 [ceil(vocab / 32)], token t is bit t % 32 of word t // 32.
    """
    assert mask.size == -(-len(logits) // 32), "a bit of mask for each token"
    octets = mask.astype("<i4", copy=False).view(np.uint8)
    allowed = np.unpackbits(octets, count=len(logits), bitorder="little")
    # arithmetic on the bits: 0.0 where allowed, else -inf; a masked copy takes ten times as long
    summand = allowed.astype(np.uint32)
    summand -= np.uint32(1)
    summand &= _FORBIDDEN
    logits += summand.view(np.float32)


def _ban(logits: Floats, words: Indices, ends: Indices) -> None:
    if not len(words) and not len(ends):
        return
    before_words = logits[words]
    logits[words] = -np.inf
    before_ends = logits[ends]
    logits[ends] = -np.inf
    if logits[logits.argmax()] > -np.inf:
        return
    logits[ends] = before_ends
    if logits[logits.argmax()] == -np.inf:
        logits[words] = before_words


def _penalize(
    logits: Floats, ids: Indices, counts: NDArray[np.float64], sampling: Sampling
) -> None:
    values = logits[ids].astype(np.float64)
    penalty = sampling.repetition_penalty
    if penalty != 1:
        values = np.where(values > 0, values / penalty, values * penalty)
    values -= sampling.frequency_penalty * counts
    values -= sampling.presence_penalty * (counts > 0)
    logits[ids] = np.minimum(values, _HIGHEST)
