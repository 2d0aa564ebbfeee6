"""Tokens to text and back: nothing lost, nothing half, and stops found wherever tokens end."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers

from headrace.errors import CallerError
from headrace_gateway.tokens import (
    HELD_BYTES_MAX,
    HELD_TOKENS_MAX,
    REPLACEMENT,
    ChainDetokenizer,
    ModelTokenizer,
    StopChecker,
    Tokenizers,
    WindowDetokenizer,
    output_room,
)
from support.api import encode, make_record, tiny_tokenizer

HARD_TEXTS = [
    "😀",
    "👩‍👩‍👧‍👦",
    "naïve café",
    "漢字かな",
    "मनीष",
    "🇩🇪🇫🇷",
    "a\u0301b",
    "\n\n\t",
    "ﷺ",
    "\ufffd!",
]


@cache
def tiny() -> ModelTokenizer:
    return ModelTokenizer(make_record())


def sentencepiece(*decoding: decoders.Decoder) -> ModelTokenizer:
    """A tokenizer of the SentencePiece kind: ▁ for spaces, `<0xXX>` for what it does not know."""
    words = ["▁hello", "▁world", "▁", "h", "e", "l", "o", "w", "r", "d", "!", "▁▁", "x▁", "é", ""]
    vocab = {"<unk>": 0, **{f"<0x{byte:02X}>": byte + 1 for byte in range(256)}}
    vocab |= {word: len(vocab) + at for at, word in enumerate(words)}
    tokenizer = Tokenizer(
        models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    tokenizer.add_special_tokens(["<s>", "<é▁>"])
    tokenizer.add_tokens(["▁<tool>▁", "<0x+a>", "<0x-1>"])
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(list(decoding))
    return ModelTokenizer(make_record(tokenizer=tokenizer))


_SPACES, _BYTES, _FUSE = decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()
_STRIP = decoders.Strip(" ", 1, 0)


@cache
def llama2() -> ModelTokenizer:
    """Llama 2's chain, which is Mistral's and Phi-3's too."""
    return sentencepiece(_SPACES, _BYTES, _FUSE, _STRIP)


@cache
def gemma() -> ModelTokenizer:
    return sentencepiece(_SPACES, _BYTES, _FUSE)


@cache
def stripping() -> ModelTokenizer:
    """Two spaces off the start, and no byte fallback."""
    return sentencepiece(_SPACES, _FUSE, decoders.Strip(" ", 2, 0))


@cache
def other_chain() -> ModelTokenizer:
    """A chain whose steps nobody has seen in this order: the general way."""
    return sentencepiece(_SPACES, _BYTES, _FUSE, _STRIP, decoders.Replace("hhh", "hhh"))


def deltas_of(tokenizer: ModelTokenizer, tokens: list[int]) -> list[str]:
    detokenizer = tokenizer.detokenizer()
    return [*(detokenizer.push(token) for token in tokens), detokenizer.flush()]


@given(st.lists(st.integers(0, tiny_tokenizer().get_vocab_size() + 3), max_size=60))
@settings(max_examples=300, deadline=None)
def test_deltas_of_any_tokens_join_to_the_full_decode(tokens: list[int]) -> None:
    """Random byte-level tokens: special ones, unknown ones and bytes that form no character."""
    assert "".join(deltas_of(tiny(), tokens)) == tiny().decode(tokens)


@given(st.lists(st.sampled_from([0xF0, 0x9F, 0x98, 0x80, 0xE2, 0x82, 0xAC, 0xC3, 0xFF, 0x41])))
@settings(max_examples=200, deadline=None)
def test_broken_byte_sequences_are_replaced_as_a_full_decode_does(values: list[int]) -> None:
    spelled = {tiny().bytes_of(token): token for token in range(tiny_tokenizer().get_vocab_size())}
    tokens = [spelled[bytes([value])] for value in values]
    assert "".join(deltas_of(tiny(), tokens)) == tiny().decode(tokens)


@given(st.text(max_size=40) | st.sampled_from(HARD_TEXTS))
@settings(max_examples=200, deadline=None)
def test_no_delta_holds_half_a_character(text: str) -> None:
    """Text that is valid stays valid at every step: U+FFFD only where the text itself has it."""
    deltas = deltas_of(tiny(), encode(text))
    assert "".join(deltas) == text
    assert sum(delta.count(REPLACEMENT) for delta in deltas) == text.count(REPLACEMENT)


