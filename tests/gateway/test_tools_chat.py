"""Tool calling over chat completions, with the unmodified `openai` client."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest
from pydantic import BaseModel

from headrace.types import FinishReason, Job
from headrace_gateway.tools.events import Arguments, CallBegins, CallEnds
from headrace_gateway.tools.hermes import HermesParser
from headrace_gateway.tools.reading import CALLS_MAX, ToolReader
from support import tools as t
from support.api import CHATML, ScriptedFleet, Step, running_gateway

MODEL = "tools"
HI: list[Any] = [{"role": "user", "content": "Rain in Köln?"}]
TOOLS: list[Any] = [t.WEATHER_TOOL, t.TIME_TOOL]
ARGUMENTS = '{"city": "Köln \\"am Rhein\\" 😀"}'
CALL = f'{{"name": "get_weather", "arguments": {ARGUMENTS}}}'
TIME = '{"name": "get_time", "arguments": {}}'
HERMES = f"<tool_call>\n{CALL}\n</tool_call>\n<tool_call>\n{TIME}\n</tool_call>"
SAID = [
    (t.QWEN, HERMES),
    (CHATML, HERMES),
    (t.MISTRAL, f"[TOOL_CALLS] [{CALL}, {TIME}]"),
    (t.MISTRAL_NAMED, f"[TOOL_CALLS]get_weather[ARGS]{ARGUMENTS}[TOOL_CALLS]get_time[ARGS]{{}}"),
    (t.LLAMA, f"<|python_tag|>{CALL}; {TIME}".replace("arguments", "parameters")),
]


class Weather(BaseModel):
    """Today's weather."""

    city: str


def named(*names: str) -> list[Any]:
    return [{"type": "function", "function": {"name": name}} for name in names]


@pytest.mark.parametrize(("template", "said"), SAID)
@pytest.mark.parametrize("before", ["", "Let me see."])
async def test_calls_come_whole_in_every_format(template: str, said: str, before: str) -> None:
    """Markers that are special tokens of the model included; usage counts every token."""
    async with running_gateway(t.tool_fleet(template, before + said)) as g:
        answer = await g.openai.chat.completions.create(model=MODEL, messages=HI, tools=TOOLS)
        message = answer.choices[0].message
        assert message.content == (before or None)
        assert message.tool_calls is not None
        assert [(c.type, c.function.name, c.function.arguments) for c in message.tool_calls] == [
            ("function", "get_weather", ARGUMENTS), ("function", "get_time", "{}"),
        ]  # fmt: skip
        ids = [call.id for call in message.tool_calls]
        assert len(set(ids)) == 2
        assert all(call_id.startswith("call_") for call_id in ids)
        assert answer.choices[0].finish_reason == "tool_calls"
        assert answer.usage is not None
        assert answer.usage.completion_tokens == len(t.tokens_of(before + said)) + 1
        prompt = t.prompt_of(g.fleet.jobs[0])
        assert "Today's weather" in prompt
        assert '"get_time"' in prompt
        assert g.fleet.jobs[0].sampling.grammar == ""
        await g.settled()


