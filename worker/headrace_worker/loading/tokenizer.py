"""A GGUF file's tokenizer as the `tokenizers` library's JSON.

Invariant: the same tokens as the reference implementation's tokenizer from the same file, for any
text. A kind whose splitting rule is not known here is refused by name: a wrong split still gives
tokens, and answers that are quietly worse.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from headrace.errors import ModelError
from headrace_worker.loading.source import TokenizerFacts

_CONTROL, _USER_DEFINED = 3, 4
"""GGUF token types that stand for themselves in a text."""

_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2_SPLIT = _LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")

_Split = pre_tokenizers.PreTokenizer


def _gpt2() -> _Split:
    return pre_tokenizers.ByteLevel(add_prefix_space=False)


def _smollm() -> _Split:
    """Digits first, then GPT-2's rule: as the checkpoint's own tokenizer.json has it."""
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _gpt2()])


def _by(pattern: str) -> _Split:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


SPLITS: dict[str, Callable[[], _Split]] = {
    "gpt-2": _gpt2,
    "smollm": _smollm,
    "llama-bpe": partial(_by, _LLAMA3_SPLIT),
    "qwen2": partial(_by, _QWEN2_SPLIT),
}
"""Splitting rule by `tokenizer.ggml.pre`."""


def from_gguf(metadata: Mapping[str, Any]) -> TokenizerFacts:
    """Raises ModelError for a kind that is not in `SPLITS`, or fields that are missing."""
    model, pre = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre")
    if model != "gpt2" or pre not in SPLITS:
        raise ModelError(
            f"tokenizer {model!r} with pre-tokenizer {pre!r} is not supported; "
            f"supported: 'gpt2' with {', '.join(SPLITS)}",
            code="tokenizer",
        )
    tokens: list[str] = _list(metadata, "tokenizer.ggml.tokens")
    tokenizer = _byte_level(tokens, _list(metadata, "tokenizer.ggml.merges"), SPLITS[pre]())
    _add_whole_tokens(tokenizer, tokens, metadata.get("tokenizer.ggml.token_type") or ())

    def token_id(key: str) -> int | None:
        value = metadata.get(f"tokenizer.ggml.{key}_token_id")
        return value if isinstance(value, int) and 0 <= value < len(tokens) else None

    named = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    ids = {name: token_id(key) for name, key in named.items()}
    ends = [ids["eos"], token_id("eot"), token_id("eom")]
    return TokenizerFacts(
        json=tokenizer.to_str().encode(),
        eos_token_ids=tuple(dict.fromkeys(end for end in ends if end is not None)),
        bos_token_id=ids["bos"],
        add_bos=bool(metadata.get("tokenizer.ggml.add_bos_token", False)),
        chat_template=str(metadata.get("tokenizer.chat_template", "")),
        template_tokens={f"{name}_token": tokens[i] for name, i in ids.items() if i is not None},
    )


def _list(metadata: Mapping[str, Any], key: str) -> list[str]:
    value = metadata.get(key)
    if not isinstance(value, list):
        raise ModelError(f"the file has no {key}", code="tokenizer")
    return value


def _byte_level(tokens: Sequence[str], merges: Sequence[str], split: _Split) -> Tokenizer:
    pairs = []
    for merge in merges:
        left, _, right = merge.partition(" ")
        pairs.append((left, right))
    vocab = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=pairs))
    tokenizer.pre_tokenizer = split
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _add_whole_tokens(tokenizer: Tokenizer, tokens: Sequence[str], types: Sequence[int]) -> None:
    """Tokens that are never cut into pieces; control tokens are special, others plain."""
    alphabet = set(pre_tokenizers.ByteLevel.alphabet())
    control, plain = [], []
    for token, kind in zip(tokens, types, strict=False):
        # a control token outside the byte alphabet is a mislabelled one: matching it would
        # take text that the model has other tokens for
        if kind == _CONTROL and set(token) <= alphabet:
            control.append(AddedToken(token, normalized=False, special=True))
        elif kind == _USER_DEFINED:
            plain.append(AddedToken(token, normalized=False, special=False))
    tokenizer.add_special_tokens(control)
    tokenizer.add_tokens(plain)
