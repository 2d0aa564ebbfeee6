"""What goes out as events: moulds say what the encoder would, and streams end as they should."""

from __future__ import annotations

import asyncio
import json

from hypothesis import given
from hypothesis import strategies as st

from headrace.types import FinishReason
from headrace_gateway.api.response_events import ResponseEvents, ResponseFacts, lines_of
from headrace_gateway.api.response_schemas import parse_response
from headrace_gateway.api.sse import CALM_BYTES, calm, dump, mould, quote
from headrace_gateway.choices import Piece
from headrace_gateway.metrics import ITL_BUCKETS_S, GatewayMetrics
from headrace_gateway.tokens import ModelTokenizer
from headrace_gateway.tools.events import Text
from support.api import ScriptedFleet, make_record, running_gateway, say

texts = st.text(st.characters(exclude_categories=("Cs",)))


@given(text=texts, number=st.integers(0, 10**9), other=texts)
def test_a_filled_mould_is_what_the_encoder_writes(text: str, number: int, other: str) -> None:
    """Whatever stands in the text: quotes, line ends, control characters, halves of holes."""
    made = mould({"other": other, "delta": {"content": "\0a\0"}, "n": "\0b\0"}, "\0a\0", "\0b\0")
    filled = made.fill(quote(text), str(number))
    assert filled == dump({"other": other, "delta": {"content": text}, "n": number})


def _events() -> ResponseEvents:
    request = parse_response({"model": "tiny", "input": "hello"})
    facts = ResponseFacts("resp_1", 1, "tiny", "default", request)
    return ResponseEvents(facts, ModelTokenizer(make_record()))


@given(st.lists(st.lists(texts.filter(bool), max_size=2), min_size=1, max_size=8))
def test_a_response_is_written_as_its_events_say(deliveries: list[list[str]]) -> None:
    """With any number of texts in a delivery, also none, the two ways give the same stream."""
    written, built = _events(), _events()
    for texts_of in deliveries:
        piece = Piece(0, tuple(Text(text) for text in texts_of), len(texts_of), None)
        assert written.lines(piece) == lines_of(built.piece(piece))
    usage = _usage()
    ends = [each.finished(FinishReason.STOP, usage, 2) for each in (written, built)]
    assert ends[0] == ends[1]


@given(unsent=st.integers(0, 1 << 17), size=st.integers(0, 1 << 20))
def test_a_write_that_may_have_to_wait_has_its_time_limit(unsent: int, size: int) -> None:
    """However little is unsent, what is written now may be more than a client ever reads."""
    transport = _Transport(unsent)
    if calm(transport, size):
        assert unsent < PAUSED_FROM // 4, "it may be waiting already"
        assert unsent + size < PAUSED_FROM, "it would wait behind this"
    assert calm(transport, 0) == (unsent < CALM_BYTES)
    assert not calm(None, size), "nobody is there"


PAUSED_FROM = 64 * 1024
"""asyncio's, and uvloop's: more unsent than that, and who writes waits until a quarter is left."""


class _Transport(asyncio.WriteTransport):
    def __init__(self, unsent: int) -> None:
        super().__init__()
        self._unsent = unsent

    def get_write_buffer_size(self) -> int:
        return self._unsent


def _usage() -> object:
    from headrace_gateway.api.turn import Usage

    return Usage(1, 2, 0)


async def test_streams_that_end_on_one_connection_leave_it_clean() -> None:
    """The end travels with the last events: the next answer begins right behind it."""
    fleet = ScriptedFleet(script=lambda job: say("Hello, world!"))
    body = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "stream": True}
    async with running_gateway(fleet) as gateway:
        answers = []
        for _ in range(3):
            async with gateway.http.post("/v1/chat/completions", json=body) as response:
                answers.append(await response.text())
    for answer in answers:
        events = [each.removeprefix("data: ") for each in answer.strip().split("\n\n")]
        assert events[-1] == "[DONE]"
        chunks = [json.loads(each)["choices"][0] for each in events[:-1]]
        assert "".join(chunk["delta"].get("content") or "" for chunk in chunks) == "Hello, world!"
        assert [chunk["finish_reason"] for chunk in chunks[-1:]] == ["stop"]


def test_the_quick_histogram_reads_like_any_other() -> None:
    """Cumulative buckets, each bound its own, with sum and count."""
    metrics = GatewayMetrics(dict)
    child = metrics.itl.labels("m", "standard")
    for value in (ITL_BUCKETS_S[0], 0.004, 9.0):
        child.observe(value)
    text = metrics.render().decode()
    name = "headrace_gateway_inter_token_latency_seconds"
    labels = 'band="standard",model="m"'
    assert f'{name}_bucket{{band="standard",le="0.001",model="m"}} 1.0' in text
    assert f'{name}_bucket{{band="standard",le="0.005",model="m"}} 2.0' in text
    assert f'{name}_bucket{{band="standard",le="+Inf",model="m"}} 3.0' in text
    assert f"{name}_count{{{labels}}} 3.0" in text
    assert metrics.itl.labels("m", "standard") is child
