"""One job's state for choosing: its options as arrays, and what they need to know of its text.

Invariant: everything asked of it is a function of the job's tokens and the draft; what is cached
only saves counting them again, so that a job which comes back after a preemption, or on another
worker, chooses the same.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from headrace.types import NO_LOGPROBS, Sampling
from headrace_worker.native.draws import can_draw, options_of
from headrace_worker.sampling.filters import is_plain
from headrace_worker.sampling.ranking import Floats, Indices
from headrace_worker.sampling.tally import Tally

_NONE: Indices = np.empty(0, np.int64)


class Choosing:
    """How one job chooses its tokens.

    `tokens` is the job's live list, prompt and output, of which `prompt_tokens` are the prompt; it
    grows at its end and is never written here. `ends` are the token ids that end the job. Token ids
    in `sampling` are below `vocab_size` (see `limits.refuse`).
    """

    __slots__ = (
        "_counted",
        "_ends",
        "_prompt_tokens",
        "_tally",
        "_tokens",
        "_words",
        "_words_banned",
        "_words_prefix_max",
        "bias",
        "draws",
        "edits",
        "native",
        "options",
        "sampling",
        "unfiltered",
        "wants_logprobs",
    )

    def __init__(
        self,
        sampling: Sampling,
        tokens: Sequence[int],
        prompt_tokens: int,
        ends: frozenset[int],
        vocab_size: int,
    ) -> None:
        s = self.sampling = sampling
        self._tokens = tokens
        self._prompt_tokens = prompt_tokens
        self._ends = _ids(token for token in sorted(ends) if 0 <= token < vocab_size)
        self.bias: tuple[Indices, Floats] | None = None
        if s.logit_bias:
            ids, biases = zip(*s.logit_bias, strict=True)
            self.bias = _ids(ids), np.array(biases, np.float32)
        self._words_banned = _ids(word[0] for word in s.bad_words if len(word) == 1)
        self._words = _by_last_but_one(s.bad_words)
        self._words_prefix_max = max((len(word) for word in s.bad_words), default=1) - 1
        self._tally: Tally | None = None
        if s.repetition_penalty != 1:
            self._tally = Tally(tokens[:prompt_tokens])
        elif s.presence_penalty or s.frequency_penalty:
            self._tally = Tally()
        self._counted = prompt_tokens
        self.edits = bool(s.logit_bias or s.bad_words or self._tally)
        """Whether logits change at every position; see `holds_ends` for the others."""
        self.unfiltered = is_plain(s, vocab_size)
        self.draws = s.temperature > 0
        self.native = can_draw(s, vocab_size)
        """Whether the kernels, where they are, can choose; `options` is what they are told."""
        self.options = options_of(s, vocab_size)
        self.wants_logprobs = s.logprobs != NO_LOGPROBS

    def position(self, draft: Sequence[int]) -> int:
        """Output position of the token after `draft`."""
        return len(self._tokens) - self._prompt_tokens + len(draft)

    def holds_ends(self, draft: Sequence[int]) -> bool:
        """Whether the token after `draft` comes too early for an end."""
        return self.sampling.min_tokens > 0 and self.position(draft) < self.sampling.min_tokens

    def ends_banned(self, draft: Sequence[int]) -> Indices:
        """Ids of the ends that `min_tokens` forbids after `draft`."""
        return self._ends if self.holds_ends(draft) else _NONE

    def words_banned(self, draft: Sequence[int]) -> Indices:
        """Ids of the tokens that would complete a bad word after `draft`."""
        if not self._words:
            return self._words_banned
        said = self._tail(draft, self._words_prefix_max)
        last = [
            token
            for prefix, token in self._words.get(said[-1] if said else -1, ())
            if said[-len(prefix) :] == prefix
        ]
        return np.concatenate([self._words_banned, _ids(last)]) if last else self._words_banned

    def counts(self, draft: Sequence[int]) -> tuple[Indices, NDArray[np.float64]] | None:
        """(ids, output counts) of the tokens that penalties look at; None without penalties."""
        if self._tally is None:
            return None
        self._tally.add(self._tokens[self._counted :])
        self._counted = len(self._tokens)
        return self._tally.with_draft(draft)

    def _tail(self, draft: Sequence[int], count: int) -> tuple[int, ...]:
        """The last `count` output tokens, `draft` included; fewer where the output is shorter."""
        start = max(self._prompt_tokens, len(self._tokens) + len(draft) - count)
        return (*self._tokens[start:], *draft)[-count:]


def _ids(tokens: Iterable[int]) -> Indices:
    return np.fromiter(tokens, dtype=np.int64)


def _by_last_but_one(
    words: Sequence[tuple[int, ...]],
) -> dict[int, list[tuple[tuple[int, ...], int]]]:
    """(all but the last token, the last one) of the words of several tokens, by their last but one.

    So that a step looks only at the words that its newest token may belong to.
    """
    found: dict[int, list[tuple[tuple[int, ...], int]]] = defaultdict(list)
    for word in words:
        if len(word) > 1:
            found[word[-2]].append((word[:-1], word[-1]))
    return dict(found)