@pytest.mark.parametrize(("template", "said"), SAID)
@pytest.mark.parametrize("per_chunk", [1, 7, 1_000])
async def test_streamed_calls_have_openais_shapes(template: str, said: str, per_chunk: int) -> None:
    """Id, type and name first, then pieces of arguments, then the reason; joined they are whole."""
    fleet = t.tool_fleet(template, f"Well. {said}", per_chunk=per_chunk)
    async with running_gateway(fleet) as g:
        body = {"model": MODEL, "messages": HI, "tools": TOOLS, "stream": True}
        async with g.http.post("/v1/chat/completions", json=body) as response:
            lines = (await response.text()).split("\n\n")
        assert lines[-2:] == ["data: [DONE]", ""]
        chunks = [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]
        choices = [chunk["choices"][0] for chunk in chunks]
        deltas = [choice["delta"] for choice in choices]
        assert deltas[0] == {"role": "assistant", "content": None, "refusal": None}
        assert "".join(delta.get("content") or "" for delta in deltas) == "Well."
        assert deltas[-1] == {}
        reasons = [choice["finish_reason"] for choice in choices]
        assert reasons == [None] * (len(reasons) - 1) + ["tool_calls"]
        calls = [call for delta in deltas for call in delta.get("tool_calls", ())]
        for index, name, arguments in [(0, "get_weather", ARGUMENTS), (1, "get_time", "{}")]:
            first, *rest = [call for call in calls if call["index"] == index]
            call_id = first["id"]
            assert first == {
                "index": index,
                "id": call_id,
                "type": "function",
                "function": {"name": name, "arguments": ""},
            }
            assert all(set(call) == {"index", "function"} for call in rest)
            assert all(set(call["function"]) == {"arguments"} for call in rest)
            assert "".join(call["function"]["arguments"] for call in rest) == arguments
        if per_chunk == 1:
            assert len(calls) > 10, "arguments come as they are made"
        await g.settled()


ODD = [
    "", " \n", "<tool_call>", f"{HERMES}!", f" {HERMES} \n", f"a <tool_call>{{ {HERMES}",
    HERMES.replace("}\n</tool_call>", ""), '<tool_call>{"name": "get_time", "arguments": {oops}}',
    HERMES.replace("get_weather", "rm"), f"{HERMES} and {HERMES}", f"😀{HERMES[:70]}",
]  # fmt: skip


@pytest.mark.parametrize("per_chunk", [1, 5])
async def test_a_stream_joined_is_the_whole_message(per_chunk: int) -> None:
    """Content, calls and reason, whatever the model says and however it is delivered."""
    texts = [text for text in ODD for _ in range(2)]
    async with running_gateway(t.tool_fleet(t.QWEN, *texts, per_chunk=per_chunk)) as g:
        ask = g.openai.chat.completions.create
        for text in ODD:
            whole = (await ask(model=MODEL, messages=HI, tools=TOOLS)).choices[0]
            content, reason = "", None
            calls: dict[int, list[tuple[str, str]]] = {}
            async for chunk in await ask(model=MODEL, messages=HI, tools=TOOLS, stream=True):
                choice = chunk.choices[0]
                content += choice.delta.content or ""
                reason = choice.finish_reason or reason
                for call in choice.delta.tool_calls or ():
                    said = calls.setdefault(call.index, [])
                    said.append((call.function.name or "", call.function.arguments or ""))
            assert content == (whole.message.content or ""), text
            assert reason == whole.finish_reason, text
            joined = [tuple("".join(p) for p in zip(*said, strict=True)) for said in calls.values()]
            assert joined == [
                (call.function.name, call.function.arguments)
                for call in whole.message.tool_calls or ()
            ], text


async def test_the_clients_stream_helper_tells_of_calls() -> None:
    """Its events of arguments as they come and are done, and the final parsed completion."""
    async with running_gateway(t.tool_fleet(t.QWEN, f"<tool_call>\n{CALL}\n</tool_call>")) as g:
        tool = openai.pydantic_function_tool(Weather, name="get_weather")
        async with g.openai.chat.completions.stream(
            model=MODEL, messages=HI, tools=[tool]
        ) as stream:
            events = [event async for event in stream]
        deltas = [e for e in events if e.type == "tool_calls.function.arguments.delta"]
        assert "".join(event.arguments_delta for event in deltas) == ARGUMENTS
        [done] = [e for e in events if e.type == "tool_calls.function.arguments.done"]
        assert done.parsed_arguments == Weather(city='Köln "am Rhein" 😀')
        final = (await stream.get_final_completion()).choices[0]
        assert final.finish_reason == "tool_calls"
        assert final.message.content is None
        assert final.message.tool_calls is not None
        assert final.message.tool_calls[0].function.arguments == ARGUMENTS


