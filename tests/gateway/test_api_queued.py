"""Never a silent wait: what streams say while their jobs are in the queue."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from headrace import telemetry
from headrace.clock import ManualClock
from headrace.errors import JobFailedError
from headrace.types import Job
from headrace_gateway.api.waiting import PLACES_TRACED_MAX
from support.api import (
    HANDED_OFF,
    MODEL,
    Running,
    ScriptedFleet,
    Step,
    queued,
    running_gateway,
    say,
)

CHAT = "/v1/chat/completions"
RESPONSES = "/v1/responses"
HI = [{"role": "user", "content": "Hi"}]
TERMINAL = ("response.completed", "response.incomplete", "response.failed", "error")
NOW_MS = ManualClock().wall_ms()


def waits(*then: Step) -> list[Step]:
    """Third, second, first in the queue; the prediction is overdue in the end."""
    return [
        queued(3, NOW_MS + 1_200),
        queued(2, 0),
        queued(1, NOW_MS - 50),
        *then,
    ]


async def sse(g: Running, path: str, **body: Any) -> list[str]:
    """The blocks of an event stream, comments among them."""
    async with g.http.post(path, json={"model": MODEL, "stream": True, **body}) as response:
        assert response.status == 200
        return (await response.text()).strip().split("\n\n")


async def frames(g: Running) -> list[dict[str, Any]]:
    """The same turn over a WebSocket."""
    async with g.http.ws_connect(RESPONSES) as socket:
        await socket.send_json({"type": "response.create", "model": MODEL, "input": "Hi"})
        events: list[dict[str, Any]] = []
        while not events or events[-1]["type"] not in TERMINAL:
            events.append(await socket.receive_json(timeout=10))
        return events


async def response_events(g: Running, over: str) -> list[dict[str, Any]]:
    if over == "websocket":
        return await frames(g)
    blocks = await sse(g, RESPONSES, input="Hi")
    return [json.loads(block.partition("data: ")[2]) for block in blocks]


@pytest.mark.parametrize("over", ["sse", "websocket"])
@pytest.mark.parametrize("known", [True, False])
async def test_a_queued_response_tells_its_place_then_begins(over: str, known: bool) -> None:
    """`in_progress` comes once: with the hand-off where that is known, else before the items."""
    steps = waits(*([HANDED_OFF] if known else []), *say("Fine."))
    async with running_gateway(
        ScriptedFleet(script=lambda job: list(steps)), clock=ManualClock()
    ) as g:
        events = await response_events(g, over)
        assert [event["type"] for event in events[:6]] == [
            "response.created",
            *["response.queued"] * 3,
            "response.in_progress",
            "response.output_item.added",
        ]
        assert [event["type"] for event in events].count("response.in_progress") == 1
        assert [event["queue"] for event in events[1:4]] == [
            {"position": 3, "predicted_start_ms": 1_200},
            {"position": 2, "predicted_start_ms": None},
            {"position": 1, "predicted_start_ms": 0},
        ]
        assert {event["response"]["status"] for event in events[1:4]} == {"queued"}
        assert events[4]["response"]["status"] == "in_progress"
        assert [event["sequence_number"] for event in events] == list(range(len(events)))
        assert events[-1]["type"] == "response.completed"
        await g.settled()


@pytest.mark.parametrize("over", ["sse", "websocket"])
async def test_a_response_that_is_served_at_once_knows_no_queue(over: str) -> None:
    """Nothing was said of the queue when the first token came."""
    fleet = ScriptedFleet(script=lambda job: say("Fine."))
    fleet.silent = True
    async with running_gateway(fleet) as g:
        events = await response_events(g, over)
        assert [event["type"] for event in events[:3]] == [
            "response.created",
            "response.in_progress",
            "response.output_item.added",
        ]
        assert not any(event["type"] == "response.queued" for event in events)


async def test_the_openai_client_takes_it_as_it_comes() -> None:
    """Typed events in order, its helpers undisturbed, whole answers as ever; over a socket too."""
    async with running_gateway(ScriptedFleet(script=lambda job: waits(*say("Fine.")))) as g:
        stream = await g.openai.responses.create(model=MODEL, input="Hi", stream=True)
        events = [event async for event in stream]
        waiting = [event for event in events if event.type == "response.queued"]
        assert [event.response.status for event in waiting] == ["queued"] * 3
        assert waiting[0].queue["position"] == 3  # type: ignore[attr-defined]  # ours on top
        assert events[-1].type == "response.completed"
        async with g.openai.responses.stream(model=MODEL, input="Hi") as helper:
            assert (await helper.get_final_response()).output_text == "Fine."
        whole = await g.openai.responses.create(model=MODEL, input="Hi")
        assert (whole.status, whole.output_text) == ("completed", "Fine.")
        chat = await g.openai.chat.completions.create(model=MODEL, messages=HI, stream=True)
        text = "".join([chunk.choices[0].delta.content or "" async for chunk in chat])
        assert text == "Fine."
        answer = await g.openai.chat.completions.create(model=MODEL, messages=HI, n=2)
        assert [choice.message.content for choice in answer.choices] == ["Fine."] * 2
        async with g.openai.responses.connect() as connection:
            await connection.response.create(model=MODEL, input="Hi")
            seen = [await connection.recv()]
            while seen[-1].type != "response.completed":
                seen.append(await connection.recv())
        assert [event.type for event in seen].count("response.queued") == 3
        await g.settled()


@pytest.mark.parametrize(
    ("path", "body"),
    [(CHAT, {"messages": HI}), ("/v1/completions", {"prompt": "Hi", "echo": True})],
)
async def test_chats_and_completions_say_it_in_comments(path: str, body: dict[str, Any]) -> None:
    steps = waits(HANDED_OFF, *say("Fine."))
    async with running_gateway(
        ScriptedFleet(script=lambda job: list(steps)), clock=ManualClock()
    ) as g:
        blocks = await sse(g, path, **body)
        at = blocks.index(": queued position=3 predicted_start_ms=1200")
        assert blocks[at : at + 3] == [
            ": queued position=3 predicted_start_ms=1200",
            ": queued position=2",
            ": queued position=1 predicted_start_ms=0",
        ]
        assert all(block.startswith("data: ") for block in blocks[:at] + blocks[at + 3 :])
        assert blocks[-1] == "data: [DONE]"


async def test_several_choices_have_the_place_of_their_first() -> None:
    """Two jobs in the queue are one wait: it is over when one of them has been handed off."""
    gates = [asyncio.Event(), asyncio.Event()]

    def script(job: Job) -> list[Step]:
        if job.id.endswith("-0"):
            return [queued(4), gates[0], queued(2), HANDED_OFF, *say("one")]
        return [queued(5), gates[1], queued(3), *say("two")]

    async with running_gateway(ScriptedFleet(script=script)) as g:
        asking = asyncio.create_task(sse(g, CHAT, messages=HI, n=2))
        await asyncio.wait_for(g.fleet.submitted.wait(), 5)
        gates[0].set()
        async with asyncio.timeout(5):
            while len(g.fleet.live) > 1 or len(g.fleet.jobs) < 2:
                await asyncio.sleep(0.001)
        gates[1].set()
        blocks = await asking
        comments = [block for block in blocks if block.startswith(":")]
        assert comments == [": queued position=4", ": queued position=2"]
        await g.settled()


async def test_a_client_that_leaves_the_queue_cancels_its_job() -> None:
    """`response.cancel` while queued: the response never was in progress and holds no item."""
    fleet = ScriptedFleet(script=lambda job: [queued(7), asyncio.Event()])
    async with running_gateway(fleet) as g:
        async with g.http.ws_connect(RESPONSES) as socket:
            await socket.send_json({"type": "response.create", "model": MODEL, "input": "Hi"})
            events = [await socket.receive_json(timeout=5) for _ in range(2)]
            await socket.send_json({"type": "response.cancel"})
            events.append(await socket.receive_json(timeout=5))
        assert [event["type"] for event in events] == [
            "response.created",
            "response.queued",
            "response.incomplete",
        ]
        assert events[-1]["response"]["status"] == "cancelled"
        assert events[-1]["response"]["output"] == []
        async with g.http.post(CHAT, json={"model": MODEL, "messages": HI, "stream": True}) as r:
            while not (await r.content.readline()).startswith(b": queued"):
                pass
        for generation in fleet.generations:
            await asyncio.wait_for(generation.cancelled.wait(), 5)
        await g.settled()


async def test_a_client_that_does_not_read_is_gone_as_ever() -> None:
    """Places that nobody takes fill the socket, and the write's time limit ends the turn."""
    fleet = ScriptedFleet(script=lambda job: [*[queued(9)] * 20_000, asyncio.Event()])
    async with running_gateway(fleet, write_ms=200) as g:
        host, port = g.url.removeprefix("http://").split(":")
        body = json.dumps({"model": MODEL, "input": "Hi", "stream": True}).encode()
        reader, writer = await asyncio.open_connection(host, int(port), limit=1_024)
        writer.write(
            b"POST /v1/responses HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            b"Content-Length: %d\r\n\r\n" % len(body) + body
        )
        await fleet.submitted.wait()
        await asyncio.wait_for(fleet.generations[0].cancelled.wait(), 20)
        assert not fleet.generations[0].waiting.is_set(), "the events did not all fit into buffers"
        await g.settled()
        writer.close()
        reader.feed_eof()


