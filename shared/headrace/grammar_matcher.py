"""One text on its way through a compiled grammar, token by token.

Invariant: what may come next is a function of the tokens accepted so far, however they came. A run
of forced tokens is computed where it begins and stands until it is through or left: computing it
again at each token would spell the same text in other tokens now and then, and costs the square
of its length.

Rejected: a copy of the matcher for each draft (it grows with the text: 0.3 ms after 16,000 tokens,
where going back takes a microsecond).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from llguidance import LLMatcher, LLTokenizer

from headrace.errors import CallerError
from headrace.types import ModelRecord

FORCED_TOKENS_MAX = 512
"""In one call of `Matcher.forced`; a grammar may force a text without end."""

_SAMPLE = '{"a": [1, 20, "ß 漢\\n"]}  f(x)\n'
_PLAIN_NORMALIZERS = frozenset({"Replace", "Prepend", "ByteLevel"})


class Vocabulary:
    """A model's tokens as llguidance needs them. Immutable, shared by all matchers of the model."""

    def __init__(self, record: ModelRecord) -> None:
        """Raises CallerError `grammar_unsupported` when the tokenizer cannot be used."""
        self.size = record.vocab_size
        self.mask_bytes = (record.vocab_size + 31) // 32 * 4
        try:
            facts = _reversible(json.loads(record.tokenizer_json))
            tokens = _token_count(facts)
            self.ends = frozenset(record.eos_token_ids) & set(range(min(tokens, self.size)))
            self.tokenizer = _read(facts, tokens, self.size, self.ends)
            sample = self.tokenizer.tokenize_str(_SAMPLE)
            if self.tokenizer.decode_str(sample) != _SAMPLE:
                raise ValueError("its tokens do not spell the text they were made from")
        except Exception as error:
            raise _unsupported(record, error) from error
        except BaseException as error:
            # a panic inside the library is no Exception, and no reason to end the process
            if type(error).__name__ != "PanicException":
                raise
            raise _unsupported(record, error) from error
        self.end_mask = self._mask_of(self.ends)
        self.real = (1 << min(tokens, self.size)) - 1
        """The bits of tokens that the model can say."""
        self.written_ends = self._bits(
            end for end in self.ends if not self.tokenizer.is_special_token(end)
        )
        """Bits of the ends that are also part of texts; within a text they are not allowed."""

    @staticmethod
    def _bits(tokens: Iterable[int]) -> int:
        return sum(1 << token for token in tokens)

    def _mask_of(self, tokens: Iterable[int]) -> bytes:
        return self._bits(tokens).to_bytes(self.mask_bytes, "little")

    def only(self, token: int) -> bytearray:
        """The mask that allows `token` alone."""
        return bytearray(self._mask_of([token]))

    def mask(self, computed: bytes, *, may_end: bool) -> bytearray:
        """What the library computed, without tokens that the model cannot say here."""
        keep = self.real if may_end else self.real & ~self.written_ends
        bits = int.from_bytes(computed, "little") & keep
        return bytearray(bits.to_bytes(self.mask_bytes, "little"))


def _read(facts: dict[str, Any], tokens: int, size: int, ends: Iterable[int]) -> LLTokenizer:
    if not ends:
        # the library wants an end; this one is no token of the model's
        unseen = {"id": tokens, "content": "<|no end|>", "special": True, "normalized": False}
        unseen |= dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
        facts = facts | {"added_tokens": [*facts.get("added_tokens", ()), unseen]}
        ends = [tokens]
    return LLTokenizer(json.dumps(facts), n_vocab=max(tokens + 1, size), eos_token=sorted(ends))


def _unsupported(record: ModelRecord, error: BaseException) -> CallerError:
    return CallerError(
        f"structured output is not available with {record.name}: {error}",
        code="grammar_unsupported",
    )


def _token_count(facts: dict[str, Any]) -> int:
    """Tokens of a `tokenizers` JSON, added ones included."""
    vocab = facts["model"]["vocab"]  # {text: id}, or [[text, score], …]
    texts = set(vocab) if isinstance(vocab, dict) else {text for text, _ in vocab}
    return len(texts | {added["content"] for added in facts.get("added_tokens") or ()})


def _reversible(facts: dict[str, Any]) -> dict[str, Any]:
    """The tokenizer without what would make its tokens spell another text than they were given.

    Forced text is spelled as it stands: no Unicode normalization, no space in front, nothing cut.
    """
    return facts | {
        "truncation": None,
        "padding": None,
        "normalizer": _plain_normalizer(facts.get("normalizer")),
        "pre_tokenizer": _without_prefix(facts.get("pre_tokenizer")),
    }


def _plain_normalizer(normalizer: dict[str, Any] | None) -> dict[str, Any] | None:
    if normalizer is None:
        return None
    if normalizer["type"] == "Sequence":
        kept = [_plain_normalizer(each) for each in normalizer["normalizers"]]
        return normalizer | {"normalizers": [each for each in kept if each is not None]}
    return normalizer if normalizer["type"] in _PLAIN_NORMALIZERS else None


