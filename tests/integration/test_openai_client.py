"""The unmodified `openai` client against the whole stack and the real model."""

from __future__ import annotations

import json
from typing import Any, Literal

import openai
import pytest
from pydantic import BaseModel

from support.stack import Stack

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
ANSWER = "The capital of France is Paris."


async def test_chat(client: openai.AsyncOpenAI) -> None:
    answer = await client.chat.completions.create(
        model="smollm2", messages=QUESTION, temperature=0, max_completion_tokens=40
    )
    assert answer.choices[0].message.content == ANSWER
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (37, 8)


async def test_chat_streamed(client: openai.AsyncOpenAI) -> None:
    stream = await client.chat.completions.create(
        model="smollm2",
        messages=QUESTION,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    text, usage, reasons = "", None, []
    async for chunk in stream:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            text += choice.delta.content or ""
            reasons += [choice.finish_reason] if choice.finish_reason else []
    assert (text, reasons) == (ANSWER, ["stop"])
    assert usage is not None
    assert usage.total_tokens == 45


async def test_several_choices_differ_by_seed_and_repeat_by_seed(
    client: openai.AsyncOpenAI,
) -> None:
    async def ask() -> list[str | None]:
        answer = await client.chat.completions.create(
            model="smollm2",
            messages=[{"role": "user", "content": "Invent a name for a cat."}],
            n=3,
            seed=11,
            temperature=1.2,
            max_tokens=24,
        )
        return [choice.message.content for choice in answer.choices]

    first = await ask()
    assert len(set(first)) == 3
    assert await ask() == first


async def test_chat_with_logprobs(client: openai.AsyncOpenAI) -> None:
    """Greedy: each token is the most probable one; the tokens' bytes are the text."""
    options: dict[str, Any] = {
        "model": "smollm2", "messages": QUESTION, "temperature": 0,
        "logprobs": True, "top_logprobs": 3,
    }  # fmt: skip
    answer = await client.chat.completions.create(**options)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    entries = logprobs.content or []
    assert b"".join(bytes(entry.bytes or []) for entry in entries).decode() == ANSWER
    for entry in entries:
        assert [top.logprob for top in entry.top_logprobs] == sorted(
            (top.logprob for top in entry.top_logprobs), reverse=True
        )
        assert (entry.token, entry.logprob) == (
            entry.top_logprobs[0].token,
            entry.top_logprobs[0].logprob,
        )
        assert entry.logprob <= 0
    streamed = []
    async for chunk in await client.chat.completions.create(**options, stream=True):
        for choice in chunk.choices:
            streamed += (choice.logprobs.content or []) if choice.logprobs else []
    assert [entry.token for entry in streamed] == [entry.token for entry in entries]
    assert [entry.logprob for entry in streamed] == pytest.approx(
        [entry.logprob for entry in entries], abs=1e-3
    )


async def test_echo_scores_a_text_as_it_was_scored_when_it_was_said(
    client: openai.AsyncOpenAI,
) -> None:
    """What evaluation harnesses ask for; the logprobs of saying and of reading agree."""
    prompt = "The capital of Italy is"
    said = await client.completions.create(
        model="smollm2", prompt=prompt, max_tokens=8, temperature=0, logprobs=1
    )
    said_logprobs = said.choices[0].logprobs
    assert said_logprobs is not None
    assert said_logprobs.token_logprobs is not None
    for asked in (0, 1):
        read = await client.completions.create(
            model="smollm2", prompt=prompt + said.choices[0].text, max_tokens=asked, echo=True,
            temperature=0, logprobs=1,
        )  # fmt: skip
        assert read.choices[0].text.startswith(prompt + said.choices[0].text)
        assert read.usage is not None
        assert read.usage.completion_tokens == asked
        logprobs = read.choices[0].logprobs
        assert logprobs is not None
        assert logprobs.token_logprobs is not None
        assert logprobs.token_logprobs[0] is None
        scored = logprobs.token_logprobs[: len(logprobs.token_logprobs) - asked]
        assert scored[-8:] == pytest.approx(said_logprobs.token_logprobs, abs=1e-3)


async def test_the_best_of_several(client: openai.AsyncOpenAI) -> None:
    """`best_of` tells the one whose mean logprob is the highest among the same seeds' choices."""
    options: dict[str, Any] = {
        "model": "smollm2", "prompt": "My favourite animal is", "seed": 5, "temperature": 1.0,
        "max_tokens": 8,
    }  # fmt: skip
    every = await client.completions.create(**options, n=3, logprobs=0)
    means = {}
    for choice in every.choices:
        assert choice.logprobs is not None
        values = choice.logprobs.token_logprobs or []
        means[choice.text] = sum(values) / len(values)
    best = await client.completions.create(**options, best_of=3)
    assert best.choices[0].text == max(means, key=lambda text: means[text])
    assert best.usage is not None
    assert every.usage is not None
    assert best.usage.completion_tokens == every.usage.completion_tokens


async def test_biases_and_bad_words_change_what_is_said(client: openai.AsyncOpenAI) -> None:
    options: dict[str, Any] = {
        "model": "smollm2", "prompt": "The capital of France is", "temperature": 0, "max_tokens": 4,
    }  # fmt: skip
    plain = await client.completions.create(**options)
    assert "Paris" in plain.choices[0].text
    banned = await client.completions.create(**options, extra_body={"bad_words": ["Paris"]})
    assert "Paris" not in banned.choices[0].text
    forced = await client.completions.create(**options, logit_bias={"500": 100}, logprobs=0)
    assert forced.choices[0].logprobs is not None
    [said] = set(forced.choices[0].logprobs.tokens or [])
    assert forced.choices[0].text == said * 4


class Capital(BaseModel):
    city: Literal["Paris", "Rome", "Berlin"]
    country: Literal["France", "Italy", "Germany"]
    old: bool


async def test_the_parse_helpers_of_chat(client: openai.AsyncOpenAI) -> None:
    """`chat.completions.parse` and its streaming variant, unmodified, with a pydantic model."""
    options: dict[str, Any] = {
        "model": "smollm2", "messages": QUESTION, "temperature": 0, "response_format": Capital,
    }  # fmt: skip
    parsed = await client.chat.completions.parse(**options)
    assert isinstance(parsed.choices[0].message.parsed, Capital)
    assert parsed.choices[0].finish_reason == "stop"
    async with client.chat.completions.stream(**options) as stream:
        final = await stream.get_final_completion()
    assert final.choices[0].message.parsed == parsed.choices[0].message.parsed


async def test_the_parse_helpers_of_responses(client: openai.AsyncOpenAI) -> None:
    options: dict[str, Any] = {
        "model": "smollm2", "input": QUESTION[0]["content"], "temperature": 0,
        "text_format": Capital,
    }  # fmt: skip
    parsed = await client.responses.parse(**options)
    assert isinstance(parsed.output_parsed, Capital)
    async with client.responses.stream(**options) as stream:
        final = await stream.get_final_response()
    assert final.output_parsed == parsed.output_parsed


@pytest.mark.parametrize(
    ("form", "fits"),
    [
        ({"choice": ["yes, often", "no"]}, lambda text: text in ("yes, often", "no")),
        ({"regex": "[0-9]{4}-[0-9]{2}"}, lambda text: len(text) == 7 and text[4] == "-"),
        ({"grammar": 'start: "<" /[a-z]{3}/ ">"'}, lambda text: text[0] + text[4:] == "<>"),
        (
            {"structured_outputs": {"json": Capital.model_json_schema()}},
            Capital.model_validate_json,
        ),
    ],
)
async def test_other_forms(client: openai.AsyncOpenAI, form: dict[str, Any], fits: Any) -> None:
    """The open servers' fields, sampled at a temperature where anything else would come."""
    for seed in (1, 2):
        answer = await client.chat.completions.create(
            model="smollm2", messages=QUESTION, temperature=2, seed=seed, extra_body=form
        )
        assert answer.choices[0].finish_reason == "stop"
        assert fits(answer.choices[0].message.content)


async def test_an_object_that_is_cut_says_length(client: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.LengthFinishReasonError) as caught:
        await client.chat.completions.parse(
            model="smollm2", messages=QUESTION, temperature=0, max_tokens=4,
            response_format=Capital,
        )  # fmt: skip
    text = caught.value.completion.choices[0].message.content
    assert text is not None
    assert text.startswith("{")
    with pytest.raises(json.JSONDecodeError):
        json.loads(text)


async def test_a_hopeless_schema_fails_its_own_request(client: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        await client.chat.completions.create(
            model="smollm2", messages=QUESTION,
            response_format={
                "type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "wizard"}},
            },
        )  # fmt: skip
    assert caught.value.param == "response_format"
    answer = await client.chat.completions.create(
        model="smollm2", messages=QUESTION, temperature=0, max_tokens=40
    )
    assert answer.choices[0].message.content == ANSWER


async def test_completions(client: openai.AsyncOpenAI) -> None:
    answer = await client.completions.create(
        model="smollm2", prompt=["The capital of Italy is", "Two plus two is"], max_tokens=6,
        temperature=0,
    )  # fmt: skip
    assert "Rome" in answer.choices[0].text
    assert [choice.index for choice in answer.choices] == [0, 1]
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 12


async def test_completions_streamed(client: openai.AsyncOpenAI) -> None:
    stream = await client.completions.create(
        model="smollm2", prompt="The capital of Italy is", max_tokens=6, temperature=0, stream=True
    )
    text = "".join([chunk.choices[0].text async for chunk in stream])
    assert "Rome" in text


async def test_responses(client: openai.AsyncOpenAI) -> None:
    answer = await client.responses.create(
        model="smollm2", input=QUESTION[0]["content"], temperature=0
    )
    assert answer.output_text == ANSWER
    assert answer.status == "completed"
    assert answer.usage is not None
    assert answer.usage.output_tokens == 8


async def test_responses_streamed(client: openai.AsyncOpenAI) -> None:
    stream = await client.responses.create(
        model="smollm2", input=QUESTION[0]["content"], temperature=0, stream=True
    )
    events = [event async for event in stream]
    assert [e.sequence_number for e in events] == list(range(len(events)))
    assert events[0].type == "response.created"
    assert events[-1].type == "response.completed"
    deltas = [e.delta for e in events if e.type == "response.output_text.delta"]
    assert "".join(deltas) == ANSWER
    assert len(deltas) > 2


async def test_responses_over_a_websocket(client: openai.AsyncOpenAI) -> None:
    """Two turns on one connection, each with the documented sequence of events."""
    async with client.responses.connect() as connection:
        for _ in range(2):
            await connection.response.create(
                model="smollm2", input=QUESTION[0]["content"], temperature=0
            )
            kinds, text = [], ""
            async for event in connection:
                kinds.append(event.type)
                if event.type == "response.output_text.delta":
                    text += event.delta
                if event.type in ("response.completed", "response.failed", "error"):
                    break
            assert text == ANSWER
            assert kinds[:4] == [
                "response.created",
                "response.in_progress",
                "response.output_item.added",
                "response.content_part.added",
            ]
            assert kinds[-4:] == [
                "response.output_text.done",
                "response.content_part.done",
                "response.output_item.done",
                "response.completed",
            ]


async def test_models(client: openai.AsyncOpenAI) -> None:
    assert [model.id async for model in client.models.list()] == ["smollm2"]


async def test_errors_are_the_clients_own_kinds(client: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        await client.chat.completions.create(model="nope", messages=QUESTION)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as too_long:
        await client.completions.create(model="smollm2", prompt=[1] * 9_000)
    assert too_long.value.code == "context_length_exceeded"
    assert "9000" in too_long.value.message
    assert "8192" in too_long.value.message


async def test_a_stop_string_ends_the_stream_and_the_job(
    client: openai.AsyncOpenAI, stack: Stack
) -> None:
    stream = await client.chat.completions.create(
        model="smollm2",
        messages=[{"role": "user", "content": "Count from one to fifty in words."}],
        temperature=0,
        stop=["three"],
        max_tokens=400,
        stream=True,
    )
    text = "".join([c.choices[0].delta.content or "" async for c in stream if c.choices])
    assert "three" not in text.lower()
    await stack.wait_idle()


async def test_usage_is_whole_when_a_stop_string_ends_it(client: openai.AsyncOpenAI) -> None:
    """The job is cancelled before its finish arrives; what came from the cache is known anyway."""
    for expected in (0, 32):
        answer = await client.completions.create(
            model="smollm2", prompt=[*range(3_000, 3_040)], max_tokens=200, temperature=0,
            stop=["e", "a", " ", "\n"], extra_body={"ignore_eos": True},
        )  # fmt: skip
        assert answer.choices[0].finish_reason == "stop"
        assert answer.usage is not None
        assert answer.usage.completion_tokens < 200
        assert answer.usage.prompt_tokens_details is not None
        assert answer.usage.prompt_tokens_details.cached_tokens == expected


async def test_a_client_that_leaves_takes_its_job_with_it(
    client: openai.AsyncOpenAI, stack: Stack
) -> None:
    stream = await client.completions.create(
        model="smollm2", prompt="Once upon a time", max_tokens=4_000, stream=True,
        extra_body={"ignore_eos": True},
    )  # fmt: skip
    await anext(aiter(stream))
    await stream.close()
    await stack.wait_idle(limit_s=10)
