"""Text that goes to clients as it is read from Redis: the same text, once, whoever writes it."""

from __future__ import annotations

import asyncio
import json
from array import array
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

import aiohttp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from opentelemetry.trace import Span

from headrace.errors import HeadraceError
from headrace.types import Delta, Finish, FinishReason, Job, TokenLogprobs
from headrace_gateway.api import sse, websocket
from headrace_gateway.api.websocket import text_frame
from headrace_gateway.choices import Choice, PlainText, TextRules
from headrace_gateway.generation import Generation
from headrace_gateway.tokens import ModelTokenizer
from support.api import ScriptedFleet, encode, make_record, running_gateway
from support.fleet import a_job

SAID = "A mill's wheel turns — the race is full. "
TOKENIZER = ModelTokenizer(make_record())


async def _drop(_: Generation) -> None:
    """Nothing runs that would have to be stopped."""


class Client:
    """Reads a choice; `willing` says at each look whether it can take an event at once."""

    def __init__(self, willing: list[bool], rules: TextRules) -> None:
        self.job = a_job("j", "g1")
        self.generation = Generation(self.job, _drop)
        self.choice = Choice(0, self.generation, TOKENIZER, rules, PlainText())
        self.said: list[str] = []
        self.at_once = 0
        self.tokens = 0
        self._willing = willing
        self.choice.flow_to(self, self._count)

    def ready(self) -> bool:
        return bool(self._willing) and self._willing.pop()

    def tell(self, index: int, text: str) -> None:
        assert index == 0 and text
        self.at_once += 1
        self.said.append(text)

    def _count(self, _: int, tokens: int) -> None:
        self.tokens += tokens

    async def read(self) -> None:
        while self.choice.finish is None:
            piece = await self.choice.next()
            self.tokens += piece.tokens
            self.said.append(piece.text)


@given(data=st.data())
@settings(max_examples=80, deadline=None)
def test_whoever_writes_the_text_is_the_same(data: st.DataObject) -> None:
    """Deliveries of any size, some twice, some by a stale attempt; a client that is slow at times.

    The reader of the stream does not wait for the client, who is scheduled at any moment.
    """
    asyncio.run(_check_text(data))


async def _check_text(data: st.DataObject) -> None:
    tokens = encode(SAID * 3)
    stops = data.draw(st.sampled_from([(), ("race",)]))
    client = Client(data.draw(st.lists(st.booleans(), max_size=60)), TextRules(stops=stops))
    reading = asyncio.create_task(client.read())
    at = 0
    while at < len(tokens):
        count = data.draw(st.integers(1, 6))
        delta = Delta("j", 1, at, tuple(tokens[at : at + count]))
        client.generation.offer(delta)
        if data.draw(st.booleans()):
            client.generation.offer(data.draw(st.sampled_from([delta, replace(delta, attempt=0)])))
        at += len(delta.tokens)
        for _ in range(data.draw(st.integers(0, 3))):
            await asyncio.sleep(0)
    client.generation.offer(Delta("j", 1, at, (), Finish(FinishReason.LENGTH)))
    await reading
    whole = SAID * 3
    assert "".join(client.said) == (whole.partition("race")[0] if stops else whole)
    assert client.tokens == client.choice.completion_tokens
    assert stops or client.tokens == len(tokens)
    assert not (stops and client.at_once), "a text that may end anywhere needs a second look"


async def test_logprobs_and_news_of_the_queue_wait_for_their_reader() -> None:
    """Only what is nothing but text goes at once."""
    client = Client([True] * 9, TextRules())
    first = asyncio.create_task(client.choice.next())
    await asyncio.sleep(0)
    client.generation.offer(Delta("j", 1, 0, (70,), logprobs=(TokenLogprobs(-1.0),)))
    piece = await first
    assert (piece.tokens, len(piece.logprobs), client.at_once) == (1, 1, 0)


