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


RANK_SHIFT = 32
"""A priority is far below 2^31, and Redis' numbers are exact up to 2^53."""
CANCELLED_LOOKS_MAX = 2
"""Its tokens may still be on their way, and say to who reads that it needs no more."""
GONE_LOOKS_MAX = 2
DONE_LOOKS_MAX = 5
"""A job is done in the step that writes its finish: what reads the log has it long before."""


class Rank(NamedTuple):
    """Who is served first: the lower one. Without ties, as far as sharing is concerned."""

    band: Band
    priority: int

    @property
    def number(self) -> int:
        """The same order as one number, for who compares without knowing what it is made of."""
        return (int(self.band) << RANK_SHIFT) + self.priority


class Joining(NamedTuple):
    """Whether a request waits for another's tokens, and why."""

    follows: bool
    reason: str


class Look(NamedTuple):
    """What is known of a job that is followed on another gateway.

    `claimed`: it still stands where others find it; `known`: the queue has a record of it.
    """

    claimed: bool
    known: bool
    cancelled: bool = False
    done: bool = False


class Watched(NamedTuple):
    """What several looks in a row came to. `lost`: why its followers go on without it; else ''."""

    seen: bool = False
    doubts: int = 0
    lost: str = ""


def watch(before: Watched, look: Look) -> Watched:
    """Whether a job that is followed still makes tokens, or will.

    Its gateway's death alone changes nothing: a job that was accepted runs on in its worker.
    """
    if not look.known and not before.seen:
        # claimed first, accepted then: in between there is nothing to see
        return Watched(lost="" if look.claimed else "it was never accepted")
    doubts = before.doubts + 1
    if not look.known and doubts >= GONE_LOOKS_MAX:
        return Watched(True, doubts, "the queue has lost it")
    if look.known and look.done and doubts >= DONE_LOOKS_MAX:
        return Watched(True, doubts, "its finish has not come")
    if look.known and look.cancelled and not look.done and doubts >= CANCELLED_LOOKS_MAX:
        return Watched(True, doubts, "it was cancelled")
    doubtful = not look.known or look.done or look.cancelled
    return Watched(True, doubts if doubtful else 0)


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
