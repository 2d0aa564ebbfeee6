"""Encoding plain ASCII text word by word, each looked up: what the library says, in less time.

A byte-level BPE cuts a text into words by a pattern and encodes each by itself, so what a word
became once it becomes again; the library keeps that too, but walks its own structures around it.
Invariant: for every text that is taken, the ids are the library's. So only what is known exactly is
taken: patterns that are listed here, whose classes are spelled out for ASCII, added tokens that
match as they are written, and texts without other control characters than tabs and line ends. All
else is the library's. Rejected: a cache of whole prompts' beginnings, which spares a conversation's
past but nothing of what is new in it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from tokenizers import Tokenizer

WORDS_MAX = 65_536
"""Words kept; then all are forgotten, and those in use are soon there again."""
WORD_CHARS_MAX = 64
"""Longer ones come once."""

_PLAIN = re.compile(r"[\t\n\r -~]*")
_CALLS = "'s|'t|'re|'ve|'m|'ll|'d"
_GPT2 = rf"{_CALLS}| ?[A-Za-z]+| ?[0-9]+| ?[^\sA-Za-z0-9]+|\s+(?!\S)|\s+"
# digits are cut out before the pattern is applied to what lies between them
_GPT2_DIGITS = rf"{_CALLS}|[0-9]{{}}| ?[A-Za-z]+| ?[^\sA-Za-z0-9]+|\s+(?![^\s0-9])|\s+"
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_ASCII_OF = {
    pattern: pattern.replace(r"^\r\n\p{L}\p{N}", r"^\r\nA-Za-z0-9")
    .replace(r"\p{L}+", "[A-Za-z]+")
    .replace(r"^\s\p{L}\p{N}", r"^\sA-Za-z0-9")
    .replace(r"\p{N}", "[0-9]")
    for pattern in (_LLAMA3, _QWEN2)
}
"""Patterns of `Split`, as they are for ASCII."""
_NORMAL_FORMS = ("NFC", "NFD", "NFKC", "NFKD")
"""They leave ASCII as it is."""


def pattern_of(spec: Any) -> str | None:
    """How a tokenizer.json's `pre_tokenizer` cuts ASCII text; None where that is not known."""
    steps = spec.get("pretokenizers", []) if spec and spec.get("type") == "Sequence" else [spec]
    if not steps or not steps[-1] or steps[-1].get("type") != "ByteLevel":
        return None
    *before, last = steps
    if last.get("add_prefix_space", True):
        return None
    by_pattern = last.get("use_regex", True)
    if not before:
        return _GPT2 if by_pattern else None
    [first, *more] = before
    if more:
        return None
    if first.get("type") == "Digits" and by_pattern:
        return _GPT2_DIGITS.format("" if first.get("individual_digits") else "+")
    if first.get("type") == "Split" and not by_pattern:
        isolated = first.get("behavior") == "Isolated" and not first.get("invert")
        return _ASCII_OF.get(first["pattern"].get("Regex", "")) if isolated else None
    return None


def words_of(
    spec: dict[str, Any], tokenizer: Tokenizer, byte_chars: Mapping[int, str]
) -> Words | None:
    """The Words of a tokenizer with the tokenizer.json `spec`; None where they do not say it all.

    `byte_chars`: the character that its vocabulary has for each byte.
    """
    pattern = pattern_of(spec.get("pre_tokenizer"))
    model, normalizer = spec["model"], spec.get("normalizer")
    if pattern is None or model.get("type") != "BPE" or model.get("dropout"):
        return None
    if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        return None
    if normalizer is not None and normalizer.get("type") not in _NORMAL_FORMS:
        return None
    added = spec.get("added_tokens", [])
    if any(token["lstrip"] or token["rstrip"] or token["single_word"] for token in added):
        return None
    return Words(tokenizer, re.compile(pattern), added, byte_chars)


class Words:
    """What one tokenizer makes of words. `added` as in a tokenizer.json."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        pattern: re.Pattern[str],
        added: Sequence[dict[str, Any]],
        byte_chars: Mapping[int, str],
    ) -> None:
        self._model = tokenizer.model
        self._find = pattern.findall
        self._added = {token["content"]: (int(token["id"]),) for token in added}
        # those that are looked for in normalized text come after the others
        cuts = [
            _any_of(token["content"] for token in added if token["normalized"] is normalized)
            for normalized in (False, True)
        ]
        self._cuts = [cut for cut in cuts if cut is not None]
        self._byte_chars = byte_chars
        self._known: dict[str, tuple[int, ...]] = {}

    def encode(self, text: str) -> list[int] | None:
        """Token ids of `text`; None for one that is the library's."""
        if not _PLAIN.fullmatch(text):
            return None
        parts = [text]
        for cut in self._cuts:
            parts = [
                piece
                for part in parts
                for piece in ((part,) if part in self._added else cut.split(part))
            ]
        ids: list[int] = []
        known, added = self._known, self._added
        for part in parts:
            own = added.get(part)
            if own is not None:
                ids += own
                continue
            for word in self._find(part):
                ids += known.get(word) or self._learn(word)
        return ids

    def _learn(self, word: str) -> tuple[int, ...]:
        ids = tuple(token.id for token in self._model.tokenize(word.translate(self._byte_chars)))
        if len(word) <= WORD_CHARS_MAX:
            if len(self._known) >= WORDS_MAX:
                self._known.clear()
            self._known[word] = ids
        return ids

    def check_integrity(self) -> None:
        assert len(self._known) <= WORDS_MAX, "what is kept is bounded"
        assert all(len(word) <= WORD_CHARS_MAX for word in self._known)


def _any_of(contents: Any) -> re.Pattern[str] | None:
    """Finds any of `contents`, at each place the longest; None of none."""
    texts = sorted(filter(None, contents), key=len, reverse=True)
    return re.compile(f"({'|'.join(map(re.escape, texts))})") if texts else None
