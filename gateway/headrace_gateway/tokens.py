"""Text ↔ token ids: encoding prompts, and turning a stream of token ids back into text.

Invariant: the deltas of a Detokenizer, joined, are the text that decoding all its tokens at once
gives, and no delta holds half a character. For byte-level vocabularies (Llama 3, Qwen, SmolLM, …)
each token is a fixed string of bytes, so an incremental UTF-8 decoder is exact and costs O(1) a
token. Other decoders see a sliding window of tokens; there the invariant holds for output that is
valid UTF-8. Rejected: `tokenizers.DecodeStream`, which raises on byte sequences that never become
a character, and decodes twice a token.
"""

from __future__ import annotations

import asyncio
import codecs
from array import array
from collections import OrderedDict
from typing import Protocol

from tokenizers import Tokenizer, decoders

from headrace.errors import CallerError
from headrace.types import ModelRecord, pack_tokens

TOKENIZERS_MAX = 8
"""Tokenizers kept; the least recently used one goes."""
INLINE_CHARS_MAX = 4_096
"""Longer texts are encoded in a thread (about 1 ms per 4,000 characters)."""
HELD_TOKENS_MAX = 16
"""A window that has not become a character by then is no character: it is handed out as it is."""

REPLACEMENT = "\ufffd"


class Detokenizer(Protocol):
    """Turns one generation's token ids into text, as they come."""

    def push(self, token: int) -> str:
        """The text that `token` completes; '' while a character is unfinished."""
        ...

    def flush(self) -> str:
        """What is left at the end: U+FFFD for a character that was never finished."""
        ...


