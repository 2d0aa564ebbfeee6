"""Tool calling over the Responses API: whole, as server-sent events, and on a WebSocket."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import openai
import pytest
from pydantic import BaseModel

from headrace.types import FinishReason, Job
from support import tools as t
from support.api import CHATML, Running, ScriptedFleet, Step, running_gateway

MODEL = "tools"
FLAT: list[Any] = [
    {"type": "function", **t.WEATHER_TOOL["function"]},
    {"type": "function", "name": "get_time"},
]
ARGUMENTS = '{"city": "Köln 😀"}'
CALL = f'<tool_call>\n{{"name": "get_weather", "arguments": {ARGUMENTS}}}\n</tool_call>'
TIME = '<tool_call>\n{"name": "get_time", "arguments": {}}\n</tool_call>'
MIXED = f"Let me see.\n{CALL}\nAnd {TIME}\n{CALL} Done."
ITEMS = [
    ("message", "Let me see."),
    ("function_call", ("get_weather", ARGUMENTS)),
    ("message", "\nAnd"),
    ("function_call", ("get_time", "{}")),
    ("function_call", ("get_weather", ARGUMENTS)),
    ("message", " Done."),
]


class Weather(BaseModel):
    """Today's weather."""

    city: str


def told(item: dict[str, Any]) -> tuple[str, Any]:
    """What an item of an output says."""
    if item["type"] == "message":
        return "message", "".join(part["text"] for part in item["content"])
    return "function_call", (item["name"], item["arguments"])


async def over_sse(g: Running, **body: Any) -> list[dict[str, Any]]:
    body = {"model": MODEL, "input": "Rain?", "tools": FLAT, "stream": True, **body}
    async with g.http.post("/v1/responses", json=body) as response:
        text = await response.text()
    return [
        json.loads(line.removeprefix("data: "))
        for line in text.splitlines()
        if line.startswith("data: ")
    ]


async def over_websocket(g: Running, **body: Any) -> list[dict[str, Any]]:
    body = {"model": MODEL, "input": "Rain?", "tools": FLAT, **body}
    events = []
    async with g.http.ws_connect("/v1/responses") as socket:
        await socket.send_json({"type": "response.create", **body})
        async for frame in socket:
            events.append(json.loads(frame.data))
            if events[-1]["type"] in ("response.completed", "response.incomplete", "error"):
                break
    return events


