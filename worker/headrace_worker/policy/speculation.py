"""Speculation by prompt lookup: guess that what followed these tokens before follows them again.

A guess is checked by the same forward pass that would compute one token, one row for each guessed
token; it stands as far as it equals what the sampler draws for those rows. As the draw depends on
(seed, position) alone, the text is the one that would have come without guessing, greedy or not;
a guess is a point mass, for which this is exactly rejection sampling (Leviathan et al., "Fast
Inference from Transformers via Speculative Decoding", 2023). The lookup is that of Saxena, "Prompt
Lookup Decoding", 2023.

Invariant: whether guessing pays is measured, not assumed. `Economy` knows what a row more costs
here and now, `Guesser` how often guesses of its sequence came true; a guess is as long as its
expected tokens are worth more than its rows, and no guess is made where none is. Rejected: a fixed
length, which on a busy CPU makes every stream slower.
"""

from __future__ import annotations

from collections.abc import Sequence

GUESS_TOKENS_MAX = 8
GRAM_SIZES = (4, 3, 2)
"""How many of the last tokens have to have stood together before; the longest is tried first."""
PROBE_EVERY_TOKENS = 48
"""A sequence whose guesses do not pay tries one again after so many tokens."""
PROBE_TOKENS = 2
INDEXED_TOKENS_MAX = 8_192
"""How much of a prompt, counted from its end, is looked at: an index is half a kilobyte a token."""
PLAIN_EVERY_STEPS = 64
"""At least one step of so many goes without guesses, to know what that costs."""

_SMOOTHING = 0.1
_RATE_SMOOTHING = 0.15
_FIRST_RATE = 0.6


class Economy:
    """What guessing costs in one engine. Times are milliseconds of pure decoding steps."""

    def __init__(self) -> None:
        self._plain_ms: dict[int, float] = {}
        self._row_ms = 0.0
        self._since_plain = 0

    def note(self, sequences: int, guessed: int, step_ms: float) -> None:
        """A step of `sequences` decoding ones, `guessed` rows more than without guessing."""
        size = sequences.bit_length()
        step_ms = max(0.0, step_ms)  # wall clocks are set back now and then
        plain_ms = self._plain_ms.get(size)
        if not guessed:
            self._since_plain = 0
            self._plain_ms[size] = _smoothed(plain_ms, step_ms)
        elif plain_ms is not None:
            self._since_plain += 1
            row_ms = max(0.0, step_ms - plain_ms) / guessed
            self._row_ms = _smoothed(self._row_ms, row_ms)

    def price(self, sequences: int) -> float | None:
        """What a guessed row costs, in tokens; None when a step without guesses is due."""
        plain_ms = self._plain_ms.get(sequences.bit_length())
        if plain_ms is None or self._since_plain >= PLAIN_EVERY_STEPS:
            return None
        token_ms = plain_ms / sequences
        return self._row_ms / token_ms if token_ms else 0.0


class Guesser:
    """Guesses for one sequence, whose tokens only grow."""

    def __init__(self) -> None:
        self._after: dict[tuple[int, ...], int] = {}
        self._indexed = 0
        self._rate = _FIRST_RATE
        self._silent_until = 0

    def guess(self, tokens: Sequence[int], price: float, limit: int) -> tuple[int, ...]:
        """What may follow `tokens`, at most `limit` long; () when nothing is known or pays."""
        length = min(self._length(price), limit)
        if length <= 0:
            if len(tokens) < self._silent_until or limit <= 0:
                return ()
            self._silent_until = len(tokens) + PROBE_EVERY_TOKENS
            length = min(PROBE_TOKENS, limit)
        start = self._lookup(tokens)
        if start is None:
            return ()
        period = len(tokens) - start
        return tuple(tokens[start + at % period] for at in range(length))

    def note(self, guessed: int, accepted: int) -> None:
        """How far the last guess came true."""
        for came_true in [True] * accepted + [False] * (accepted < guessed):
            self._rate += _RATE_SMOOTHING * (came_true - self._rate)

    def _length(self, price: float) -> int:
        """The longest guess of which the last token is expected to be worth its row."""
        length, chance = 0, self._rate
        while length < GUESS_TOKENS_MAX and chance > price:
            length += 1
            chance *= self._rate
        return length

    def _lookup(self, tokens: Sequence[int]) -> int | None:
        """Where the latest earlier occurrence of the last tokens was followed by something."""
        for end in range(max(1, self._indexed, len(tokens) - INDEXED_TOKENS_MAX), len(tokens)):
            for size in GRAM_SIZES:
                if size <= end:
                    self._after[tuple(tokens[end - size : end])] = end
        self._indexed = len(tokens)
        for size in GRAM_SIZES:
            start = self._after.get(tuple(tokens[-size:]))
            if start is not None and size < len(tokens):
                return start
        return None


def _smoothed(before: float | None, now: float) -> float:
    return now if before is None else before + _SMOOTHING * (now - before)
