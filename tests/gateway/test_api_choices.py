"""One choice's text and logprobs: the same however its tokens were delivered."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.types import Finish, FinishReason
from headrace_gateway.choices import Choice, Piece, PlainText, Reader, TextRules, joined
from headrace_gateway.generation import Chunk
from headrace_gateway.tokens import ModelTokenizer
from headrace_gateway.tools.events import Arguments, CallBegins, CallEnds, Event, Text
from support.api import encode, logprobs_of, make_record, say

EOS = 2
TOKENIZER = ModelTokenizer(make_record())
EMOJI = encode("😀")


class Canned:
    """A generation whose deliveries are known."""

    def __init__(self, chunks: Sequence[Chunk]) -> None:
        self._chunks = list(chunks)
        self.cancelled = False

    async def next(self) -> Chunk:
        return self._chunks.pop(0)

    async def cancel(self) -> None:
        self.cancelled = True


def cut(tokens: Sequence[int], sizes: Sequence[int], reason: FinishReason) -> list[Chunk]:
    """`tokens` in deliveries of `sizes`, the rest in one, with their logprobs."""
    chunks, at = [], 0
    for size in [*sizes, len(tokens)]:
        part = tuple(tokens[at : at + size])
        at += size
        finish = Finish(reason) if at >= len(tokens) else None
        chunks.append(Chunk(part, finish, logprobs=tuple(logprobs_of(t, 2) for t in part)))
        if finish:
            break
    return chunks


async def pieces_of(chunks: Sequence[Chunk], rules: TextRules, reader: Reader) -> list[Piece]:
    choice = Choice(0, Canned(chunks), TOKENIZER, rules, reader)
    pieces = [await choice.next()]
    while choice.finish is None:
        pieces.append(await choice.next())
    return pieces


def read(
    chunks: Sequence[Chunk], rules: TextRules | None = None, reader: Reader | None = None
) -> list[Piece]:
    return asyncio.run(pieces_of(chunks, rules or TextRules(), reader or PlainText()))


def told(piece: Piece) -> list[tuple[int, int]]:
    return [(scored.token, scored.offset) for scored in piece.logprobs]


words = st.sampled_from([*map(encode, ["a", "STOP", " STO", "P", "the ", "ñ", "\n"]), EMOJI, [3]])
tokens_of_words = st.lists(words | st.lists(st.sampled_from(EMOJI), max_size=2), max_size=12).map(
    lambda parts: [token for part in parts for token in part]
)
rules_of = st.builds(
    TextRules,
    stops=st.sampled_from([(), ("STOP",), ("the", "TO"), ("😀", "a")]),
    keep_stop=st.booleans(),
    min_tokens=st.integers(0, 8),
    silent=st.just(frozenset({EOS})),
    score_end=st.booleans(),
)


@settings(max_examples=300, deadline=None)
@given(tokens_of_words, st.lists(st.integers(1, 4), max_size=12), rules_of, st.booleans())
def test_text_and_logprobs_do_not_depend_on_the_deliveries(
    tokens: list[int], sizes: list[int], rules: TextRules, ends: bool
) -> None:
    """Joined, the pieces are what one delivery gives; each token's logprobs come with its text."""
    if ends:
        tokens = [*tokens, EOS]
    reason = FinishReason.STOP if ends else FinishReason.LENGTH
    whole = joined(read(cut(tokens, [], reason), rules))
    pieces = read(cut(tokens, sizes, reason), rules)
    assert joined(pieces) == whole
    shown = 0
    for piece in pieces:
        shown += len(piece.text)
        assert all(scored.offset <= shown for scored in piece.logprobs), "never before its text"
    offsets = [scored.offset for scored in whole.logprobs]
    assert offsets == sorted(offsets)
    assert [scored.token for scored in whole.logprobs] == tokens[: len(whole.logprobs)]
    stopped = whole.finish is FinishReason.STOP and not (ends and whole.tokens == len(tokens))
    if not stopped:
        expected = tokens if rules.score_end or not ends else tokens[:-1]
        assert len(whole.logprobs) == len(expected)


@settings(max_examples=200, deadline=None)
@given(tokens_of_words, rules_of)
def test_the_text_ends_at_the_first_stop_string_that_counts(
    tokens: list[int], rules: TextRules
) -> None:
    """As a search through the whole text finds it: the one that is complete first, late enough."""
    detokenizer = TOKENIZER.detokenizer()
    parts = [*map(detokenizer.push, tokens), detokenizer.flush()]
    text, ends = "".join(parts), []
    for stop in rules.stops:
        at = text.find(stop)
        while at >= 0:
            ends.append((at + len(stop), at))
            at = text.find(stop, at + 1)
    made = [sum(map(len, parts[:count])) for count in range(len(parts) + 1)]
    for end, at in sorted(ends):
        completed_by = next(count for count, length in enumerate(made) if length >= end)
        if min(completed_by, len(tokens)) >= rules.min_tokens:
            text = text[: end if rules.keep_stop else at]
            break
    assert joined(read(cut(tokens, [1] * 12, FinishReason.LENGTH), rules)).text == text


def test_an_unfinished_character_holds_its_logprobs_back() -> None:
    """Four bytes in four tokens: text and all four logprobs come with the last one."""
    assert len(EMOJI) == 4
    pieces = read(cut([*encode("a"), *EMOJI, *encode("b")], [1] * 5, FinishReason.LENGTH))
    assert [piece.text for piece in pieces] == ["a", "", "", "", "😀", "b"]
    assert [len(piece.logprobs) for piece in pieces] == [1, 0, 0, 0, 4, 1]
    assert told(pieces[4]) == [(token, 1) for token in EMOJI]


