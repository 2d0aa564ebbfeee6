"""Which requests are the same one, and which may wait for another's computation.

Invariant: two requests have one key only if model, salt, prompt, sampling and the rules that end
their text agree, so that either's tokens are the other's answer; a key tells nothing of what went
into it. Nobody is served later because of sharing: a request only follows one that goes before it.
Rejected: keys over the request's JSON, which differ where the request does not (field order,
`n` and `1`, a template that changed).
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any, NamedTuple

from headrace.types import Band, Sampling
from headrace.wire import pack, tokens_to_bytes

_DOMAIN = b"headrace-prompt-entry\x01"
"""Its last byte is the version: of the key, and of what is kept under it."""


class Rank(NamedTuple):
    """Who is served first: the lower one. Without ties, as far as sharing is concerned."""

    band: Band
    priority: int


class Joining(NamedTuple):
    """Whether a request waits for another's tokens, and why."""

    follows: bool
    reason: str


def is_deterministic(sampling: Sampling, *, seeded: bool) -> bool:
    """Whether the same request gets the same tokens: greedy ones do, and those with a seed."""
    return sampling.temperature == 0 or seeded


def request_key(
    fingerprint: str,
    salt: bytes,
    prompt: array[int],
    sampling: Sampling,
    reading: Sequence[Any],
) -> bytes:
    """The 32-byte name of a deterministic job's output.

    `reading` is what decides where its text ends, as plain values that msgpack knows.
    """
    digest = hashlib.sha256(_DOMAIN)
    for part in (
        fingerprint.encode(),
        salt,
        tokens_to_bytes(prompt),
        pack(_plain(_canonical(sampling))),
        pack(list(reading)),
    ):
        digest.update(len(part).to_bytes(8, "big"))
        digest.update(part)
    return digest.digest()


def may_follow(leader: Rank, follower: Rank) -> Joining:
    """Whether `follower` may wait for what `leader` computes already."""
    if leader.band > follower.band:
        return Joining(False, f"the other one is of a lower band, {leader.band.label}")
    if leader.band == follower.band and leader.priority > follower.priority:
        return Joining(False, f"the other one comes later in its band ({leader.priority})")
    return Joining(True, "the same request is being computed")


def _canonical(sampling: Sampling) -> Sampling:
    """The same sampling in one form. Greedy choice knows no randomness and no filters."""
    sampling = replace(
        sampling,
        stop_token_ids=tuple(sorted(set(sampling.stop_token_ids))),
        logit_bias=tuple(sorted(sampling.logit_bias)),
        bad_words=tuple(sorted(set(sampling.bad_words))),
    )
    if sampling.temperature == 0:
        return replace(sampling, seed=0, top_p=1.0, top_k=0, min_p=0.0, typical_p=1.0)
    return sampling


def _plain(sampling: Sampling) -> list[Any]:
    """Every field, so that none which is added later is forgotten; numbers of one type each."""
    values = [(field.type, getattr(sampling, field.name)) for field in fields(sampling)]
    # -0.0 is the number that 0.0 is
    return [float(value) + 0.0 if kind == "float" else value for kind, value in values]