async def test_one_clients_trouble_is_its_own() -> None:
    """What is raised while a text is told ends that generation, not the reader of all."""
    client = Client([True], TextRules())

    def broken(index: int, text: str) -> None:
        raise ValueError("no")

    client.tell = broken  # type: ignore[method-assign]
    reading = asyncio.create_task(client.read())
    await asyncio.sleep(0)
    client.generation.offer(Delta("j", 1, 0, (70,)))
    assert client.generation.ended
    with pytest.raises(HeadraceError) as caught:
        await reading
    assert caught.value.code == "internal_error"


class LiveFleet(ScriptedFleet):
    """Its generations are real ones; the test offers what a reply stream would say."""

    def __init__(self) -> None:
        super().__init__()
        self.real: list[Generation] = []

    async def submit(self, job: Job, span: Span) -> Generation:  # type: ignore[override]
        self.real.append(Generation(job, _drop))
        self.submitted.set()
        return self.real[-1]

    async def speak(self, generation: Generation, tokens: array[int] | list[int]) -> None:
        """Token by token, each when its client waits for it; then the end."""
        for at, token in enumerate(tokens):
            while generation._news is None:
                await asyncio.sleep(0)
            generation.offer(Delta(generation.job.id, 1, at, (token,)))
        end = Finish(FinishReason.LENGTH)
        generation.offer(Delta(generation.job.id, 1, len(tokens), (), end))