async def test_the_clients_parse_helper_gives_arguments_as_models() -> None:
    """Its tools are strict: the job carries a grammar that holds once a call begins."""
    async with running_gateway(t.tool_fleet(t.QWEN, f"<tool_call>\n{CALL}\n</tool_call>")) as g:
        answer = await g.openai.chat.completions.parse(
            model=MODEL,
            messages=HI,
            tools=[openai.pydantic_function_tool(Weather, name="get_weather")],
        )
        message = answer.choices[0].message
        assert message.tool_calls is not None
        assert message.tool_calls[0].function.parsed_arguments == Weather(city='Köln "am Rhein" 😀')
        assert "TEXT" in g.fleet.jobs[0].sampling.grammar


async def test_a_round_trip_from_call_to_answer() -> None:
    """The client appends the message as it got it, answers each call, and asks on."""
    fleet = t.tool_fleet(t.QWEN, f"Let me see.\n{HERMES}", "It rains.")
    async with running_gateway(fleet) as g:
        talk = list(HI)
        first = await g.openai.chat.completions.create(model=MODEL, messages=talk, tools=TOOLS)
        message = first.choices[0].message
        assert message.tool_calls is not None
        talk.append(message)
        for call, result in zip(message.tool_calls, ("rain", "12:30"), strict=True):
            talk.append({"role": "tool", "tool_call_id": call.id, "content": result})
        second = await g.openai.chat.completions.create(model=MODEL, messages=talk, tools=TOOLS)
        assert second.choices[0].message.content == "It rains."
        assert second.choices[0].message.tool_calls is None
        assert second.choices[0].finish_reason == "stop"
        before, after = map(t.prompt_of, fleet.jobs)
        assert after == (
            f"{before}Let me see.\n{HERMES}<|im_end|>\n<|im_start|>user\n<tool_response>\nrain\n"
            "</tool_response>\n<tool_response>\n12:30\n</tool_response><|im_end|>\n"
            "<|im_start|>assistant\n"
        ), "the model reads its own words again, so that its prefix is cached"


async def test_every_choice_has_calls_of_its_own() -> None:
    """n=3: one calls twice, one not at all, one is cut off; ids are unique over all of them."""

    def script(job: Job) -> list[Step]:
        which = int(job.id.rpartition("-")[2])
        if which == 2:
            return t.speak(HERMES[:60], reason=FinishReason.LENGTH)
        return t.speak([HERMES, "No rain."][which])

    async with running_gateway(ScriptedFleet(t.tool_record(t.QWEN), script=script)) as g:
        for stream in (False, True):
            answer = await _ask(g.openai, stream=stream)
            assert [choice["finish_reason"] for choice in answer] == [
                "tool_calls", "stop", "length",
            ]  # fmt: skip
            assert [choice["content"] for choice in answer] == [None, "No rain.", None]
            counts = [len(choice["calls"]) for choice in answer]
            assert counts == [2, 0, 1]
            assert answer[2]["calls"][0][1:] == ("get_weather", ARGUMENTS[:11])
            ids = [call[0] for choice in answer for call in choice["calls"]]
            assert len(set(ids)) == 3


async def _ask(client: openai.AsyncOpenAI, *, stream: bool) -> list[dict[str, Any]]:
    """The three choices, by the client's own joining where they are streamed."""
    if stream:
        async with client.chat.completions.stream(
            model=MODEL, messages=HI, tools=TOOLS, n=3
        ) as events:
            try:
                answer: Any = await events.get_final_completion()
            except openai.LengthFinishReasonError as cut:
                answer = cut.completion
    else:
        answer = await client.chat.completions.create(model=MODEL, messages=HI, tools=TOOLS, n=3)
    return [
        {
            "finish_reason": choice.finish_reason,
            "content": choice.message.content,
            "calls": [
                (call.id, call.function.name, call.function.arguments)
                for call in choice.message.tool_calls or ()
            ],
        }
        for choice in answer.choices
    ]