def test_a_possible_stop_string_holds_its_logprobs_back() -> None:
    """'ST' may become 'STOP' and does not: text and logprobs come together, one token later."""
    tokens = [encode(c)[0] for c in "aSTx"]
    pieces = read(cut(tokens, [1] * 3, FinishReason.LENGTH), TextRules(stops=("STOP",)))
    assert [piece.text for piece in pieces] == ["a", "", "", "STx"]
    assert [told(piece) for piece in pieces] == [
        [(tokens[0], 0)], [], [], [(token, at) for at, token in enumerate(tokens) if at]
    ]  # fmt: skip


@pytest.mark.parametrize(("keep", "text", "kept"), [(False, "a", "a"), (True, "aSTO", "aSTO")])
def test_the_tokens_of_a_cut_off_stop_string_are_left_out(keep: bool, text: str, kept: str) -> None:
    tokens = [encode(c)[0] for c in "aSTOP"]
    rules = TextRules(stops=("STO",), keep_stop=keep)
    source = Canned(cut(tokens, [1] * 4, FinishReason.LENGTH))
    choice = Choice(0, source, TOKENIZER, rules, PlainText())

    async def until_end() -> Piece:
        pieces = []
        while choice.finish is None:
            pieces.append(await choice.next())
        return joined(pieces)

    piece = asyncio.run(until_end())
    assert (piece.text, piece.tokens, source.cancelled) == (text, 4, True)
    assert [scored.token for scored in piece.logprobs] == [encode(c)[0] for c in kept]


def test_a_token_that_is_only_partly_cut_off_is_told() -> None:
    """' again' with the stop string 'gain' leaves ' a' of it."""
    [token] = encode(" again")
    piece = joined(read([*cut([token], [], FinishReason.LENGTH)], TextRules(stops=("gain",))))
    assert (piece.text, told(piece)) == (" a", [(token, 0)])


def test_the_end_of_turn_is_told_where_that_is_asked_for() -> None:
    tokens = [*encode("a"), EOS]
    for score_end, kept in ((False, 1), (True, 2)):
        rules = TextRules(silent=frozenset({EOS}), score_end=score_end)
        piece = joined(read(cut(tokens, [1], FinishReason.STOP), rules))
        assert (piece.text, piece.tokens, len(piece.logprobs)) == ("a", 2, kept)


def test_the_mean_counts_every_token() -> None:
    tokens = [*encode("ab"), EOS]
    source = Canned(cut(tokens, [1], FinishReason.STOP))
    choice = Choice(0, source, TOKENIZER, TextRules(silent=frozenset({EOS})), PlainText())

    async def until_end() -> None:
        while choice.finish is None:
            await choice.next()

    asyncio.run(until_end())
    expected = sum(logprobs_of(token, 0).logprob for token in tokens) / len(tokens)
    assert choice.mean_logprob == pytest.approx(expected)


class Brackets:
    """A reader that takes what stands in brackets for the arguments of calls, two at most."""

    def __init__(self) -> None:
        self._calls = 0
        self._open = False
        self.ended = False

    def push(self, text: str) -> list[Event]:
        return [event for character in text for event in self._take(character)]

    def _take(self, character: str) -> list[Event]:
        if self.ended:
            return []
        if character == "<":
            self._open = True
            return [CallBegins(self._calls, "f")]
        if character == ">":
            self._open, self._calls = False, self._calls + 1
            self.ended = self._calls == 2
            return [CallEnds(self._calls - 1, True)]
        return [Arguments(self._calls, character) if self._open else Text(character)]

    def finish(self) -> list[Event]:
        return [CallEnds(self._calls, False)] if self._open else []


@pytest.mark.parametrize("per_chunk", [1, 3, 100])
def test_a_reader_turns_text_into_what_the_client_gets(per_chunk: int) -> None:
    """Text and calls as the reader has them, its rest at the end; counts are the generation's."""
    said = say("so <ab> and <c", per_chunk=per_chunk)
    chunks = [step for step in said if isinstance(step, Chunk)]
    whole = joined(read(chunks, TextRules(silent=frozenset({EOS})), Brackets()))
    assert whole.events == (
        Text("so "), CallBegins(0, "f"), Arguments(0, "ab"), CallEnds(0, True), Text(" and "),
        CallBegins(1, "f"), Arguments(1, "c"), CallEnds(1, False),
    )  # fmt: skip
    assert whole.text == "so  and "
    assert whole.tokens == len(encode("so <ab> and <c")) + 1


@pytest.mark.parametrize("per_chunk", [1, 3, 100])
def test_a_reader_that_wants_no_more_ends_the_generation(per_chunk: int) -> None:
    """At the token that completes what is wanted, however much came with it."""
    said = say("<a><b> and so on", per_chunk=per_chunk)
    source = Canned([step for step in said if isinstance(step, Chunk)])
    choice = Choice(0, source, TOKENIZER, TextRules(), Brackets())

    async def until_end() -> Piece:
        pieces = [await choice.next()]
        while choice.finish is None:
            pieces.append(await choice.next())
        return joined(pieces)

    whole = asyncio.run(until_end())
    assert whole.finish is FinishReason.STOP
    assert source.cancelled
    assert whole.events[-1] == CallEnds(1, True)
    assert whole.tokens == choice.completion_tokens
    spoken = TOKENIZER.decode(encode("<a><b> and so on")[: whole.tokens])
    assert spoken.startswith("<a><b>")
    assert not TOKENIZER.decode(encode("<a><b> and so on")[: whole.tokens - 1]).startswith("<a><b>")