@pytest.fixture
def spans(monkeypatch: pytest.MonkeyPatch) -> Iterator[InMemorySpanExporter]:
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(telemetry, "_provider", provider)
    yield exporter
    provider.shutdown()


async def test_the_wait_is_on_the_span_and_in_the_metrics(spans: InMemorySpanExporter) -> None:
    """Each told place is an event; the wait lasts until the instant at which the job had left."""
    steps = waits(queued(0, at_ms=1_500), *say("ok"))
    fleet = ScriptedFleet(script=lambda job: list(steps))
    async with running_gateway(fleet, clock=ManualClock()) as g:
        await g.post(CHAT, {"model": MODEL, "messages": HI, "service_tier": "flex"})
        fleet.script = lambda job: say("ok")
        await g.post(CHAT, {"model": MODEL, "messages": HI})
        await g.settled()
        waited, direct = spans.get_finished_spans()
        told = [dict(event.attributes or {}) for event in waited.events]
        assert told == [
            {"headrace.queue.position": 3, "headrace.queue.predicted_start_ms": 1_200},
            {"headrace.queue.position": 2},
            {"headrace.queue.position": 1, "headrace.queue.predicted_start_ms": 0},
        ]
        assert (waited.attributes or {})["headrace.queue.wait_ms"] == 1_500
        assert not direct.events
        assert "headrace.queue.wait_ms" not in (direct.attributes or {})
        text = g.gateway.metrics.render().decode()
        name = "headrace_gateway_queue_wait_seconds"
        assert f'{name}_sum{{band="batch",model="{MODEL}"}} 1.5' in text
        assert f'{name}_count{{band="batch",model="{MODEL}"}} 1.0' in text
        assert f'{name}_sum{{band="standard",model="{MODEL}"}} 0.0' in text
        assert f'{name}_count{{band="standard",model="{MODEL}"}} 1.0' in text


async def test_the_events_of_a_span_are_bounded(spans: InMemorySpanExporter) -> None:
    """However long it waits; and a failure in the queue is told as any other."""
    steps = [*(queued(place) for place in range(500, 0, -1)), JobFailedError("it broke")]
    async with running_gateway(ScriptedFleet(script=lambda job: list(steps))) as g:
        events = await response_events(g, "sse")
        assert [event["type"] for event in events].count("response.queued") == 500
        assert events[-1]["type"] == "response.failed"
        assert events[-1]["response"]["output"] == []
        await g.settled()
        [span] = spans.get_finished_spans()
        places = [event for event in span.events if event.name == "queued"]
        assert len(places) == PLACES_TRACED_MAX