@pytest.mark.parametrize(
    ("choice", "held"),
    [
        ("required", ["get_weather", "get_time"]),
        ({"type": "function", "function": {"name": "get_time"}}, ["get_time"]),
    ],
)
async def test_a_choice_that_must_call_is_held_to_it(choice: Any, held: list[str]) -> None:
    """The job's grammar lists what may be called; the model is told of all functions."""
    said = f"<tool_call>\n{TIME}\n</tool_call>"
    async with running_gateway(t.tool_fleet(t.QWEN, said)) as g:
        answer = await g.openai.chat.completions.create(
            model=MODEL, messages=HI, tools=TOOLS, tool_choice=choice
        )
        assert answer.choices[0].finish_reason == "tool_calls"
        grammar = g.fleet.jobs[0].sampling.grammar
        assert [name for name in ("get_weather", "get_time") if name in grammar] == held
        assert "get_weather" in t.prompt_of(g.fleet.jobs[0])


async def test_none_offers_nothing_and_reads_nothing() -> None:
    """Tools do not reach the prompt, and what looks like a call is text; markers stay hidden."""
    fleet = t.tool_fleet(t.MISTRAL_NAMED, "[TOOL_CALLS]get_time[ARGS]{}", HERMES)
    async with running_gateway(fleet) as g:
        for expected in ("get_time{}", HERMES):
            answer = await g.openai.chat.completions.create(
                model=MODEL, messages=HI, tools=TOOLS, tool_choice="none"
            )
            assert answer.choices[0].message.content == expected
            assert answer.choices[0].message.tool_calls is None
            assert answer.choices[0].finish_reason == "stop"
        assert "get_weather" not in t.prompt_of(fleet.jobs[0])


@pytest.mark.parametrize("per_chunk", [1, 1_000])
async def test_without_parallel_calls_the_first_ends_the_message(per_chunk: int) -> None:
    """The job is cancelled there; what the model would have gone on to say is not told."""
    fleet = t.tool_fleet(t.QWEN, f"Well. {HERMES} Bye.", per_chunk=per_chunk)
    async with running_gateway(fleet) as g:
        answer = await g.openai.chat.completions.create(
            model=MODEL, messages=HI, tools=TOOLS, parallel_tool_calls=False
        )
        message = answer.choices[0].message
        assert message.content == "Well."
        assert message.tool_calls is not None
        assert [call.function.name for call in message.tool_calls] == ["get_weather"]
        assert answer.choices[0].finish_reason == "tool_calls"
        assert answer.usage is not None
        assert answer.usage.completion_tokens < len(t.tokens_of(f"Well. {HERMES}"))
        assert fleet.generations[0].cancelled.is_set()
        await g.settled()


async def test_a_model_that_calls_without_end_is_ended() -> None:
    one = f"<tool_call>{TIME}</tool_call>"
    fleet = t.tool_fleet(t.QWEN, one * (CALLS_MAX + 2), per_chunk=50)
    async with running_gateway(fleet) as g:
        answer = await g.openai.chat.completions.create(model=MODEL, messages=HI, tools=TOOLS)
        assert len(answer.choices[0].message.tool_calls or ()) == CALLS_MAX
        assert fleet.generations[0].cancelled.is_set()


def test_a_reader_says_nothing_behind_the_last_wanted_call() -> None:
    """However much came with it, also at the end."""
    reader = ToolReader(HermesParser(frozenset({"get_weather", "get_time"})), calls_max=1)
    events = reader.push(f"{HERMES} Bye <tool")
    assert [type(event) for event in events] == [CallBegins, Arguments, CallEnds]
    assert reader.ended
    assert reader.finish() == []


