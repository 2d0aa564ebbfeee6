"""Responses over a WebSocket: the SDK's connection, lanes, cancel, bad frames, limits."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import aiohttp
import pytest
from aiohttp import WSMsgType
from openai.resources.responses.responses import AsyncResponsesConnection
from opentelemetry.trace import Span

from headrace.errors import JobFailedError, OverloadError
from headrace.types import Job
from support.api import (
    MODEL,
    Running,
    ScriptedFleet,
    ScriptedGeneration,
    Step,
    encode,
    running_gateway,
    say,
)

URL = "/v1/responses"
TERMINAL = ("response.completed", "response.incomplete", "response.failed", "error")


def create(text: str = "Hi", **fields: Any) -> dict[str, Any]:
    return {"type": "response.create", "model": MODEL, "input": text, **fields}


async def receive(socket: aiohttp.ClientWebSocketResponse) -> dict[str, Any]:
    message = await socket.receive(timeout=10)
    assert message.type is WSMsgType.TEXT, message
    value: dict[str, Any] = json.loads(message.data)
    return value


async def until_end(socket: aiohttp.ClientWebSocketResponse) -> list[dict[str, Any]]:
    events = [await receive(socket)]
    while events[-1]["type"] not in TERMINAL:
        events.append(await receive(socket))
    return events


async def sdk_turn(connection: AsyncResponsesConnection) -> list[Any]:
    events = [await connection.recv()]
    while events[-1].type not in TERMINAL:
        events.append(await connection.recv())
    return events


async def test_the_openai_client_talks_over_one_connection() -> None:
    """Two turns and a mistake between them, on the connection that the SDK opens."""
    async with running_gateway() as g, g.openai.responses.connect() as connection:
        for _ in range(2):
            await connection.response.create(model=MODEL, input="Hi", stream_id="lane-1")
            events = await sdk_turn(connection)
            assert [e.type for e in events[:2]] == ["response.created", "response.in_progress"]
            assert events[-1].type == "response.completed"
            assert events[-1].response.output_text == "Hello, world!"
            assert [event.sequence_number for event in events] == list(range(len(events)))
            assert {event.stream_id for event in events} == {"lane-1"}
            await connection.response.create(model="nobody", input="Hi")
            [error] = await sdk_turn(connection)
            assert (error.status, error.error.code) == (404, "model_not_found")
        await g.settled()


async def test_lanes_run_beside_each_other_and_in_order_within() -> None:
    """Lane a is stuck on its first turn; b comes and goes; a's second waits for its first."""
    gates: dict[str, asyncio.Event] = {"slow": asyncio.Event()}

    def script(job: Job) -> list[Step]:
        slow = encode("slow")[0] in list(job.prompt)
        return [gates["slow"], *say("slow")] if len(fleet.generations) == 0 else say(f"{slow}")

    fleet = ScriptedFleet(script=script)
    async with running_gateway(fleet) as g, g.http.ws_connect(URL) as socket:
        await socket.send_json(create("slow", stream_id="a"))
        await asyncio.wait_for(fleet.submitted.wait(), 5)
        await socket.send_json(create("next", stream_id="a"))
        await socket.send_json(create("quick", stream_id="b"))
        seen: list[tuple[str, str]] = []
        while ("b", "response.completed") not in seen:
            event = await receive(socket)
            seen.append((event["stream_id"], event["type"]))
        assert {kind for lane, kind in seen if lane == "a"} <= {
            "response.created",
            "response.in_progress",
        }
        assert len(fleet.jobs) == 2, "the second turn of lane a has not begun"
        gates["slow"].set()
        first, second = await until_end(socket), await until_end(socket)
        assert {event["stream_id"] for event in [*first, *second]} == {"a"}
        assert first[-1]["response"]["output"][0]["content"][0]["text"] == "slow"
        assert len(fleet.jobs) == 3
        await g.settled()