def id_of(tokenizer: ModelTokenizer, text: str) -> int:
    token: int | None = tokenizer._tokenizer.token_to_id(text)
    assert token is not None
    return token


def spelled(tokenizer: ModelTokenizer, text: str) -> list[int]:
    """`text` in byte tokens only, as rare scripts come."""
    return [id_of(tokenizer, f"<0x{byte:02X}>") for byte in text.encode()]


SPM_TOKENS = st.lists(
    st.one_of(
        st.integers(255, 257 + 22),  # words, spaces, added and special tokens, one past the end
        st.sampled_from([0xF0, 0x9F, 0x98, 0x80, 0xE2, 0x82, 0xAC, 0xC3, 0xA9, 0x20, 0x41]).map(
            lambda byte: byte + 1
        ),
        st.sampled_from(["😀", "€", "é", "A", " "]).map(lambda c: tuple(spelled(llama2(), c))),
    ),
    max_size=30,
).map(lambda parts: [t for part in parts for t in (part if isinstance(part, tuple) else (part,))])


@pytest.mark.parametrize("build", [llama2, gemma, stripping])
@given(tokens=SPM_TOKENS)
@settings(max_examples=400, deadline=None)
def test_a_chain_joins_to_the_full_decode(
    build: Callable[[], ModelTokenizer], tokens: list[int]
) -> None:
    """Any tokens: words, leading spaces, valid and broken runs of bytes, special tokens among."""
    tokenizer = build()
    assert isinstance(tokenizer.detokenizer(), ChainDetokenizer)
    assert "".join(deltas_of(tokenizer, tokens)) == tokenizer.decode(tokens)


@given(st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=30))
@settings(max_examples=200, deadline=None)
def test_window_detokenizer_joins_to_the_full_decode(text: str) -> None:
    """The general way, on a byte-fallback vocabulary with spaces that the decoder strips."""
    tokenizer = other_chain()
    assert isinstance(tokenizer.detokenizer(), WindowDetokenizer)
    tokens = tokenizer._encode(text).tolist()
    deltas = deltas_of(tokenizer, tokens)
    assert "".join(deltas) == tokenizer.decode(tokens)
    assert sum(d.count(REPLACEMENT) for d in deltas) == tokenizer.decode(tokens).count(REPLACEMENT)


@pytest.mark.parametrize("build", [llama2, other_chain])
def test_bytes_that_never_become_a_character_are_not_held(
    build: Callable[[], ModelTokenizer],
) -> None:
    """Garbage is handed out, at once or after a bounded wait, instead of being held to the end."""
    detokenizer = build().detokenizer()
    deltas = [detokenizer.push(0xFF + 1) for _ in range(2 * HELD_TOKENS_MAX)]
    assert any(deltas)
    assert set("".join(deltas)) == {REPLACEMENT}


