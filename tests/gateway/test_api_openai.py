"""The unmodified `openai` client against a running gateway: every mode that it promises."""

from __future__ import annotations

import asyncio
import json

import openai
import pytest

from headrace.errors import DependencyError, JobFailedError, OverloadError
from headrace.types import Band, Finish, FinishReason, Job
from headrace_gateway.generation import Chunk
from support.api import MODEL, ScriptedFleet, Step, encode, running_gateway, say, tiny_tokenizer

HI = [{"role": "user", "content": "Hi"}]
EMOJI = "Hello, 😀 naïve wörld"


async def test_chat_answers_whole_with_exact_usage() -> None:
    """The prompt is the rendered template; every generated token counts, the last one too."""
    fleet = ScriptedFleet(script=lambda job: say(EMOJI, cached=16))
    async with running_gateway(fleet) as g:
        answer = await g.openai.chat.completions.create(model=MODEL, messages=HI)
        assert answer.choices[0].message.content == EMOJI
        assert answer.choices[0].finish_reason == "stop"
        assert answer.service_tier == "default"
        prompt = tiny_tokenizer().decode(list(fleet.jobs[0].prompt), skip_special_tokens=False)
        assert prompt == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
        assert answer.usage is not None
        assert answer.usage.prompt_tokens == len(fleet.jobs[0].prompt)
        assert answer.usage.completion_tokens == len(encode(EMOJI)) + 1
        assert answer.usage.total_tokens == (
            answer.usage.prompt_tokens + answer.usage.completion_tokens
        )
        assert answer.usage.prompt_tokens_details is not None
        assert answer.usage.prompt_tokens_details.cached_tokens == 16
        await g.settled()


@pytest.mark.parametrize("per_chunk", [1, 3, 100])
async def test_chat_streams_the_same_text(per_chunk: int) -> None:
    """However the fleet cuts its deliveries; the usage comes last when it is asked for."""
    fleet = ScriptedFleet(script=lambda job: say(EMOJI, per_chunk=per_chunk))
    async with running_gateway(fleet) as g:
        stream = await g.openai.chat.completions.create(
            model=MODEL, messages=HI, stream=True, stream_options={"include_usage": True}
        )
        chunks = [chunk async for chunk in stream]
        texts = [c.choices[0].delta.content or "" for c in chunks[:-1]]
        assert "".join(texts) == EMOJI
        assert not any("\ufffd" in text for text in texts)
        assert chunks[0].choices[0].delta.role == "assistant"
        assert chunks[-2].choices[0].finish_reason == "stop"
        assert all(chunk.usage is None for chunk in chunks[:-1])
        assert chunks[-1].choices == []
        assert chunks[-1].usage is not None
        assert chunks[-1].usage.completion_tokens == len(encode(EMOJI)) + 1
        assert len({chunk.id for chunk in chunks}) == 1
        await g.settled()


async def test_choices_are_jobs_with_seeds_of_their_own() -> None:
    """n=3: three jobs, seeds in a row, the prompt counted once, cached where no choice computed."""

    def script(job: Job) -> list[Step]:
        index = int(job.id.rpartition("-")[2])
        return say(f"choice {index}", cached=0 if index == 1 else 16)

    async with running_gateway(ScriptedFleet(script=script)) as g:
        answer = await g.openai.chat.completions.create(
            model=MODEL, messages=HI, n=3, seed=2**63 - 2, temperature=0.5, top_p=0.9
        )
        assert [c.message.content for c in answer.choices] == [f"choice {i}" for i in range(3)]
        assert [job.id for job in g.fleet.jobs] == [f"{answer.id}-{i}" for i in range(3)]
        seeds = [job.sampling.seed for job in g.fleet.jobs]
        assert seeds == [2**63 - 2, 2**63 - 1, -(2**63)]
        assert {(job.sampling.temperature, job.sampling.top_p) for job in g.fleet.jobs} == {
            (0.5, 0.9)
        }
        assert answer.usage is not None
        assert answer.usage.prompt_tokens == len(g.fleet.jobs[0].prompt)
        assert answer.usage.completion_tokens == sum(
            len(encode(f"choice {i}")) + 1 for i in range(3)
        )
        assert answer.usage.prompt_tokens_details is not None
        assert answer.usage.prompt_tokens_details.cached_tokens == 0
        stream = await g.openai.chat.completions.create(model=MODEL, messages=HI, n=3, stream=True)
        texts = ["", "", ""]
        async for chunk in stream:
            for choice in chunk.choices:
                texts[choice.index] += choice.delta.content or ""
        assert texts == [f"choice {i}" for i in range(3)]