@pytest.mark.parametrize("by", ["lane", "id"])
async def test_cancel_ends_the_response_and_the_lane_goes_on(by: str) -> None:
    """The cancelled response closes its item, tells its usage, and its job stops."""
    never = asyncio.Event()

    def script(job: Job) -> list[Step]:
        return [*say("par tial")[:2], never] if not fleet.generations else say("next")

    fleet = ScriptedFleet(script=script)
    async with running_gateway(fleet) as g, g.http.ws_connect(URL) as socket:
        await socket.send_json(create(stream_id="a"))
        await socket.send_json(create(stream_id="a"))
        created = await receive(socket)
        await asyncio.wait_for(fleet.generations[0].waiting.wait(), 5)
        which = {"stream_id": "a"} if by == "lane" else {"response_id": created["response"]["id"]}
        await socket.send_json({"type": "response.cancel", **which})
        events = await until_end(socket)
        assert events[-1]["type"] == "response.incomplete"
        assert events[-1]["response"]["status"] == "cancelled"
        assert events[-1]["response"]["usage"]["output_tokens"] == 2
        assert [event["type"] for event in events[-4:-1]] == [
            "response.output_text.done",
            "response.content_part.done",
            "response.output_item.done",
        ]
        assert fleet.generations[0].cancelled.is_set()
        assert (await until_end(socket))[-1]["type"] == "response.completed"
        await socket.send_json({"type": "response.cancel", **which})
        error = await receive(socket)
        assert (error["status"], error["error"]["code"]) == (404, "response_not_found")
        await g.settled()


async def test_a_cancel_before_the_response_exists_is_an_error_frame() -> None:
    """The job is still being accepted: there is no response to close, and the lane goes on."""
    fleet = SlowToAccept()
    async with running_gateway(fleet) as g, g.http.ws_connect(URL) as socket:
        await socket.send_json(create(stream_id="a"))
        await socket.send_json(create(stream_id="a"))
        await asyncio.wait_for(fleet.asked.wait(), 5)
        await socket.send_json({"type": "response.cancel", "stream_id": "a"})
        error = await receive(socket)
        assert (error["status"], error["error"]["code"]) == (499, "cancelled")
        fleet.accepting.set()
        assert (await until_end(socket))[-1]["type"] == "response.completed"
        assert len(fleet.generations) == 1
        await g.settled()


class SlowToAccept(ScriptedFleet):
    """Accepts nothing until `accepting`."""

    def __init__(self) -> None:
        super().__init__()
        self.asked = asyncio.Event()
        self.accepting = asyncio.Event()

    async def submit(self, job: Job, span: Span) -> ScriptedGeneration:
        self.asked.set()
        await self.accepting.wait()
        return await super().submit(job, span)


BAD_FRAMES = [
    ("not json", "invalid_json"),
    ("[1, 2]", "invalid_json"),
    ('{"type": "response.create", "type": "x"}', "invalid_json"),
    ('{"type": "response.create", "model": "tiny", "input": "\\ud800"}', "invalid_json"),
    ('{"type": "session.update"}', "unknown_event_type"),
    ("{}", "unknown_event_type"),
    ('{"type": "response.create"}', "missing_required_parameter"),
    ('{"type": "response.create", "model": "tiny", "input": 5}', "invalid_value"),
    ('{"type":"response.create","model":"tiny","input":"","stream_id":"a b"}', "invalid_value"),
    ('{"type": "response.cancel", "response_id": 7}', "invalid_value"),
    (
        '{"type":"response.create","model":"tiny","input":"","background":true}',
        "unsupported_parameter",
    ),
    (
        '{"type":"response.create","model":"tiny","input":"","previous_response_id":"resp_1"}',
        "previous_response_not_found",
    ),
]  # fmt: skip


async def test_bad_frames_are_answered_and_the_connection_lives_on() -> None:
    async with running_gateway() as g, g.http.ws_connect(URL) as socket:
        for frame, code in BAD_FRAMES:
            await socket.send_str(frame)
            answer = await receive(socket)
            assert answer["type"] == "error"
            assert answer["status"] == 400
            assert set(answer["error"]) == {"message", "type", "param", "code"}
            assert answer["error"]["code"] == code, frame
        await socket.send_bytes(b"\x00")
        assert (await receive(socket))["error"]["code"] == "invalid_frame"
        await socket.send_json(create())
        assert (await until_end(socket))[-1]["type"] == "response.completed"


