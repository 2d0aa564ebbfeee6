"""A job's grammar as the engine asks it: a library's bug ends its own job, never the engine.

Invariant: whatever a matcher raises leaves here as GrammarFailure, whose text a client may read.
"""

from __future__ import annotations

import numpy as np

from headrace.grammars import Matcher
from headrace_worker.runner import Mask


class GrammarFailure(Exception):
    """A job's grammar cannot say what comes next."""


def accept(matcher: Matcher, token: int) -> None:
    """Tells `matcher` of the next token. Raises GrammarFailure for one that does not match."""
    try:
        accepted = matcher.accept(token)
    except Exception as error:
        raise GrammarFailure(f"the grammar gave up: {error}") from error
    if not accepted:
        raise GrammarFailure(
            f"the grammar gave up: {matcher.failure or f'token {token} does not match'}"
        )


def forced(matcher: Matcher) -> list[int]:
    """The tokens that it leaves no choice about. Raises GrammarFailure."""
    try:
        return matcher.forced()
    except Exception as error:
        raise GrammarFailure(f"the grammar gave up: {error}") from error


def masks(matcher: Matcher, guess: tuple[int, ...] = ()) -> list[Mask]:
    """What is allowed next, and after each token of `guess` that is allowed itself.

    Raises GrammarFailure.
    """
    try:
        bits = matcher.masks(guess) if guess else [matcher.mask()]
    except Exception as error:
        raise GrammarFailure(f"the grammar gave up: {error}") from error
    return [np.frombuffer(each, np.int32) for each in bits]