async def test_a_stop_string_across_tokens_ends_text_count_and_generation() -> None:
    """The text ends before it, the count with the token that completed it, the job at once."""
    never = asyncio.Event()
    before, stop = "one two", "STOP"
    spelled = [Chunk((token,), None) for token in encode(before) + encode(stop) + encode(" more")]

    async with running_gateway(ScriptedFleet(script=lambda job: [*spelled, never])) as g:
        for stream in (False, True):
            options = {"model": MODEL, "messages": HI, "stop": ["unseen", stop]}
            if stream:
                text, usage = "", None
                async for chunk in await g.openai.chat.completions.create(
                    **options, stream=True, stream_options={"include_usage": True}
                ):
                    text += (chunk.choices[0].delta.content or "") if chunk.choices else ""
                    usage = chunk.usage
            else:
                answer = await g.openai.chat.completions.create(**options)
                text, usage = answer.choices[0].message.content, answer.usage
                assert answer.choices[0].finish_reason == "stop"
            assert text == before
            assert usage is not None
            assert usage.completion_tokens == len(encode(before) + encode(stop))
            assert g.fleet.generations[-1].cancelled.is_set()
        await g.settled()


async def test_completions_take_texts_and_token_ids() -> None:
    """Four forms of prompt; OpenAI's default of 16 tokens; choices numbered prompt by prompt."""

    def script(job: Job) -> list[Step]:
        return say("x" * 3, reason=FinishReason.LENGTH)

    async with running_gateway(ScriptedFleet(script=script)) as g:
        for prompt, jobs in (
            ("hello", [encode("hello")]),
            (["hello", "world"], [encode("hello"), encode("world")]),
            ([5, 6, 7], [[5, 6, 7]]),
            ([[5, 6], [7]], [[5, 6], [7]]),
        ):
            g.fleet.generations.clear()
            answer = await g.openai.completions.create(model=MODEL, prompt=prompt)
            assert [list(job.prompt) for job in g.fleet.jobs] == jobs
            assert [choice.index for choice in answer.choices] == list(range(len(jobs)))
            assert {choice.text for choice in answer.choices} == {"xxx"}
            assert {choice.finish_reason for choice in answer.choices} == {"length"}
            assert {job.sampling.max_tokens for job in g.fleet.jobs} == {16}
            assert answer.usage is not None
            assert answer.usage.prompt_tokens == sum(map(len, jobs))
        stream = await g.openai.completions.create(
            model=MODEL, prompt=["a", "b"], n=2, stream=True, max_tokens=3
        )
        texts = ["", "", "", ""]
        async for chunk in stream:
            texts[chunk.choices[0].index] += chunk.choices[0].text
        assert texts == ["xxx"] * 4


async def test_responses_answer_whole() -> None:
    """Instructions become the system message; message items and parts become the chat."""
    async with running_gateway(ScriptedFleet(script=lambda job: say("Fine.", cached=4))) as g:
        response = await g.openai.responses.create(
            model=MODEL,
            instructions="Be brief.",
            input=[
                {"role": "user", "content": [{"type": "input_text", "text": "How are you?"}]},
                {"type": "message", "role": "assistant", "content": "And you?"},
                {"role": "developer", "content": "Answer."},
            ],
            max_output_tokens=50,
            metadata={"a": "b"},
            service_tier="priority",
            reasoning={"effort": None},
            text={"format": {"type": "text"}},
            store=True,
        )
        assert response.output_text == "Fine."
        assert response.status == "completed"
        assert response.service_tier == "priority"
        assert response.metadata == {"a": "b"}
        assert response.usage is not None
        assert response.usage.input_tokens_details.cached_tokens == 4
        assert response.usage.output_tokens == len(encode("Fine.")) + 1
        assert response.usage.output_tokens_details.reasoning_tokens == 0
        job = g.fleet.jobs[0]
        assert job.band is Band.INTERACTIVE
        assert job.sampling.max_tokens == 50
        prompt = tiny_tokenizer().decode(list(job.prompt), skip_special_tokens=False)
        assert prompt == (
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHow are you?<|im_end|>\n"
            "<|im_start|>assistant\nAnd you?<|im_end|>\n<|im_start|>system\nAnswer.<|im_end|>\n"
            "<|im_start|>assistant\n"
        )


