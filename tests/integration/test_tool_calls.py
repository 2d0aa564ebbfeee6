"""Tool calling by the unmodified `openai` client, the whole stack and a model that knows no tools.

SmolLM2's template has no word for functions: all of it is our own way, held by grammars.
"""

from __future__ import annotations

import json
from typing import Any, Literal

import openai
from pydantic import BaseModel

from support.stack import Stack

MODEL = "smollm2"
QUESTION: list[Any] = [{"role": "user", "content": "What is the weather like in Paris today?"}]


class Weather(BaseModel):
    """Look up the weather of a city."""

    city: Literal["Paris", "Rome", "New York"]
    unit: Literal["celsius", "fahrenheit"]


class Time(BaseModel):
    """Look up the time in a city."""

    city: str


TOOLS = [
    openai.pydantic_function_tool(Weather, name="get_weather"),
    openai.pydantic_function_tool(Time, name="get_time"),
]


async def test_required_calls_are_valid_and_a_result_is_answered(
    client: openai.AsyncOpenAI,
) -> None:
    """A round trip: call, arguments as a model, result, answer in words."""
    # a machine without a second for the check of a grammar answers 429: clients try again
    client = client.with_options(max_retries=3)
    first = await client.chat.completions.parse(
        model=MODEL, messages=QUESTION, tools=TOOLS, tool_choice="required", temperature=0,
        parallel_tool_calls=False, max_tokens=80,
    )  # fmt: skip
    choice = first.choices[0]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content is None
    assert choice.message.tool_calls is not None
    [call] = choice.message.tool_calls
    assert isinstance(call.function.parsed_arguments, Weather | Time)
    talk = [
        *QUESTION,
        choice.message,
        {"role": "tool", "tool_call_id": call.id, "content": "It is 31 degrees and sunny."},
    ]
    second = await client.chat.completions.create(
        model=MODEL, messages=talk, tools=TOOLS, tool_choice="none", temperature=0, max_tokens=40
    )
    assert second.choices[0].message.content
    assert second.choices[0].message.tool_calls is None


async def test_a_named_function_is_called_also_at_high_temperature(
    client: openai.AsyncOpenAI,
) -> None:
    """Three choices, streamed: each calls that function, with arguments that its schema allows."""
    async with client.chat.completions.stream(
        model=MODEL, messages=QUESTION, tools=TOOLS, n=3, seed=3, temperature=1.5,
        tool_choice={"type": "function", "function": {"name": "get_weather"}},
        parallel_tool_calls=False, max_tokens=80,
    ) as stream:  # fmt: skip
        deltas = [
            event async for event in stream if event.type == "tool_calls.function.arguments.delta"
        ]
        final = await stream.get_final_completion()
    assert len(deltas) > 3
    ids = set()
    for choice in final.choices:
        assert choice.finish_reason == "tool_calls"
        assert choice.message.tool_calls is not None
        [call] = choice.message.tool_calls
        assert call.function.name == "get_weather"
        Weather.model_validate_json(call.function.arguments)
        ids.add(call.id)
    assert len(ids) == 3


async def test_several_calls_over_a_websocket(client: openai.AsyncOpenAI, stack: Stack) -> None:
    """Required and parallel: nothing but calls, each an item, until the model has enough."""
    tools: Any = [{"type": "function", **tool["function"]} for tool in TOOLS]
    async with client.responses.connect() as connection:
        await connection.response.create(
            model=MODEL,
            input="What are the weather and the time in Paris, Rome and Oslo?",
            tools=tools,
            tool_choice="required",
            temperature=0,
            max_output_tokens=160,
        )
        async for event in connection:
            if event.type in ("response.completed", "response.incomplete"):
                break
            assert event.type not in ("response.failed", "error"), event
    output = event.response.output
    assert {item.type for item in output} == {"function_call"}
    for item in output:
        if item.status == "completed":
            assert json.loads(item.arguments)["city"]
    assert output[0].status == "completed"
    await stack.wait_idle()
