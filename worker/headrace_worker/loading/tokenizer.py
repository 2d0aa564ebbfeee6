"""A GGUF file's tokenizer as the `tokenizers` library's JSON.

Invariant: the same tokens as the model's own tokenizer gives, for any text. A kind whose rules are
not known here is refused by name: a wrong split still gives tokens, and answers that are quietly
worse.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from tokenizers import AddedToken, Tokenizer

from headrace.errors import ModelError
from headrace_worker.loading.byte_level import RULES, byte_level
from headrace_worker.loading.sentencepiece import (
    CONTROL,
    NORMAL,
    UNKNOWN,
    USER_DEFINED,
    Pieces,
    by_position,
    by_score,
    sentencepiece,
)
from headrace_worker.loading.source import TokenizerFacts

_ENDS = frozenset(
    {
        "<|endoftext|>",
        "<|end_of_text|>",
        "<|eot_id|>",
        "<|eom_id|>",
        "<|im_end|>",
        "<|end|>",
        "<end_of_turn>",
    }
)
"""Tokens that end a generation whatever the file says: many name one end and mean two."""

_KEEPS_SPACES = frozenset({"<unk>", "<s>", "<|endoftext|>"})
"""Phi-3's special tokens swallow the whitespace after them, these excepted."""


def from_gguf(metadata: Mapping[str, Any], vocab_size: int) -> TokenizerFacts:
    """The tokenizer and the ids that go with it.

    `vocab_size`: rows of the embedding. Raises ModelError for a kind that is not known, and for
    fields that are missing or contradict each other.
    """
    pieces = _pieces(metadata)
    if len(pieces.texts) > vocab_size:
        raise ModelError(
            f"the file has {len(pieces.texts)} tokens and embeddings for {vocab_size}",
            code="tokenizer",
        )
    kind, pre = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre")
    if not (kind == "llama" or (kind == "gpt2" and pre in RULES)):
        raise ModelError(
            f"tokenizer {kind!r} with pre-tokenizer {pre!r} is not supported; "
            f"supported: 'llama' (SentencePiece), and 'gpt2' with {', '.join(sorted(RULES))}",
            code="tokenizer",
        )
    add_bos = True if kind == "llama" else RULES[str(pre)].add_bos
    try:
        tokenizer = (
            _sentencepiece(metadata, pieces)
            if kind == "llama"
            else byte_level(
                pieces.texts, _texts(metadata, "tokenizer.ggml.merges"), RULES[str(pre)]
            )
        )
        swallow = kind == "llama" and metadata.get("general.architecture") == "phi3"
        _add_whole_tokens(tokenizer, pieces, swallow=swallow)
        json = tokenizer.to_str().encode()
    except ModelError:
        raise
    except Exception as error:  # the library raises bare Exception for whatever does not fit
        raise ModelError(f"the file's tokenizer is broken: {error}", code="tokenizer") from error
    return _facts(metadata, pieces, json, add_bos=add_bos)


def _pieces(metadata: Mapping[str, Any]) -> Pieces:
    texts = _texts(metadata, "tokenizer.ggml.tokens")
    types = _numbers(metadata, "tokenizer.ggml.token_type", len(texts), NORMAL)
    pieces = Pieces(texts, types, _numbers(metadata, "tokenizer.ggml.scores", len(texts), 0.0))
    if metadata.get("general.architecture") == "gemma3":
        return pieces.spaces_spelled()
    return pieces


def _texts(metadata: Mapping[str, Any], key: str) -> list[str]:
    value = metadata.get(key)
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise ModelError(f"the file has no {key}", code="tokenizer")
    return value


def _numbers(metadata: Mapping[str, Any], key: str, count: int, default: Any) -> list[Any]:
    value = metadata.get(key)
    if value is None:
        return [default] * count
    numbers = isinstance(value, list) and all(isinstance(v, int | float) for v in value)
    if not numbers or len(value) != count or not all(map(math.isfinite, value)):
        raise ModelError(f"{key} does not hold a number for each token", code="tokenizer")
    return list(value)


def _token_id(metadata: Mapping[str, Any], key: str, count: int) -> int | None:
    value = metadata.get(f"tokenizer.ggml.{key}_token_id")
    usable = isinstance(value, int) and not isinstance(value, bool) and 0 <= value < count
    return value if usable else None


def _sentencepiece(metadata: Mapping[str, Any], pieces: Pieces) -> Tokenizer:
    unknown = _token_id(metadata, "unknown", len(pieces.texts))
    if unknown is None and UNKNOWN in pieces.types:
        unknown = pieces.types.index(UNKNOWN)
    gemma = metadata.get("general.architecture") == "gemma3"
    return sentencepiece(
        pieces,
        None if unknown is None else pieces.texts[unknown],
        rank=by_position if gemma else by_score,
        space_prefix=bool(metadata.get("tokenizer.ggml.add_space_prefix", not gemma)),
    )


def _add_whole_tokens(tokenizer: Tokenizer, pieces: Pieces, *, swallow: bool) -> None:
    """Tokens that are never cut into pieces: control tokens are special, others plain."""
    special: list[AddedToken] = []
    plain: list[AddedToken] = []
    for text, kind in zip(pieces.texts, pieces.types, strict=True):
        if kind not in (CONTROL, UNKNOWN, USER_DEFINED) or not text:
            continue
        added = AddedToken(
            text,
            normalized=False,
            special=kind != USER_DEFINED,
            rstrip=swallow and text not in _KEEPS_SPACES,
        )
        (plain if kind == USER_DEFINED else special).append(added)
    tokenizer.add_special_tokens(special)
    tokenizer.add_tokens(plain)


def _facts(
    metadata: Mapping[str, Any], pieces: Pieces, json: bytes, *, add_bos: bool
) -> TokenizerFacts:
    texts = pieces.texts
    named = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    ids = {name: _token_id(metadata, key, len(texts)) for name, key in named.items()}
    template = metadata.get("tokenizer.chat_template")
    return TokenizerFacts(
        json=json,
        eos_token_ids=_ends(metadata, pieces),
        bos_token_id=ids["bos"],
        add_bos=bool(metadata.get("tokenizer.ggml.add_bos_token", add_bos)),
        chat_template=template if isinstance(template, str) else "",
        template_tokens={f"{name}_token": texts[i] for name, i in ids.items() if i is not None},
    )


def _ends(metadata: Mapping[str, Any], pieces: Pieces) -> tuple[int, ...]:
    count = len(pieces.texts)
    named: Sequence[int | None] = [_token_id(metadata, key, count) for key in ("eos", "eot", "eom")]
    usual = [
        i
        for i, text in enumerate(pieces.texts)
        if text in _ENDS and pieces.types[i] in (CONTROL, USER_DEFINED)
    ]
    return tuple(dict.fromkeys(end for end in [*named, *usual] if end is not None))