@pytest.mark.parametrize(
    ("reason", "last"),
    [
        (FinishReason.STOP, "response.completed"),
        (FinishReason.LENGTH, "response.incomplete"),
    ],
)
async def test_responses_stream_the_documented_sequence(reason: FinishReason, last: str) -> None:
    async with running_gateway(ScriptedFleet(script=lambda job: say(EMOJI, reason=reason))) as g:
        stream = await g.openai.responses.create(model=MODEL, input="Hi", stream=True)
        events = [event async for event in stream]
        types = [event.type for event in events]
        deltas = types.count("response.output_text.delta")
        assert deltas > 3
        assert types == [
            "response.created",
            "response.in_progress",
            "response.output_item.added",
            "response.content_part.added",
            *["response.output_text.delta"] * deltas,
            "response.output_text.done",
            "response.content_part.done",
            "response.output_item.done",
            last,
        ]
        assert [event.sequence_number for event in events] == list(range(len(events)))
        assert "".join(e.delta for e in events if e.type == "response.output_text.delta") == EMOJI
        final = events[-1].response
        assert final.output_text == EMOJI
        assert final.usage.output_tokens == len(encode(EMOJI)) + (reason is FinishReason.STOP)
        if reason is FinishReason.LENGTH:
            assert final.incomplete_details.reason == "max_output_tokens"


async def test_the_clients_own_stream_helpers_understand_us() -> None:
    """`responses.stream` and `chat.completions.stream` accumulate and check what they get."""
    async with running_gateway() as g:
        async with g.openai.responses.stream(model=MODEL, input="Hi") as stream:
            final = await stream.get_final_response()
        assert final.output_text == "Hello, world!"
        async with g.openai.chat.completions.stream(model=MODEL, messages=HI) as chat:
            completion = await chat.get_final_completion()
        assert completion.choices[0].message.content == "Hello, world!"


async def test_models_are_listed() -> None:
    async with running_gateway() as g:
        assert [model.id async for model in g.openai.models.list()] == [MODEL]
        assert (await g.openai.models.retrieve(MODEL)).owned_by == "headrace"
        with pytest.raises(openai.NotFoundError) as caught:
            await g.openai.models.retrieve("some/other")
        assert caught.value.code == "model_not_found"


async def test_a_failure_before_acceptance_is_a_status() -> None:
    """Queue full: 429 with the computed wait; no worker: 503."""
    async with running_gateway() as g:
        g.fleet.refusal = OverloadError("full", retry_after_ms=1_234)
        with pytest.raises(openai.RateLimitError) as full:
            await g.openai.chat.completions.create(model=MODEL, messages=HI, stream=True)
        assert full.value.response.headers["retry-after-ms"] == "1234"
        assert full.value.response.headers["retry-after"] == "2"
        assert full.value.code == "queue_full"
        g.fleet.refusal = DependencyError("nobody", code="no_worker")
        with pytest.raises(openai.InternalServerError) as away:
            await g.openai.responses.create(model=MODEL, input="Hi")
        assert away.value.status_code == 503
        await g.settled()


async def test_when_one_job_of_several_is_refused_the_others_are_cancelled() -> None:
    async with running_gateway() as g:

        def refuse_the_next(job: Job) -> list[Step]:
            g.fleet.refusal = OverloadError("full")
            return [asyncio.Event()]

        g.fleet.script = refuse_the_next
        with pytest.raises(openai.RateLimitError):
            await g.openai.chat.completions.create(model=MODEL, messages=HI, n=2)
        assert g.fleet.generations[0].cancelled.is_set()
        await g.settled()