async def test_lanes_and_waiting_turns_are_bounded() -> None:
    """What exceeds a limit is refused at once, by name, with a wait; the rest is undisturbed."""
    gate = asyncio.Event()
    fleet = ScriptedFleet(script=lambda job: [gate, *say("ok")])
    async with (
        running_gateway(fleet, ws_lanes_max=2, ws_queue_max=2) as g,
        g.http.ws_connect(URL) as socket,
    ):
        for lane in ("a", "b"):
            await socket.send_json(create(stream_id=lane))
            await receive(socket)
            await receive(socket)
        await socket.send_json(create(stream_id="c"))
        error = await receive(socket)
        assert (error["status"], error["error"]["code"]) == (429, "too_many_lanes")
        assert error["stream_id"] == "c"
        assert error["error"]["headers"]["retry-after-ms"] == "1000"
        for _ in range(3):
            await socket.send_json(create(stream_id="a"))
        error = await receive(socket)
        assert (error["status"], error["error"]["code"]) == (429, "too_many_turns")
        gate.set()
        ends = [await until_end(socket) for _ in range(4)]
        assert [events[-1]["type"] for events in ends] == ["response.completed"] * 4
        await g.settled()


async def test_closing_the_socket_cancels_everything_it_started() -> None:
    never = asyncio.Event()
    fleet = ScriptedFleet(script=lambda job: [never])
    async with running_gateway(fleet) as g:
        async with g.http.ws_connect(URL) as socket:
            for lane in ("a", "b"):
                await socket.send_json(create(stream_id=lane))
                await receive(socket)
                await receive(socket)
            await socket.send_json(create(stream_id="a"))
        for generation in fleet.generations:
            await asyncio.wait_for(generation.cancelled.wait(), 5)
        assert len(fleet.generations) == 2, "what was waiting never began"
        await g.settled()
        assert g.gateway.counts()["open_websockets"] == 0


async def test_a_connection_cut_without_a_goodbye_cancels_too() -> None:
    fleet = ScriptedFleet(script=lambda job: [asyncio.Event()])
    async with running_gateway(fleet) as g:
        socket = await g.http.ws_connect(URL)
        await socket.send_json(create())
        await asyncio.wait_for(fleet.submitted.wait(), 5)
        await g.http.close()
        await asyncio.wait_for(fleet.generations[0].cancelled.wait(), 5)
        await g.settled()


async def test_failures_after_and_before_the_response_exists() -> None:
    """Created, then broken: `response.failed`. Never created: an error frame with its headers."""
    broken = [*say("so me")[:1], JobFailedError("broke")]
    fleet = ScriptedFleet(script=lambda job: list(broken))
    async with running_gateway(fleet) as g, g.http.ws_connect(URL) as socket:
        await socket.send_json(create())
        events = await until_end(socket)
        assert events[-1]["type"] == "response.failed"
        assert events[-1]["response"]["error"] == {"code": "server_error", "message": "broke"}
        fleet.refusal = OverloadError("full", retry_after_ms=700)
        await socket.send_json(create(stream_id="z"))
        error = await receive(socket)
        assert (error["status"], error["stream_id"]) == (429, "z")
        assert error["error"]["headers"]["retry-after-ms"] == "700"
        await g.settled()


async def test_an_oversized_frame_closes_the_connection() -> None:
    """The cap is the protocol's: close code 1009, message too big."""
    async with (
        running_gateway(body_bytes_max=2_000) as g,
        g.http.ws_connect(URL) as socket,
    ):
        await socket.send_str(json.dumps(create("x" * 3_000)))
        message = await socket.receive(timeout=10)
        assert message.type in (WSMsgType.CLOSE, WSMsgType.CLOSED)
        assert socket.close_code == 1009


async def upgrade_error(g: Running, **headers: str) -> tuple[int, str]:
    with pytest.raises(aiohttp.WSServerHandshakeError) as caught:
        await g.http.ws_connect(URL, headers=headers)
    return caught.value.status, caught.value.message


async def test_who_may_not_connect() -> None:
    """No key, a foreign page at a gateway without keys, one connection too many, no upgrade."""
    async with running_gateway(api_keys="k:t") as g:
        assert (await upgrade_error(g))[0] == 401
        async with g.http.ws_connect(
            URL, headers={"Authorization": "Bearer k", "Origin": "https://elsewhere.example"}
        ):
            pass
    async with running_gateway(websockets_max=1) as g:
        assert (await upgrade_error(g, Origin="https://elsewhere.example"))[0] == 403
        async with g.http.ws_connect(URL, headers={"Origin": g.url}):
            assert (await upgrade_error(g))[0] == 429
        async with g.http.get(URL) as response:
            assert response.status == 426
            assert (await response.json())["error"]["code"] == "upgrade_required"