def test_a_run_of_bytes_is_held_to_its_end_but_not_for_ever() -> None:
    """Within the limit a later wrong byte makes all of the run U+FFFD, as in a full decode."""
    tokenizer = llama2()
    run = spelled(tokenizer, "😀" * 20)
    assert deltas_of(tokenizer, run)[:-1] == [""] * len(run)
    assert deltas_of(tokenizer, run)[-1] == "😀" * 20
    broken = [*run, 0xFF + 1]
    assert "".join(deltas_of(tokenizer, broken)) == tokenizer.decode(broken) == REPLACEMENT * 81
    deltas = deltas_of(tokenizer, spelled(tokenizer, "😀" * (HELD_BYTES_MAX // 2)))
    assert any(deltas[: HELD_BYTES_MAX + 5])
    assert set("".join(deltas)) == {"😀"} and "".join(deltas).count("😀") == HELD_BYTES_MAX // 2


def test_a_token_s_bytes_are_what_it_adds_to_the_text() -> None:
    """For logprobs: spaces as spaces, a byte token as its byte, a special token as its name."""
    for build in (llama2, gemma, other_chain):
        tokenizer = build()
        assert tokenizer.bytes_of(id_of(tokenizer, "é")) == "é".encode()
        assert tokenizer.bytes_of(id_of(tokenizer, "<é▁>")) == "<é▁>".encode()
        assert tokenizer.bytes_of(9_999) == b""
    assert llama2().bytes_of(id_of(llama2(), "▁hello")) == b" hello"
    assert llama2().bytes_of(id_of(llama2(), "<0xE2>")) == b"\xe2"
    end = id_of(tiny(), "<|endoftext|>")
    assert tiny().bytes_of(end) == b"<|endoftext|>" and tiny().decode([end]) == ""
    assert b"".join(map(tiny().bytes_of, encode("naïve 😀"))) == "naïve 😀".encode()


def test_a_character_cut_off_by_the_length_limit_ends_as_a_replacement() -> None:
    tokens = encode("ok 😀")[:-1]
    assert "".join(deltas_of(tiny(), tokens)) == tiny().decode(tokens)


def first_stop(text: str, stops: tuple[str, ...]) -> str | None:
    """The text before the stop string that is complete first, the longest one on a tie."""
    for end in range(1, len(text) + 1):
        hits = [stop for stop in stops if text[:end].endswith(stop)]
        if hits:
            return text[: end - max(map(len, hits))]
    return None


@given(
    st.text("ab.", max_size=40),
    st.lists(st.text("ab.", min_size=1, max_size=5), min_size=1, max_size=4),
    st.data(),
)
@settings(max_examples=400, deadline=None)
def test_stop_strings_do_not_depend_on_where_pieces_end(
    text: str, stops: list[str], data: st.DataObject
) -> None:
    """Any cut of the text gives what one look at the whole text gives."""
    checker = StopChecker(tuple(stops))
    shown, at = "", 0
    while at < len(text) and not checker.hit:
        size = data.draw(st.integers(1, 6))
        shown += checker.push(text[at : at + size])
        at += size
        seen = text[: min(at, len(text))]
        if not checker.hit:
            held = seen[len(shown) :]
            assert seen.startswith(shown)
            assert not held or any(stop.startswith(held) for stop in stops), "held without need"
    expected = first_stop(text, tuple(stops))
    if expected is None:
        assert not checker.hit
        assert shown + checker.flush() == text
    else:
        assert checker.hit
        assert shown == expected


def test_prompt_and_output_share_the_context() -> None:
    assert output_room(90, None, 100, "messages") == 10
    assert output_room(90, 10, 100, "max_tokens") == 10
    with pytest.raises(CallerError, match=r"100 tokens.*101 tokens \(90 in the prompt, 11 in"):
        output_room(90, 11, 100, "max_tokens")
    with pytest.raises(CallerError, match=r"100 tokens.*150 tokens") as caught:
        output_room(150, None, 100, "messages")
    assert caught.value.code == "context_length_exceeded"


async def test_long_texts_are_encoded_like_short_ones() -> None:
    """A text that goes to a thread gives the same tokens; BOS is added once where wanted."""
    tokenizer = ModelTokenizer(make_record(add_bos=True))
    text = "hello world " * 2_000
    assert list(await tokenizer.encode(text, add_bos=False)) == encode(text)
    assert list(await tokenizer.encode("hello", add_bos=True)) == [0, *encode("hello")]
    brought = await tokenizer.encode("<|endoftext|>hello", add_bos=True)
    assert list(brought) == [0, *encode("hello")]


async def test_a_tokenizer_is_built_once_for_each_model() -> None:
    tokenizers = Tokenizers()
    record = make_record()
    assert await tokenizers.get(record) is await tokenizers.get(record)
    assert await tokenizers.get(make_record("other")) is not await tokenizers.get(record)


def test_the_real_tokenizer_of_smollm2_streams_exactly(smollm2_path: Path) -> None:
    """The record that a worker makes of the shipped model, on texts that split badly."""
    from headrace_worker.loading.gguf_file import GgufSource

    facts = GgufSource(smollm2_path).tokenizer()
    tokenizer = ModelTokenizer(
        make_record(tokenizer=Tokenizer.from_str(facts.json.decode()), add_bos=facts.add_bos)
    )
    assert tokenizer.byte_level
    for text in [*HARD_TEXTS, "The mill's wheel turns. " * 20]:
        tokens = tokenizer._encode(text).tolist()
        deltas = deltas_of(tokenizer, tokens)
        assert "".join(deltas) == tokenizer.decode(tokens) == text
        assert sum(d.count(REPLACEMENT) for d in deltas) == text.count(REPLACEMENT)