@pytest.mark.parametrize("n", [1, 2])
async def test_a_failure_in_the_stream_is_an_event_in_it(n: int) -> None:
    """After the headers only the stream can say it; the other choice is cancelled."""

    def script(job: Job) -> list[Step]:
        if job.id.endswith("-1"):
            return [asyncio.Event()]
        return [*say("some text")[:2], JobFailedError("the worker's memory is full")]

    async with running_gateway(ScriptedFleet(script=script)) as g:
        stream = await g.openai.chat.completions.create(model=MODEL, messages=HI, n=n, stream=True)
        with pytest.raises(openai.APIError, match="memory is full") as caught:
            async for _ in stream:
                pass
        assert caught.value.code == "generation_failed"
        with pytest.raises(openai.InternalServerError, match="memory is full"):
            await g.openai.chat.completions.create(model=MODEL, messages=HI, n=n)
        stream = await g.openai.responses.create(model=MODEL, input="Hi", stream=True)
        events = [event async for event in stream]
        assert events[-1].type == "response.failed"
        assert events[-1].response.error is not None
        assert events[-1].response.error.message == "the worker's memory is full"
        await g.settled()
        assert all(gen.cancelled.is_set() for gen in g.fleet.generations)


async def test_a_job_cancelled_by_somebody_else_is_no_success() -> None:
    ended = [Chunk((), Finish(FinishReason.CANCELLED))]
    async with running_gateway(ScriptedFleet(script=lambda job: list(ended))) as g:
        with pytest.raises(openai.InternalServerError) as caught:
            await g.openai.chat.completions.create(model=MODEL, messages=HI)
        assert caught.value.code == "cancelled"


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_goes_away_cancels_its_jobs_at_once(stream: bool) -> None:
    """Streaming or not: the connection's end is the handler's end is the generation's end."""
    never = asyncio.Event()
    async with running_gateway(ScriptedFleet(script=lambda job: [*say("a b c")[:1], never])) as g:
        body = {"model": MODEL, "messages": HI, "stream": stream, "n": 2}

        async def call() -> None:
            async with g.http.post("/v1/chat/completions", json=body) as response:
                await response.read()

        task = asyncio.create_task(call())
        await g.fleet.submitted.wait()
        await asyncio.wait_for(g.fleet.generations[0].waiting.wait(), 5)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        for generation in g.fleet.generations:
            await asyncio.wait_for(generation.cancelled.wait(), 5)
        await g.settled()


async def test_a_client_that_does_not_read_is_gone_after_a_named_time() -> None:
    """Its unsent text is bounded by the socket's buffers, and its job ends."""
    token = Chunk((encode("x")[0],), None)
    fleet = ScriptedFleet(script=lambda job: [*[token] * 60_000, asyncio.Event()])
    async with running_gateway(fleet, write_ms=200) as g:
        host, port = g.url.removeprefix("http://").split(":")
        body = json.dumps({"model": MODEL, "messages": HI, "stream": True}).encode()
        reader, writer = await asyncio.open_connection(host, int(port), limit=1_024)
        writer.write(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            b"Content-Length: %d\r\n\r\n" % len(body) + body
        )
        await fleet.submitted.wait()
        await asyncio.wait_for(fleet.generations[0].cancelled.wait(), 20)
        assert not fleet.generations[0].waiting.is_set(), "the text did not all fit into buffers"
        await g.settled()
        writer.close()
        reader.feed_eof()


async def test_a_quiet_stream_is_kept_alive_by_comments() -> None:
    """A proxy sees bytes while the job waits; clients ignore them."""
    gate = asyncio.Event()
    async with running_gateway(
        ScriptedFleet(script=lambda job: [gate, *say("done")]), keepalive_ms=10
    ) as g:
        body = {"model": MODEL, "messages": HI, "stream": True}
        async with g.http.post("/v1/chat/completions", json=body) as response:
            lines = [await response.content.readline() for _ in range(2)]  # the role's chunk
            lines += [await response.content.readline() for _ in range(4)]
            assert lines[2:] == [b": keep-alive\n", b"\n"] * 2
            gate.set()
            rest = await response.read()
        assert b'"finish_reason":"stop"' in rest
        assert rest.endswith(b"data: [DONE]\n\n")
