"""Text ↔ token ids: encoding prompts, and turning a stream of token ids back into text.

Invariant: the deltas of a Detokenizer, joined, are the text that decoding all its tokens at once
gives, and no delta holds half a character, at O(1) a token. For byte-level vocabularies (Llama 3,
Qwen, SmolLM, …) each token is a fixed string of bytes. For SentencePiece's decoder chain (Llama 2,
Mistral, Gemma, Phi-3) it is a fixed text or one byte; there a run of byte tokens is text only as a
whole, so it is held to its end. Any other decoder sees a sliding window of tokens, and the
invariant holds for output that is valid UTF-8. Rejected: `tokenizers.DecodeStream`, which raises
on byte sequences that never become a character, and decodes twice a token.
"""

from __future__ import annotations

import asyncio
import codecs
import json
import os
import re
from array import array
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, Protocol

from tokenizers import Tokenizer

from headrace.errors import CallerError
from headrace.types import ModelRecord, pack_tokens
from headrace_gateway.words import words_of

# one text is one thread's work, and the library's own threads do not survive a fork
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

TOKENIZERS_MAX = 8
"""Tokenizers kept; the least recently used one goes."""
INLINE_CHARS_MAX = 4_096
"""Longer texts are encoded in a thread (about 1 ms per 4,000 characters)."""
HELD_TOKENS_MAX = 16
"""A window that has not become a character by then is no character: it is handed out as it is."""
HELD_BYTES_MAX = 512
"""Byte tokens of one run that are held; a longer run is handed out character by character."""

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
_CHARACTERS = {byte: character for character, byte in _BYTES.items()}
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f+][0-9A-Fa-f])>")
"""As the library reads them: a sign in the first place counts as no digit."""


@dataclass(frozen=True, slots=True)
class Chain:
    """SentencePiece's decoder: replace within tokens, bytes back to characters, fuse, strip.

    `strip` is a character that the text loses at its start, at most `strip_max` times.
    """

    replaced: tuple[tuple[str, str], ...]
    byte_fallback: bool
    strip: str = ""
    strip_max: int = 0

    def spell(self, text: str) -> str | int:
        """What a token written `text` stands for: a text, or one byte."""
        for old, new in self.replaced:
            text = text.replace(old, new)
        byte = _BYTE_TOKEN.fullmatch(text) if self.byte_fallback else None
        return text if byte is None else int(byte[1], 16)


def chain_of(decoder: dict[str, Any] | None) -> Chain | None:
    """The Chain that a tokenizer.json's `decoder` describes; None if it is anything else."""
    if not decoder or decoder.get("type") != "Sequence":
        return None
    steps = list(decoder["decoders"])
    replaced = []
    while steps and steps[0]["type"] == "Replace":
        step = steps.pop(0)
        if not step["pattern"].get("String"):
            return None
        replaced.append((step["pattern"]["String"], step["content"]))
    byte_fallback = bool(steps) and steps[0]["type"] == "ByteFallback"
    strip, strip_max = "", 0
    steps = steps[1:] if byte_fallback else steps
    if len(steps) == 2 and steps[1]["type"] == "Strip" and steps[1]["stop"] == 0:
        last = steps.pop()
        strip, strip_max = last["content"], last["start"]
    if [step["type"] for step in steps] != ["Fuse"]:
        return None
    return Chain(tuple(replaced), byte_fallback, strip, strip_max)


class ModelTokenizer:
    """The tokenizer of one model. Immutable but for the memos of tokens, vocabulary-sized."""

    def __init__(self, record: ModelRecord) -> None:
        self._tokenizer = Tokenizer.from_buffer(record.tokenizer_json)
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._bos = record.bos_token_id if record.add_bos else None
        added_tokens = self._tokenizer.get_added_tokens_decoder()
        self._added = {added.content: token for token, added in added_tokens.items()}
        self._special = frozenset(added.content for added in added_tokens.values() if added.special)
        spec = json.loads(record.tokenizer_json)
        self._words = words_of(spec, self._tokenizer, _CHARACTERS)
        decoder = spec.get("decoder")
        self.byte_level = decoder is not None and decoder.get("type") == "ByteLevel"
        self.chain = chain_of(decoder)
        self._token_bytes: dict[int, bytes] = {}
        self._shown_bytes: dict[int, bytes] = {}
        self.whole_texts: dict[int, str] = {}
        """What `whole_text` knows: for who looks up each token that is made."""
        self._token_pieces: dict[int, str | int] = {}

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
        known = None if self._words is None else self._words.encode(text)
        if known is not None:
            return pack_tokens(known)
        # the library lets other threads run only while it encodes a batch; "fast" is without the
        # tokens' places in the text
        [encoding] = self._tokenizer.encode_batch_fast([text], add_special_tokens=False)
        return pack_tokens(encoding.ids)

    def decode(self, tokens: list[int]) -> str:
        """The text of `tokens`, special tokens skipped."""
        text: str = self._tokenizer.decode(tokens, skip_special_tokens=True)
        return text

    def is_shown(self, token: int) -> bool:
        """Whether `token` adds to the text: special and unknown ones do not."""
        text = self._tokenizer.id_to_token(token)
        return text is not None and text not in self._special

    def added_id(self, text: str) -> int | None:
        """The id of the token written `text` that was added to the vocabulary, special or not."""
        return self._added.get(text)

    def bytes_of(self, token: int) -> bytes:
        """The bytes that `token` stands for; a special token's are its name's in UTF-8.

        b"" for a token that the vocabulary lacks. A space that the text loses at its start counts.
        """
        found = self._token_bytes.get(token)
        if found is None:
            found = self._token_bytes[token] = self._spell(token)
        return found

    def shown_bytes(self, token: int) -> bytes:
        """What `token` adds to a text: its bytes, or none of one that is not shown."""
        found = self._shown_bytes.get(token)
        if found is None:
            found = self._shown_bytes[token] = self.bytes_of(token) if self.is_shown(token) else b""
        return found

    def whole_text(self, token: int) -> str:
        """What `token` adds to a text where that is characters in themselves; else ''."""
        found = self.whole_texts.get(token)
        if found is None:
            try:
                found = self.shown_bytes(token).decode()
            except UnicodeDecodeError:
                found = ""
            self.whole_texts[token] = found
        return found

    def _spell(self, token: int) -> bytes:
        text: str | None = self._tokenizer.id_to_token(token)
        if text is None:
            return b""
        if text in self._special:
            return text.encode()
        if self.chain is not None:
            piece = self.chain.spell(text)
            return bytes([piece]) if isinstance(piece, int) else piece.encode()
        if not self.byte_level:
            return self.decode([token]).encode()
        # an added token may hold characters outside the table: it then stands for itself
        if all(character in _BYTES for character in text):
            return bytes(_BYTES[character] for character in text)
        return text.encode()

    def piece_of(self, token: int) -> str | int:
        """What a `chain` makes of `token`: a text, or one byte; "" for special and unknown ones."""
        assert self.chain is not None, "the decoder is no chain"
        found = self._token_pieces.get(token)
        if found is None:
            text: str | None = self._tokenizer.id_to_token(token)
            shown = text is not None and text not in self._special
            found = self._token_pieces[token] = self.chain.spell(text) if text and shown else ""
        return found

    def detokenizer(self) -> Detokenizer:
        if self.byte_level:
            return ByteDetokenizer(self)
        return WindowDetokenizer(self) if self.chain is None else ChainDetokenizer(self, self.chain)