async def test_malformed_calls_are_content_and_stop_strings_cut_arguments() -> None:
    """Nothing of what a model said is lost; a stop string counts wherever it stands."""
    odd = '<tool_call>\n{"name": "rm", "arguments": {}}\n</tool_call>'
    fleet = t.tool_fleet(t.QWEN, odd, HERMES)
    async with running_gateway(fleet) as g:
        answer = await g.openai.chat.completions.create(model=MODEL, messages=HI, tools=TOOLS)
        assert answer.choices[0].message.content == odd
        assert answer.choices[0].finish_reason == "stop"
        answer = await g.openai.chat.completions.create(
            model=MODEL, messages=HI, tools=TOOLS, stop="Rhein"
        )
        message = answer.choices[0].message
        assert message.tool_calls is not None
        assert message.tool_calls[0].function.arguments == '{"city": "Köln \\"am '
        assert fleet.generations[1].cancelled.is_set()


async def test_a_response_format_holds_answers_beside_calls() -> None:
    """Calls or the wanted JSON; other forms, and strict schemas nobody can hold, are refused."""
    schema = {"name": "ok", "schema": {"type": "object", "properties": {"ok": {"const": 1}}}}
    wanted: Any = {"type": "json_schema", "json_schema": schema}
    fleet = t.tool_fleet(t.QWEN, '{"ok": 1}', HERMES)
    async with running_gateway(fleet) as g:
        ask = g.openai.chat.completions.create
        answer = await ask(model=MODEL, messages=HI, tools=TOOLS, response_format=wanted)
        assert answer.choices[0].message.content == '{"ok": 1}'
        answer = await ask(model=MODEL, messages=HI, tools=TOOLS, response_format=wanted)
        assert answer.choices[0].finish_reason == "tool_calls"
        assert "| answer" in fleet.jobs[0].sampling.grammar
        with pytest.raises(openai.BadRequestError) as refused:
            await ask(model=MODEL, messages=HI, tools=TOOLS, extra_body={"regex": "a+"})
        assert (refused.value.param, refused.value.code) == ("regex", "unsupported_parameter")
        odd = {"name": "f", "strict": True, "parameters": {"type": "object", "not": {}}}
        with pytest.raises(openai.BadRequestError) as refused:
            await ask(model=MODEL, messages=HI, tools=[{"type": "function", "function": odd}])
        assert refused.value.param == "tools[0].function.parameters"
        assert len(fleet.jobs) == 2


async def test_logprobs_come_for_text_and_calls_alike() -> None:
    """One entry for each token, in streams and whole; those of a call with its deltas."""
    said = f"Well. <tool_call>\n{TIME}\n</tool_call>"
    async with running_gateway(t.tool_fleet(t.QWEN, said, said)) as g:
        ask = g.openai.chat.completions.create
        whole = await ask(model=MODEL, messages=HI, tools=TOOLS, logprobs=True)
        assert whole.choices[0].logprobs is not None
        spoken = [entry.token for entry in whole.choices[0].logprobs.content or ()]
        assert "".join(spoken) == said
        stream = await ask(model=MODEL, messages=HI, tools=TOOLS, logprobs=True, stream=True)
        streamed = [
            entry.token
            async for chunk in stream
            for choice in chunk.choices
            if choice.logprobs is not None
            for entry in choice.logprobs.content or ()
        ]
        assert streamed == spoken


def message(**fields: Any) -> dict[str, Any]:
    return {"role": "user", "content": "x", **fields}