@pytest.mark.parametrize("version", ["1.0", "1.1"])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/v1/responses"])
async def test_events_stand_whole_in_the_stream_whatever_its_framing(
    path: str, version: str
) -> None:
    """In chunks, or up to the connection's end where a client knows of no chunks."""
    fleet = LiveFleet()
    wanted = {
        "/v1/chat/completions": {"messages": [{"role": "user", "content": "hi"}]},
        "/v1/completions": {"prompt": "hi"},
        "/v1/responses": {"input": "hi"},
    }[path]
    body = json.dumps({"model": "tiny", "stream": True, **wanted}).encode()
    async with running_gateway(fleet) as gateway:
        port = int(gateway.url.rpartition(":")[2])
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        head = (
            f"POST {path} HTTP/{version}\r\nHost: x\r\nContent-Type: application/json\r\n"
            f"Connection: close\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        writer.write(head.encode() + body)
        await fleet.submitted.wait()
        await fleet.speak(fleet.real[0], encode(SAID))
        answer = await reader.read()
        writer.close()
    headers, _, rest = answer.partition(b"\r\n\r\n")
    assert b" 200 OK" in headers
    chunked = b"transfer-encoding: chunked" in headers.lower()
    assert chunked == (version == "1.1")
    events = [
        json.loads(line.removeprefix("data: "))
        for line in (_unchunked(rest) if chunked else rest).decode().splitlines()
        if line.startswith("data: {")
    ]
    assert "".join(map(_text_of, events)) == SAID


@pytest.mark.parametrize("patience_s", [0.01, 3600.0])
async def test_the_opening_goes_out_with_the_first_token_or_alone_when_that_takes_long(
    patience_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client hears of its stream before there is a token; for one that comes at once it is
    woken once."""
    monkeypatch.setattr(sse, "OPENING_S", patience_s)
    fleet = LiveFleet()
    body = {"model": "tiny", "stream": True, "messages": [{"role": "user", "content": "hi"}]}
    async with running_gateway(fleet) as gateway:
        asking = asyncio.create_task(gateway.http.post("/v1/chat/completions", json=body))
        await fleet.submitted.wait()
        answered, _ = await asyncio.wait({asking}, timeout=0.1 if patience_s > 1 else 10)
        assert bool(answered) == (patience_s < 1)
        if answered:
            opening = await asking.result().content.readline()
            assert b'"role":"assistant"' in opening
        await fleet.speak(fleet.real[0], encode(SAID))
        async with await asking as response:
            text = await response.text()
    events = [json.loads(each[6:]) for each in text.splitlines() if each.startswith("data: {")]
    assert "".join(map(_text_of, events)) == SAID
    opened = [event for event in events if event["choices"][0]["delta"].get("role")]
    assert len(opened) == (0 if answered else 1), "once, and before all else"


def _unchunked(data: bytes) -> bytes:
    plain = b""
    while data:
        size, _, data = data.partition(b"\r\n")
        assert data[int(size, 16) :][:2] == b"\r\n", "a chunk is as long as it says"
        plain, data = plain + data[: int(size, 16)], data[int(size, 16) + 2 :]
    return plain


def _text_of(event: dict[str, object]) -> str:
    if event.get("type") == "response.output_text.delta":
        return str(event["delta"])
    choices = event.get("choices")
    if not isinstance(choices, list) or not choices:
        return ""
    choice = choices[0]
    return str(choice["delta"].get("content") or "" if "delta" in choice else choice["text"])


async def test_what_one_read_brings_is_told_once() -> None:
    """A reader that has several deltas of a job notes them all before it tells of them."""
    client = Client([True] * 9, TextRules())
    reading = asyncio.create_task(client.read())
    await asyncio.sleep(0)
    tokens = encode(SAID)
    for at, token in enumerate(tokens[:4]):
        client.generation.note(Delta("j", 1, at, (token,)))
    assert not client.said, "noted is not told"
    client.generation.tell()
    assert (client.at_once, client.tokens) == (1, 4)
    client.generation.note(Delta("j", 1, 4, tuple(tokens[4:])))
    client.generation.note(Delta("j", 1, len(tokens), (), Finish(FinishReason.LENGTH)))
    client.generation.tell()
    await reading
    assert ("".join(client.said), client.at_once) == (SAID, 1), "an end is its reader's"


@asynccontextmanager
async def responding(
    **fields: str,
) -> AsyncIterator[tuple[LiveFleet, aiohttp.ClientWebSocketResponse]]:
    """A WebSocket whose first response has been submitted."""
    fleet = LiveFleet()
    async with (
        running_gateway(fleet) as gateway,
        aiohttp.ClientSession() as session,
        session.ws_connect(f"{gateway.url}/v1/responses") as socket,
    ):
        create = {"type": "response.create", "model": "tiny", "input": "hi"}
        await socket.send_json(create | fields)
        await fleet.submitted.wait()
        yield fleet, socket


@pytest.mark.parametrize("lane", [None, "a"])
async def test_a_websocket_is_written_as_event_streams_are(lane: str | None) -> None:
    """Tokens that come while the turn waits are whole frames, in order, in their lane."""
    async with responding(**({"stream_id": lane} if lane else {})) as (fleet, socket):
        await fleet.speak(fleet.real[0], encode(SAID))
        events = [json.loads((await socket.receive(timeout=10)).data)]
        while events[-1]["type"] != "response.incomplete":
            events.append(json.loads((await socket.receive(timeout=10)).data))
    assert "".join(map(_text_of, events)) == SAID
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    assert {event.get("stream_id") for event in events} == {lane}


@pytest.mark.parametrize("patience_s", [0.01, 3600.0])
async def test_a_websockets_opening_waits_for_the_first_token_too(
    patience_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not for long; a response that is cancelled before has begun all the same."""
    monkeypatch.setattr(websocket, "OPENING_S", patience_s)
    async with responding() as (_, socket):
        first = asyncio.create_task(socket.receive_json())
        told, _ = await asyncio.wait({first}, timeout=0.1 if patience_s > 1 else 10)
        assert bool(told) == (patience_s < 1)
        await socket.send_json({"type": "response.cancel"})
        events = [await first]
        while events[-1]["type"] != "response.incomplete":
            events.append(await asyncio.wait_for(socket.receive_json(), 10))
    assert events[0]["type"] == "response.created"
    assert events[-1]["response"]["status"] == "cancelled"
    assert [event["sequence_number"] for event in events] == list(range(len(events)))


@given(size=st.integers(0, 70_000))
@settings(max_examples=30, deadline=None)
def test_frames_say_how_long_they_are(size: int) -> None:
    """In one, three or nine bytes (RFC 6455, section 5.2)."""
    frame = text_frame(b"x" * size)
    short = frame[1]
    head = 2 if short < 126 else 4 if short == 126 else 10
    told = short if head == 2 else int.from_bytes(frame[2:head])
    assert (frame[0], told, frame[head:]) == (0x81, size, b"x" * size)