class ByteDetokenizer:
    """For byte-level vocabularies: token bytes through an incremental UTF-8 decoder.

    Bytes that are characters in themselves, as those of nearly all tokens are, need no decoder
    while it holds no beginning of one.
    """

    def __init__(self, tokenizer: ModelTokenizer) -> None:
        self._bytes_of = tokenizer.shown_bytes
        self._text_of, self._texts = tokenizer.whole_text, tokenizer.whole_texts
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._holds = False

    def push(self, token: int) -> str:
        if not self._holds:
            text = self._texts.get(token)
            if text is None:
                text = self._text_of(token)
            if text:
                return text
        text = self._utf8.decode(self._bytes_of(token))
        self._holds = bool(self._utf8.getstate()[0])
        return text

    def flush(self) -> str:
        self._holds = False
        return self._utf8.decode(b"", True)


class ChainDetokenizer:
    """For a SentencePiece decoder chain.

    The library turns a run of byte tokens into its characters if the whole run is UTF-8, else into
    one U+FFFD a byte, valid characters included. `_text` is the run so far while it may still be
    valid; from its first wrong byte on, its length in bytes is all that counts. A run of more than
    HELD_BYTES_MAX, which no model writes by mistake, is handed out by characters instead.
    """

    def __init__(self, tokenizer: ModelTokenizer, chain: Chain) -> None:
        self._tokenizer = tokenizer
        self._strip, self._strip_left = chain.strip, chain.strip_max
        self._start_run()

    def _start_run(self) -> None:
        self._utf8 = codecs.getincrementaldecoder("utf-8")("strict")
        self._text: list[str] = []
        self._bytes = 0
        self._shown_bytes = 0
        self._valid = True

    def push(self, token: int) -> str:
        piece = self._tokenizer.piece_of(token)
        if isinstance(piece, int):
            return self._push_byte(piece)
        if not piece and not self._tokenizer.is_shown(token):
            return ""  # it does not end a run either
        return self._stripped(self._end_run() + piece)

    def flush(self) -> str:
        return self._stripped(self._end_run())

    def _push_byte(self, byte: int) -> str:
        self._bytes += 1
        if self._valid:
            try:
                self._text.append(self._utf8.decode(bytes([byte])))
            except UnicodeDecodeError:
                self._valid = False
        if self._valid and self._bytes <= HELD_BYTES_MAX:
            return ""
        return self._stripped(self._take())

    def _take(self) -> str:
        """What the run gives beyond what was shown of it."""
        if self._valid:
            text = "".join(self._text)
            self._shown_bytes += len(text.encode())
        else:
            text = REPLACEMENT * (self._bytes - self._shown_bytes)
            self._shown_bytes = self._bytes
        self._text.clear()
        return text

    def _end_run(self) -> str:
        if not self._bytes:
            return ""
        try:
            self._utf8.decode(b"", True)
        except UnicodeDecodeError:
            self._valid = False
        text = self._take()
        self._start_run()
        return text

    def _stripped(self, text: str) -> str:
        while self._strip_left and text:
            if text[0] != self._strip:
                self._strip_left = 0
                break
            text = text[1:]
            self._strip_left -= 1
        return text


class WindowDetokenizer:
    """For every other decoder: decode a window of tokens with and without the newest.

    `_window` holds the tokens of the last delta, as left context, and those not handed out yet.
    """

    def __init__(self, tokenizer: ModelTokenizer) -> None:
        self._tokenizer = tokenizer
        self._window: list[int] = []
        self._handed = 0

    def push(self, token: int) -> str:
        if not self._tokenizer.is_shown(token):
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
