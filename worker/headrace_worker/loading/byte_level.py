"""Byte-level BPE from a GGUF file: GPT-2's kind, under the splitting rule that the file names.

Invariant: the rules are those of the models' own tokenizer.json, normalizer included, and not
llama.cpp's, which leaves normalizing out and bends the patterns to what its engine can match.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_HEAD, _UPPER, _LOWER = (
    r"[^\r\n\p{L}\p{N}]?",
    r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]",
    r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]",
)
_SUFFIX = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_TEKKEN = rf"{_HEAD}{_UPPER}*{_LOWER}+|{_HEAD}{_UPPER}+{_LOWER}*|\p{{N}}{_TAIL}"
_GPT4O = (
    rf"{_HEAD}{_UPPER}*{_LOWER}+{_SUFFIX}|{_HEAD}{_UPPER}+{_LOWER}*{_SUFFIX}|\p{{N}}{{1,3}}{_TAIL}"
)

_Split = pre_tokenizers.PreTokenizer


def _gpt2() -> _Split:
    return pre_tokenizers.ByteLevel(add_prefix_space=False)


def _digits_first() -> _Split:
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _gpt2()])


def _by(pattern: str) -> _Split:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


@dataclass(frozen=True, slots=True)
class Rule:
    """How text becomes words, and words tokens.

    `whole_words`: a word that is a token is one, whatever its merges would give. `nfc`: text is
    composed first. `add_bos`: whether prompts begin with BOS where the file does not say.
    """

    split: Callable[[], _Split]
    whole_words: bool = False
    nfc: bool = False
    add_bos: bool = False


_LLAMA3_RULE = Rule(partial(_by, _LLAMA3), whole_words=True, add_bos=True)

RULES: dict[str, Rule] = {
    "gpt-2": Rule(_gpt2),
    "smollm": Rule(_digits_first),
    "llama3": _LLAMA3_RULE,
    "llama-v3": _LLAMA3_RULE,
    "llama-bpe": _LLAMA3_RULE,
    "falcon3": _LLAMA3_RULE,
    "pixtral": _LLAMA3_RULE,
    "smaug-bpe": Rule(partial(_by, _LLAMA3)),
    "dbrx": Rule(partial(_by, _LLAMA3)),
    "qwen2": Rule(partial(_by, _QWEN2), nfc=True),
    "tekken": Rule(partial(_by, _TEKKEN), whole_words=True, add_bos=True),
    "gpt-4o": Rule(partial(_by, _GPT4O)),
}
"""By `tokenizer.ggml.pre`. dbrx is what files of Phi-4 say, gpt-4o those of Phi-4-mini."""


def byte_level(tokens: Sequence[str], merges: Sequence[str], rule: Rule) -> Tokenizer:
    """The tokenizer without its special tokens. The library's errors come through."""
    pairs = []
    for merge in merges:
        left, _, right = merge.partition(" ")
        pairs.append((left, right))
    vocab = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=pairs, ignore_merges=rule.whole_words))
    if rule.nfc:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = rule.split()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer
