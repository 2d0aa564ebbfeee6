"""Which tokens may be drawn, and with what weight: temperature, top_k, min_p, typical_p, top_p.

Invariant: each filter works on what the one before it left, as if that were the whole distribution,
and keeps at least one token. Ties are kept by rising token id, so that top_k keeps k tokens and the
sets are the smallest ones.

The order is temperature, top_k, min_p, typical_p, top_p. vLLM has temperature, min_p, top_k, top_p,
which is the same: min_p and top_k both keep the most probable tokens, so their order does not
matter. transformers has temperature, top_k, top_p, min_p, typical_p; there top_p counts tokens that
min_p is about to remove. llama.cpp puts typical_p before top_p, as here, and temperature last.
Rejected: its place, with which a filter would not see the distribution that is drawn from.

Sources: top_p, Holtzman et al., "The Curious Case of Neural Text Degeneration", 2020. typical_p,
Meister et al., "Locally Typical Sampling", 2022. min_p, Nguyen et al., "Turning Up the Heat: Min-p
Sampling for Creative and Coherent LLM Outputs", 2024.
"""

from __future__ import annotations

import numpy as np

from headrace.types import Sampling
from headrace_worker.sampling.ranking import Floats, Indices, leading, reaching
from headrace_worker.sampling.weights import TEMPERATURE_MIN, total, weigh

_SCALED_MIN = np.float32(-200)
"""Far below where a token still weighs something."""


def is_plain(sampling: Sampling, vocab_size: int) -> bool:
    """No filter removes anything."""
    return (
        not 0 < sampling.top_k < vocab_size
        and sampling.min_p <= 0
        and sampling.typical_p >= 1
        and sampling.top_p >= 1
    )


def keep(
    logits: Floats, best: np.float32, sampling: Sampling, out: Floats
) -> tuple[Indices | None, Floats]:
    """The tokens left of one row of logits, float32 [vocab], and their unnormalized weights.

    Token ids rise; None means the whole vocabulary. `best` is the highest logit, which is finite.
    `out`: room for [vocab] weights.
    """
    ids: Indices | None = None
    if 0 < sampling.top_k < len(logits):
        ids = np.sort(leading(logits, sampling.top_k))
        logits = logits[ids]
    weights = weigh(logits, best, sampling.temperature, out if ids is None else None)
    if sampling.min_p > 0:
        kept = np.flatnonzero(weights >= np.float32(sampling.min_p))
        ids, logits, weights = _only(kept, ids, logits, weights)
    if sampling.typical_p < 1:
        kept = _typical(_scale(logits, best, sampling.temperature), weights, sampling)
        ids, logits, weights = _only(kept, ids, logits, weights)
    if sampling.top_p < 1:
        kept = reaching(logits, weights, sampling.top_p * total(weights))
        ids, logits, weights = _only(kept, ids, logits, weights)
    return ids, weights


def _scale(logits: Floats, best: np.float32, temperature: float) -> Floats:
    scaled = np.subtract(logits, best)
    if temperature != 1:
        scaled *= np.float32(1 / max(temperature, TEMPERATURE_MIN))
    return scaled


def _only(
    kept: Indices, ids: Indices | None, logits: Floats, weights: Floats
) -> tuple[Indices, Floats, Floats]:
    return (kept if ids is None else ids[kept]), logits[kept], weights[kept]


def _typical(scaled: Floats, weights: Floats, sampling: Sampling) -> Indices:
    """Tokens whose surprise is nearest to the entropy, until they have `typical_p` of the mass.

    Surprise less entropy is E[scaled] - scaled: what normalizes the weights cancels out.
    """
    scaled = np.maximum(scaled, _SCALED_MIN)
    mass = total(weights)
    mean = total(weights * scaled) / mass
    return reaching(-np.abs(scaled - np.float32(mean)), weights, sampling.typical_p * mass)
