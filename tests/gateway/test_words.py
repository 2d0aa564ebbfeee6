"""Texts encoded word by word: the library's ids, or the library's work."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, trainers
from tokenizers import pre_tokenizers as cuts

from headrace_gateway import words
from headrace_gateway.tokens import _CHARACTERS
from headrace_gateway.words import Words, pattern_of, words_of

TAUGHT = "We'll see what they've got: the mill's 1234 wheels, 56 races,\n\n  and I'd say it's IT'S!"
SPECIAL = ("<|im_start|>", "<|im_end|>", "<|im_end|>>")
BYTE_LEVEL = cuts.ByteLevel(add_prefix_space=False, use_regex=False)
BY_PATTERN = cuts.ByteLevel(add_prefix_space=False)
WAYS: dict[str, Any] = {
    "gpt2": BY_PATTERN,
    "each digit": cuts.Sequence([cuts.Digits(individual_digits=True), BY_PATTERN]),
    "digits": cuts.Sequence([cuts.Digits(individual_digits=False), BY_PATTERN]),
    "llama3": cuts.Sequence([cuts.Split(Regex(words._LLAMA3), "isolated"), BYTE_LEVEL]),
    "qwen2": cuts.Sequence([cuts.Split(Regex(words._QWEN2), "isolated"), BYTE_LEVEL]),
}


@cache
def made(way: str) -> tuple[Tokenizer, Words]:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = WAYS[way]
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=360,
        initial_alphabet=sorted(cuts.ByteLevel.alphabet()),
        special_tokens=list(SPECIAL),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TAUGHT * 3], trainer)
    tokenizer.add_tokens([AddedToken("<tool>", normalized=True), AddedToken("  ", normalized=True)])
    found = words_of(json.loads(tokenizer.to_str()), tokenizer, _CHARACTERS)
    assert found is not None, "its words are known"
    return tokenizer, found


pieces = st.one_of(
    st.sampled_from([*SPECIAL, "<tool>", "'s", "'LL", "'ve", "\r\n", "  ", "\t", " 007", "\u017f"]),
    st.text(st.characters(max_codepoint=0x7E), max_size=8),
)


@pytest.mark.parametrize("way", WAYS)
@given(parts=st.lists(pieces, max_size=12))
@example(parts=["hello ", "12", " 3 ", "\n", " \n x"])
@settings(max_examples=150, deadline=None)
def test_words_make_what_the_library_makes(way: str, parts: list[str]) -> None:
    """Whatever stands beside what: spaces before digits, added tokens within others, line ends."""
    tokenizer, known = made(way)
    text = "".join(parts)
    found = known.encode(text)
    if found is None:
        assert not text.isascii() or any(ord(each) < 32 for each in text), "plain text is taken"
    else:
        assert found == tokenizer.encode(text, add_special_tokens=False).ids
    known.check_integrity()


def test_many_words_are_forgotten_and_learned_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is kept is bounded; what was forgotten means the same."""
    monkeypatch.setattr(words, "WORDS_MAX", 4)
    tokenizer, known = made("gpt2")
    known._known.clear()
    text = "a mill and its wheels turn on " + "w" * 200
    for _ in range(2):
        assert known.encode(text) == tokenizer.encode(text, add_special_tokens=False).ids
        known.check_integrity()


@pytest.mark.parametrize(
    "spec",
    [
        None,
        json.loads(cuts.ByteLevel(add_prefix_space=True).__getstate__()),
        json.loads(cuts.Metaspace().__getstate__()),
        json.loads(cuts.Sequence([cuts.Whitespace(), BYTE_LEVEL]).__getstate__()),
        json.loads(cuts.Sequence([cuts.Split(Regex("a+"), "isolated"), BYTE_LEVEL]).__getstate__()),
        json.loads(
            cuts.Sequence([cuts.Split(Regex(words._QWEN2), "removed"), BYTE_LEVEL]).__getstate__()
        ),
    ],
)
def test_ways_that_are_not_known_are_the_librarys(spec: Any) -> None:
    assert pattern_of(spec) is None


def test_a_token_that_eats_the_space_beside_it_is_the_librarys() -> None:
    tokenizer, _ = made("gpt2")
    spec = json.loads(tokenizer.to_str())
    spec["added_tokens"][0]["lstrip"] = True
    assert words_of(spec, tokenizer, _CHARACTERS) is None