def _without_prefix(pre_tokenizer: dict[str, Any] | None) -> dict[str, Any] | None:
    if pre_tokenizer is None:
        return None
    if pre_tokenizer["type"] == "Sequence":
        kept = [_without_prefix(each) for each in pre_tokenizer["pretokenizers"]]
        return pre_tokenizer | {"pretokenizers": kept}
    changed = {"add_prefix_space": False} if "add_prefix_space" in pre_tokenizer else {}
    return pre_tokenizer | changed


def clear_message(message: str) -> str:
    """What llguidance says, without its marks for what it leaves out."""
    if message.startswith("NoExtensionBias"):
        return "no text matches the grammar"
    return message.removesuffix("<non-verbose/>").strip()


class Matcher:
    """The state of one text. For one thread at a time; others may use the same grammar meanwhile.

    Rows of masks are int32 words [ceil(vocab_size / 32)] in little-endian bytes; token t is bit
    t % 32 of word t // 32. `np.frombuffer(mask, np.int32)` reads one; the caller owns it.
    """

    def __init__(
        self, compiled: LLMatcher, vocabulary: Vocabulary, on_failure: Callable[[], None]
    ) -> None:
        self._compiled = compiled
        self._inner = compiled.deep_copy()
        self._vocabulary = vocabulary
        self._on_failure = on_failure
        self._tokens: list[int] = []
        self._pending: list[int] | None = None
        """Tokens forced from here on; None where that has not been looked at."""
        self._over = False
        self.failure = ""
        """Why the grammar gave up, such as for lack of fuel; '' while it has not."""

    def mask(self) -> bytearray:
        """The tokens that may come next; where one is forced, that one alone.

        All zero after a failure.
        """
        if self._over:
            return bytearray(self._vocabulary.end_mask)
        pending = self._forced_here()
        mask = self._vocabulary.only(pending[0]) if pending else self._computed()
        if self._fails():
            return bytearray(self._vocabulary.mask_bytes)
        return mask

    def accept(self, token: int) -> bool:
        """Takes `token` if the grammar allows it; if not, returns False and has changed nothing.

        It also takes what spells the forced text in other tokens than the mask has.
        """
        if self.failure or not self._advance(token):
            self._fails()
            return False
        self._tokens.append(token)
        return True

    def forced(self) -> list[int]:
        """The tokens that must come next, [] where there is room: at most FORCED_TOKENS_MAX.

        They spell, as the model's tokenizer would, the only text that the grammar allows here, up
        to where the last of them might have merged with what follows. Never an end token. After
        accepting them the text is a beginning of one that the grammar allows. The same tokens so
        far force the same tokens, and after the first n of a run the rest of it is forced.
        """
        before = self._pending, self._over
        run: list[int] = []
        while len(run) < FORCED_TOKENS_MAX and not self._over:
            pending = self._forced_here()
            if not pending or pending[0] in self._vocabulary.ends or not self._advance(pending[0]):
                break
            run.append(pending[0])
        self._go_back(len(run), before)
        return [] if self.failure else run

    def masks(self, draft: Sequence[int]) -> list[bytearray]:
        """Masks before draft[0], after draft[0], and so on, up to the first token that is refused.

        The state stays as it is, also when a draft leads to where the grammar gives up.
        """
        rows = [self.mask()]
        before = self._pending, self._over
        taken = 0
        for token in draft:
            if self.failure or token in self._vocabulary.ends or not self._advance(token):
                break
            taken += 1
            pending = self._forced_here()
            row = self._vocabulary.only(pending[0]) if pending else self._computed()
            if self._inner.is_error():
                break
            rows.append(row)
        self._go_back(taken, before)
        return rows

    @property
    def ended(self) -> bool:
        """Whether nothing but an end may follow."""
        if self._over:
            return True
        if self._fails() or not self._inner.is_accepting():
            return False
        return self._inner.is_stopped() or self.mask() == self._vocabulary.end_mask

    def _forced_here(self) -> list[int]:
        if self._pending is None:
            self._pending = self._inner.compute_ff_tokens()
        return self._pending

    def _computed(self) -> bytearray:
        computed = self._inner.compute_bitmask()
        return self._vocabulary.mask(computed, may_end=self._inner.is_accepting())

    def _advance(self, token: int) -> bool:
        if not 0 <= token < self._vocabulary.size:
            return False
        if token in self._vocabulary.ends and (self._over or self._inner.is_accepting()):
            self._over = True
            return True
        pending = self._forced_here()
        if self._over or self._vocabulary.written_ends >> token & 1:
            return False
        if not self._inner.try_consume_tokens([token]):
            return False
        self._pending = pending[1:] if pending[:1] == [token] and len(pending) > 1 else None
        return True

    def _go_back(self, tokens: int, before: tuple[list[int] | None, bool]) -> None:
        """Back by `tokens` that were only tried."""
        if self._inner.is_error() or (tokens and not self._inner.rollback(tokens)):
            self._inner = self._compiled.deep_copy()
            spoken = [token for token in self._tokens if token not in self._vocabulary.ends]
            self._inner.try_consume_tokens(spoken)
        self._pending, self._over = before
        self._fails()

    def _fails(self) -> bool:
        """Whether the grammar gave up, noticing it the first time."""
        if not self.failure and self._inner.is_error():
            self.failure = clear_message(self._inner.get_error()) or "no reason given"
            self._on_failure()
        return bool(self.failure)