def check_events(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The documented order: items one after the other, each opened, filled, closed; the output."""
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    kinds = [event["type"].removeprefix("response.") for event in events]
    assert kinds[:2] == ["created", "in_progress"]
    output = events[-1]["response"]["output"]
    at = 2
    for place, item in enumerate(output):
        inside = []
        assert kinds[at] == "output_item.added"
        assert events[at]["item"]["status"] == "in_progress"
        while kinds[at] != "output_item.done":
            inside.append(events[at])
            at += 1
        assert events[at]["item"] == item
        assert {event["output_index"] for event in [*inside, events[at]]} == {place}
        assert {event["item_id"] for event in inside[1:]} == {item["id"]}
        _check_inside(inside[1:], item)
        at += 1
    assert at == len(events) - 1
    assert len({item["id"] for item in output}) == len(output)
    return list(output)


def _check_inside(events: list[dict[str, Any]], item: dict[str, Any]) -> None:
    kinds = [event["type"].removeprefix("response.") for event in events]
    deltas = [event["delta"] for event in events if "delta" in event]
    if item["type"] == "message":
        assert kinds[0] == "content_part.added"
        assert kinds[-2:] == ["output_text.done", "content_part.done"]
        assert set(kinds[1:-2]) <= {"output_text.delta"}
        assert "".join(deltas) == events[-2]["text"] == told(item)[1]
    else:
        assert kinds[-1] == "function_call_arguments.done"
        assert set(kinds[:-1]) == {"function_call_arguments.delta"}
        assert "".join(deltas) == events[-1]["arguments"] == item["arguments"]


@pytest.mark.parametrize("per_chunk", [1, 9, 1_000])
@pytest.mark.parametrize("transport", [over_sse, over_websocket])
async def test_text_and_calls_are_items_in_their_order(transport: Any, per_chunk: int) -> None:
    """However it was delivered, the same items come out of both transports."""
    async with running_gateway(t.tool_fleet(t.QWEN, MIXED, per_chunk=per_chunk)) as g:
        output = check_events(await transport(g))
        assert list(map(told, output)) == ITEMS
        assert {item["status"] for item in output} == {"completed"}
        calls = [item for item in output if item["type"] == "function_call"]
        assert len({item["call_id"] for item in calls}) == 3
        assert all(item["call_id"].startswith("call_") for item in calls)
        assert all(item["id"].startswith("fc_") for item in calls)
        await g.settled()


async def test_a_response_that_is_not_streamed_has_the_same_items() -> None:
    """And says which tools it was offered."""
    async with running_gateway(t.tool_fleet(CHATML, MIXED, TIME)) as g:
        choice: Any = {"type": "function", "name": "get_time"}
        answer = await g.openai.responses.create(model=MODEL, input="Rain?", tools=FLAT)
        assert [told(item.model_dump()) for item in answer.output] == ITEMS
        assert answer.output_text == "Let me see.\nAnd Done."
        assert answer.tool_choice == "auto"
        assert answer.parallel_tool_calls is True
        assert [tool.type for tool in answer.tools] == ["function", "function"]
        assert answer.usage is not None
        assert answer.usage.output_tokens == len(t.tokens_of(MIXED)) + 1
        answer = await g.openai.responses.create(
            model=MODEL, input="?", tools=FLAT, tool_choice=choice, parallel_tool_calls=False
        )
        assert answer.tool_choice == openai.types.responses.ToolChoiceFunction(**choice)
        assert answer.parallel_tool_calls is False
        assert [told(item.model_dump()) for item in answer.output] == [ITEMS[3]]
        assert "get_time" in g.fleet.jobs[1].sampling.grammar


async def test_a_call_alone_is_the_only_item() -> None:
    async with running_gateway(t.tool_fleet(t.QWEN, TIME)) as g:
        output = check_events(await over_sse(g))
        assert list(map(told, output)) == [ITEMS[3]]


async def test_nothing_said_is_an_empty_message() -> None:
    async with running_gateway(t.tool_fleet(t.QWEN, "")) as g:
        assert list(map(told, check_events(await over_sse(g)))) == [("message", "")]


async def test_a_call_that_is_cut_off_is_incomplete() -> None:
    def script(job: Job) -> list[Step]:
        return t.speak(CALL[:60], reason=FinishReason.LENGTH)

    async with running_gateway(ScriptedFleet(t.tool_record(t.QWEN), script=script)) as g:
        events = await over_sse(g)
        [item] = check_events(events)
        assert item["status"] == "incomplete"
        assert ARGUMENTS.startswith(item["arguments"])
        assert events[-1]["type"] == "response.incomplete"
        assert events[-1]["response"]["incomplete_details"] == {"reason": "max_output_tokens"}


async def test_a_response_cancelled_within_a_call_closes_the_call() -> None:
    """On a WebSocket: the item is told as far as it went, and the response ends."""
    never = asyncio.Event()

    def script(job: Job) -> list[Step]:
        return [*t.speak(CALL)[:40], never]

    async with running_gateway(ScriptedFleet(t.tool_record(t.QWEN), script=script)) as g:
        events = []
        async with g.http.ws_connect("/v1/responses") as socket:
            body = {"model": MODEL, "input": "Rain?", "tools": FLAT}
            await socket.send_json({"type": "response.create", **body})
            async for frame in socket:
                events.append(json.loads(frame.data))
                if events[-1]["type"] == "response.function_call_arguments.delta":
                    await g.fleet.generations[0].waiting.wait()
                    await socket.send_json({"type": "response.cancel"})
                    break
            async for frame in socket:
                events.append(json.loads(frame.data))
                if events[-1]["type"] == "response.incomplete":
                    break
        [item] = check_events(events)
        assert (item["type"], item["status"]) == ("function_call", "incomplete")
        assert events[-1]["response"]["status"] == "cancelled"
        await g.settled()


async def test_the_clients_helpers_parse_arguments() -> None:
    """`responses.parse` and the events of `responses.stream`."""
    tools = [openai.pydantic_function_tool(Weather, name="get_weather")]
    async with running_gateway(t.tool_fleet(t.QWEN, CALL, CALL)) as g:
        answer = await g.openai.responses.parse(model=MODEL, input="Rain?", tools=tools)
        [item] = answer.output
        assert item.type == "function_call"
        assert item.parsed_arguments == Weather(city="Köln 😀")
        async with g.openai.responses.stream(model=MODEL, input="Rain?", tools=tools) as stream:
            events = [event async for event in stream]
        deltas = [e for e in events if e.type == "response.function_call_arguments.delta"]
        assert "".join(event.delta for event in deltas) == ARGUMENTS
        assert deltas[-1].snapshot == ARGUMENTS
        [done] = [e for e in events if e.type == "response.function_call_arguments.done"]
        assert done.arguments == ARGUMENTS
        assert "TEXT" in g.fleet.jobs[0].sampling.grammar


async def test_a_round_trip_puts_output_back_into_input() -> None:
    """Items go in as they came out; the model reads its own words again."""
    fleet = t.tool_fleet(t.QWEN, f"Let me see.\n{CALL}\n{TIME}", "It rains.")
    async with running_gateway(fleet) as g:
        talk: list[Any] = [{"role": "user", "content": "Rain?"}]
        first = await g.openai.responses.create(model=MODEL, input=talk, tools=FLAT)
        talk += first.output
        for item in first.output:
            if item.type == "function_call":
                result: Any = [{"type": "input_text", "text": f"result of {item.name}"}]
                talk.append(
                    {"type": "function_call_output", "call_id": item.call_id, "output": result}
                )
        second = await g.openai.responses.create(model=MODEL, input=talk, tools=FLAT)
        assert second.output_text == "It rains."
        before, after = map(t.prompt_of, fleet.jobs)
        assert after == (
            f"{before}Let me see.\n{CALL}\n{TIME}<|im_end|>\n<|im_start|>user\n<tool_response>\n"
            "result of get_weather\n</tool_response>\n<tool_response>\nresult of get_time\n"
            "</tool_response><|im_end|>\n<|im_start|>assistant\n"
        )


def flat(name: str, **fields: Any) -> dict[str, Any]:
    return {"type": "function", "name": name, **fields}


CALL_ITEM = {"type": "function_call", "call_id": "a", "name": "f", "arguments": "{}"}
OUTPUT = {"type": "function_call_output", "call_id": "a", "output": "ok"}
WRONG: list[tuple[dict[str, Any], str]] = [
    ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
    ({"tools": [flat("a"), {"type": "file_search", "vector_store_ids": []}]}, "tools[1].type"),
    ({"tools": [{"type": "mcp", "server_label": "x"}]}, "tools[0].type"),
    ({"tools": [{"type": "function", "function": {"name": "a"}}]}, "tools[0].name"),
    ({"tools": [flat("a", defer_loading=True)]}, "tools[0].defer_loading"),
    ({"tools": [flat("a", **{"async": True})]}, "tools[0].async"),
    ({"tools": [flat("a", parameters={"type": "array"})]}, "tools[0].parameters"),
    ({"tools": [flat("a"), flat("a")]}, "tools[1].name"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"tools": [flat("a")], "tool_choice": {"type": "web_search"}}, "tool_choice.type"),
    ({"tools": [flat("a")], "tool_choice": {"type": "function"}}, "tool_choice.name"),
    ({"tools": [flat("a")], "tool_choice": flat("b")}, "tool_choice"),
    ({"functions": [{"name": "f"}]}, "functions"),
    ({"input": [{"type": "web_search_call", "id": "x"}]}, "input[0].type"),
    ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type"),
    ({"input": [OUTPUT]}, "input[0].call_id"),
    ({"input": [CALL_ITEM, {**OUTPUT, "call_id": "b"}]}, "input[1].call_id"),
    ({"input": [CALL_ITEM, CALL_ITEM]}, "input[1].call_id"),
    ({"input": [{**CALL_ITEM, "arguments": "x"}]}, "input[0].arguments"),
    ({"input": [{**CALL_ITEM, "arguments": {}}]}, "input[0].arguments"),
    ({"input": [{**CALL_ITEM, "call_id": ""}]}, "input[0].call_id"),
    ({"input": [{"type": "function_call", "call_id": "a"}]}, "input[0].name"),
    ({"input": [CALL_ITEM, {**OUTPUT, "output": 5}]}, "input[1].output"),
    ({"input": [CALL_ITEM, {**OUTPUT, "output": [{"type": "input_image"}]}]},
     "input[1].output[0].type"),
]  # fmt: skip


async def test_what_is_wrong_is_refused_by_the_name_of_its_field() -> None:
    async with running_gateway(t.tool_fleet(t.QWEN)) as g:
        for fields, param in WRONG:
            status, answer = await g.post("/v1/responses", {"model": MODEL, "input": "x", **fields})
            error: Any = answer["error"]
            assert (status, error["param"]) == (400, param), (fields, answer)
        assert not g.fleet.jobs
