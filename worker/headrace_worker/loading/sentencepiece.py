"""SentencePiece's BPE from a GGUF file: Llama 2, Mistral, Gemma, Phi-3.

The file has no merges, only pieces with scores. SentencePiece joins the two neighbours whose union
scores best; the library joins by a list of pairs. Each way to cut a piece into two pieces is such a
pair, in the order of the pieces' scores, and pairs of one piece in the order that Hugging Face's
converter gives them, so that the tokens are those of the models' own tokenizer.json.

Invariant: spaces become ▁ and one is put before each stretch of text between special tokens where
the model was trained so, as SentencePiece and llama.cpp do. Rejected: the library's Metaspace,
which puts none where a text begins with a space.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tokenizers import Tokenizer, decoders, models, normalizers

NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4
"""GGUF's token types; 5 are unused pieces, 6 single bytes."""

_SPACE = "▁"


@dataclass(frozen=True, slots=True)
class Pieces:
    """A vocabulary: texts, types and scores by token id."""

    texts: Sequence[str]
    types: Sequence[int]
    scores: Sequence[float]

    def spaces_spelled(self) -> Pieces:
        """Runs of spaces as pieces of ▁.

        llama.cpp stores them as user-defined tokens of real spaces and looks for them in the text,
        the longest first, as SentencePiece does. In Gemma's tokenizer.json, which is followed here,
        they are pieces like others: the same up to the longest run that is a piece.
        """
        texts, types = list(self.texts), list(self.types)
        for i, (text, kind) in enumerate(zip(self.texts, self.types, strict=True)):
            if kind == USER_DEFINED and text and not text.strip(" "):
                texts[i], types[i] = _SPACE * len(text), NORMAL
        return Pieces(texts, types, self.scores)


def by_score(pieces: Pieces) -> list[float]:
    return list(pieces.scores)


def by_position(pieces: Pieces) -> list[float]:
    """Gemma's vocabulary stands in the order of its merges; its scores do not follow it."""
    return [-float(i) for i in range(len(pieces.texts))]


def sentencepiece(
    pieces: Pieces,
    unknown: str | None,
    *,
    rank: Callable[[Pieces], list[float]],
    space_prefix: bool,
) -> Tokenizer:
    """The tokenizer without its special tokens. The library's errors come through.

    `rank`: how early each piece is made, the highest first.
    """
    vocab = {text: i for i, text in enumerate(pieces.texts)}
    merges = _merges(pieces, vocab, rank(pieces))
    tokenizer = Tokenizer(
        models.BPE(vocab=vocab, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    )
    spaces = normalizers.Replace(" ", _SPACE)
    decoding = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if space_prefix:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), spaces])
        decoding.append(decoders.Strip(" ", 1, 0))
    else:
        tokenizer.normalizer = spaces
    tokenizer.decoder = decoders.Sequence(decoding)
    return tokenizer


def _merges(pieces: Pieces, vocab: dict[str, int], ranks: Sequence[float]) -> list[tuple[str, str]]:
    """All pairs of pieces whose union is a piece, the pair to be joined first in front.

    Only normal pieces are joined and result from joining: SentencePiece finds the others whole, or
    never.
    """
    joined = {text: i for text, i in vocab.items() if pieces.types[i] == NORMAL}
    found = []
    for text, i in joined.items():
        cuts = [
            (joined[text[:at]], joined[text[at:]], at)
            for at in range(1, len(text))
            if text[:at] in joined and text[at:] in joined
        ]
        found += [(ranks[i], at, len(text) - at, text) for _, _, at in sorted(cuts)]
    found.sort(key=lambda merge: merge[:3], reverse=True)
    return [(text[:at], text[at:]) for _, at, _, text in found]
