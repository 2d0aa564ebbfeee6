"""The unmodified `openai` client against the whole stack and the real model."""

from __future__ import annotations

import openai
import pytest

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