def _byte_of_character() -> dict[str, int]:
    """The byte that each character of a byte-level vocabulary stands for (GPT-2's table)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {chr(byte): byte for byte in printable}
    others = [byte for byte in range(256) if byte not in set(printable)]
    table.update({chr(256 + at): byte for at, byte in enumerate(others)})
    return table


_BYTES = _byte_of_character()


class ModelTokenizer:
    """The tokenizer of one model. Immutable but for the memo of token bytes, vocabulary-sized."""

    def __init__(self, record: ModelRecord) -> None:
        self._tokenizer = Tokenizer.from_buffer(record.tokenizer_json)
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._bos = record.bos_token_id if record.add_bos else None
        self._special = frozenset(
            token
            for token, added in self._tokenizer.get_added_tokens_decoder().items()
            if added.special
        )
        self.byte_level = isinstance(self._tokenizer.decoder, decoders.ByteLevel)
        self._token_bytes: dict[int, bytes] = {}

    async def encode(self, text: str, *, add_bos: bool) -> array[int]:
        """Token ids of `text`; special tokens written out in it count as such.

        `add_bos` puts the model's first token before it where the model wants one and the text
        does not bring it.
        """
        if len(text) <= INLINE_CHARS_MAX:
            tokens = self._encode(text)
        else:
            tokens = await asyncio.to_thread(self._encode, text)
        if add_bos and self._bos is not None and tokens[:1] != array("I", [self._bos]):
            tokens.insert(0, self._bos)
        return tokens

    def _encode(self, text: str) -> array[int]:
        return pack_tokens(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def decode(self, tokens: list[int]) -> str:
        """The text of `tokens`, special tokens skipped."""
        text: str = self._tokenizer.decode(tokens, skip_special_tokens=True)
        return text

    def text_of(self, token: int) -> str | None:
        """How the vocabulary writes `token`; None for special and unknown ones."""
        if token in self._special:
            return None
        text: str | None = self._tokenizer.id_to_token(token)
        return text

    def bytes_of(self, token: int) -> bytes:
        """The bytes that `token` adds to the text; only for byte-level vocabularies."""
        found = self._token_bytes.get(token)
        if found is None:
            found = self._token_bytes[token] = self._spell(token)
        return found

    def _spell(self, token: int) -> bytes:
        text = self.text_of(token)
        if text is None:
            return b""
        # an added token may hold characters outside the table: it then stands for itself
        if all(character in _BYTES for character in text):
            return bytes(_BYTES[character] for character in text)
        return text.encode()

    def detokenizer(self) -> Detokenizer:
        return ByteDetokenizer(self) if self.byte_level else WindowDetokenizer(self)


class ByteDetokenizer:
    """For byte-level vocabularies: token bytes through an incremental UTF-8 decoder."""

    def __init__(self, tokenizer: ModelTokenizer) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        return self._utf8.decode(self._tokenizer.bytes_of(token))

    def flush(self) -> str:
        return self._utf8.decode(b"", True)


class WindowDetokenizer:
    """For every other decoder: decode a window of tokens with and without the newest.

    `_window` holds the tokens of the last delta, as left context, and those not handed out yet.
    """

    def __init__(self, tokenizer: ModelTokenizer) -> None:
        self._tokenizer = tokenizer
        self._window: list[int] = []
        self._handed = 0

    def push(self, token: int) -> str:
        if self._tokenizer.text_of(token) is None:
            return ""
        self._window.append(token)
        text = self._pending()
        held = len(self._window) - self._handed
        if not text or (text.endswith(REPLACEMENT) and held < HELD_TOKENS_MAX):
            return ""
        del self._window[: self._handed]
        self._handed = len(self._window)
        return text

    def flush(self) -> str:
        text = self._pending()
        self._window.clear()
        self._handed = 0
        return text

    def _pending(self) -> str:
        before = self._tokenizer.decode(self._window[: self._handed])
        return self._tokenizer.decode(self._window)[len(before) :]


class Tokenizers:
    """Tokenizers by model fingerprint, built once each."""

    def __init__(self) -> None:
        self._built: OrderedDict[str, ModelTokenizer] = OrderedDict()
        self._lock = asyncio.Lock()

    async def get(self, record: ModelRecord) -> ModelTokenizer:
        """The tokenizer of `record`; the first call for a model takes up to a second, in a thread.

        Raises CallerError when the record's tokenizer cannot be read.
        """
        found = self._built.get(record.fingerprint)
        if found is not None:
            self._built.move_to_end(record.fingerprint)
            return found
        async with self._lock:
            if record.fingerprint not in self._built:
                self._built[record.fingerprint] = await asyncio.to_thread(_build, record)
                while len(self._built) > TOKENIZERS_MAX:
                    self._built.popitem(last=False)
            return self._built[record.fingerprint]


def _build(record: ModelRecord) -> ModelTokenizer:
    try:
        return ModelTokenizer(record)
    except Exception as error:  # the library raises plain Exception for whatever it cannot read
        raise CallerError(
            f"the tokenizer of {record.name} cannot be read: {error}",
            param="model",
            code="tokenizer_unusable",
        ) from error


class StopChecker:
    """Finds stop strings in text that comes in pieces, and holds back only what may be one.

    For each stop string it keeps how many of its characters the text ends with (the automaton of
    Knuth, Morris and Pratt 1977), so the work is O(1) a character and the result does not depend
    on where tokens end: the stop string that is complete first wins, the longest on a tie.
    """

    def __init__(self, stops: tuple[str, ...]) -> None:
        assert all(stops), "a stop string is never empty"
        self._stops = stops
        self._borders = [_borders(stop) for stop in stops]
        self._matched = [0] * len(stops)
        self._held = ""
        self.hit = False

    def push(self, text: str) -> str:
        """The part of the text so far that can be shown now; sets `hit` at a stop string."""
        if not self._stops or not text or self.hit:
            return "" if self.hit else text
        shown = self._held + text
        for at, character in enumerate(text, len(self._held)):
            longest = self._advance(character)
            if longest:
                self.hit = True
                self._held = ""
                return shown[: at + 1 - longest]
        keep = max(self._matched)
        cut = len(shown) - keep
        self._held = shown[cut:]
        return shown[:cut]

    def flush(self) -> str:
        """What was held back, at the end of a text without a stop string."""
        held, self._held = self._held, ""
        return held

    def _advance(self, character: str) -> int:
        """Take one character; the length of the longest stop string that it completes."""
        longest = 0
        for which, stop in enumerate(self._stops):
            matched = self._matched[which]
            while matched and stop[matched] != character:
                matched = self._borders[which][matched - 1]
            if stop[matched] == character:
                matched += 1
            if matched == len(stop):
                longest = max(longest, matched)
                matched = self._borders[which][matched - 1]
            self._matched[which] = matched
        return longest


def _borders(stop: str) -> list[int]:
    """For each prefix of `stop`, the length of its longest proper prefix that also ends it."""
    borders = [0] * len(stop)
    length = 0
    for at in range(1, len(stop)):
        while length and stop[at] != stop[length]:
            length = borders[length - 1]
        if stop[at] == stop[length]:
            length += 1
        borders[at] = length
    return borders


def output_room(prompt_tokens: int, asked: int | None, context_tokens: int, param: str) -> int:
    """How many tokens may be generated. `asked` None means all that fits.

    Raises CallerError `context_length_exceeded` with the numbers.
    """
    if prompt_tokens >= context_tokens:
        raise CallerError(
            f"This model's maximum context length is {context_tokens} tokens, of which at least "
            f"one is for the completion. However, your prompt has {prompt_tokens} tokens. "
            "Please shorten it.",
            param=param,
            code="context_length_exceeded",
        )
    room = context_tokens - prompt_tokens
    if asked is None:
        return room
    if asked > room:
        raise CallerError(
            f"This model's maximum context length is {context_tokens} tokens. However, you "
            f"requested {prompt_tokens + asked} tokens ({prompt_tokens} in the prompt, {asked} in "
            "the completion). Please reduce the length of the prompt or the completion.",
            param=param,
            code="context_length_exceeded",
        )
    return asked