def calling(arguments: str = "{}", **fields: Any) -> dict[str, Any]:
    function = {"name": "f", "arguments": arguments}
    call = {"id": "a", "type": "function", "function": function, **fields}
    return {"role": "assistant", "content": None, "tool_calls": [call]}


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"tools": [*named("a"), {"type": "web_search"}]}, "tools[1].type"),
    ({"tools": [{"type": "custom", "custom": {"name": "x"}}]}, "tools[0].type"),
    ({"tools": [{"type": "function"}]}, "tools[0].function"),
    ({"tools": [{"function": {"name": "x"}}]}, "tools[0].type"),
    ({"tools": named("a b")}, "tools[0].function.name"),
    ({"tools": named("a\n")}, "tools[0].function.name"),
    ({"tools": named("a" * 65)}, "tools[0].function.name"),
    ({"tools": named("a", "b", "a")}, "tools[2].function.name"),
    ({"tools": named(*(f"f{at}" for at in range(129)))}, "tools"),
    (
        {"tools": [{"type": "function", "function": {"name": "a", "description": "x" * 16_385}}]},
        "tools[0].function.description",
    ),
    ({"functions": [{"name": "f"}]}, "functions"),
    ({"function_call": {"name": "f"}}, "function_call"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"tools": named("a"), "tool_choice": "always"}, "tool_choice"),
    ({"tools": named("a"), "tool_choice": {"type": "allowed_tools"}}, "tool_choice.type"),
    ({"tools": named("a"), "tool_choice": {"type": "function"}}, "tool_choice.function"),
    ({"tools": named("a"), "tool_choice": named("b")[0]}, "tool_choice"),
    ({"tools": named("a"), "parallel_tool_calls": "no"}, "parallel_tool_calls"),
    ({"messages": [message(content=None)]}, "messages[0].content"),
    ({"messages": [message(role="tool")]}, "messages[0].tool_call_id"),
    ({"messages": [message(role="tool", tool_call_id="a")]}, "messages[0].tool_call_id"),
    ({"messages": [message(tool_calls=calling()["tool_calls"])]}, "messages[0].tool_calls"),
    ({"messages": [calling("nope")]}, "messages[0].tool_calls[0].function.arguments"),
    ({"messages": [calling("[]")]}, "messages[0].tool_calls[0].function.arguments"),
    ({"messages": [calling('{"a": "\\ud800"}')]}, "messages[0].tool_calls[0].function.arguments"),
    ({"messages": [calling(type="custom")]}, "messages[0].tool_calls[0].type"),
    ({"messages": [calling(id="")]}, "messages[0].tool_calls[0].id"),
    (
        {"messages": [{**calling(), "tool_calls": calling()["tool_calls"] * 2}]},
        "messages[0].tool_calls",
    ),
    ({"messages": [message(role="assistant", function_call={"name": "f"})]},
     "messages[0].function_call"),
]  # fmt: skip
SCHEMAS: list[Any] = [{"type": "string"}, {"properties": {}}, {"type": ["object"]}, []]
WRONG += [
    (
        {"tools": [{"type": "function", "function": {"name": "a", "parameters": schema}}]},
        "tools[0].function.parameters",
    )
    for schema in [*SCHEMAS, {"type": "object", "title": "x" * 65_536}]
]


async def test_what_is_wrong_is_refused_by_the_name_of_its_field() -> None:
    async with running_gateway(t.tool_fleet(t.QWEN)) as g:
        for fields, param in WRONG:
            body = {"model": MODEL, "messages": HI, **fields}
            status, answer = await g.post("/v1/chat/completions", body)
            error: Any = answer["error"]
            assert (status, error["param"]) == (400, param), (fields, answer)
            assert error["message"]
        assert not g.fleet.jobs


async def test_what_is_harmless_is_taken() -> None:
    """Empty lists, nulls, and what a client says of calls without tools of its own."""
    harmless: list[dict[str, Any]] = [
        {"tools": []},
        {"tools": None, "tool_choice": None, "parallel_tool_calls": None},
        {"tool_choice": "none"},
        {"tool_choice": "auto", "parallel_tool_calls": True},
        {"functions": [], "function_call": "auto"},
        {"tools": [{"type": "function", "function": {"name": "a", "parameters": {}}}]},
        {"messages": [*HI, calling(""), message(role="tool", tool_call_id="a", content="ok")]},
        {"messages": [*HI, {**calling(), "content": ""}]},
        {"messages": [message(role="assistant", tool_calls=[])]},
    ]
    async with running_gateway(t.tool_fleet(t.QWEN, *["x"] * len(harmless))) as g:
        for fields in harmless:
            status, answer = await g.post(
                "/v1/chat/completions", {"model": MODEL, "messages": HI, **fields}
            )
            assert status == 200, (fields, answer)
