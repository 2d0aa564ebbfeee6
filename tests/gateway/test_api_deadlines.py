"""A deadline is an end of its own: an error without tokens, a short answer with some."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from headrace import telemetry
from headrace.types import Finish, FinishReason, Job
from headrace_gateway.generation import Chunk
from support.api import MODEL, ScriptedFleet, Step, encode, queued, running_gateway, say

CHAT = "/v1/chat/completions"
HI = [{"role": "user", "content": "Hi"}]
REASON = "the deadline passed while the job waited for a worker (1200 ms, band standard)"
TERMINAL = ("response.completed", "response.incomplete", "response.failed", "error")


def too_late(reason: str = REASON) -> list[Step]:
    """It expired in the queue, as the dispatcher ends it."""
    return [queued(2), Chunk((), Finish(FinishReason.DEADLINE, reason))]


def cut(text: str) -> list[Step]:
    """It expired after `text`."""
    return say(text, reason=FinishReason.DEADLINE)


async def socket_turn(socket: Any) -> list[dict[str, Any]]:
    await socket.send_json({"type": "response.create", "model": MODEL, "input": "Hi"})
    events: list[dict[str, Any]] = []
    while not events or events[-1]["type"] not in TERMINAL:
        events.append(await socket.receive_json(timeout=10))
    return events


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHAT, {"messages": HI}),
        (CHAT, {"messages": HI, "n": 2}),
        ("/v1/completions", {"prompt": "Hi"}),
        ("/v1/responses", {"input": "Hi"}),
    ],
)
async def test_without_a_token_it_is_an_error_that_nobody_repeats(
    path: str, body: dict[str, Any]
) -> None:
    """504, a code of its own, the dispatcher's reason, and the word that stops clients' retries."""
    async with running_gateway(ScriptedFleet(script=lambda job: too_late())) as g:
        async with g.http.post(path, json={"model": MODEL, **body}) as response:
            assert response.status == 504
            assert response.headers["x-should-retry"] == "false"
            assert (await response.json())["error"] == {
                "message": REASON,
                "type": "server_error",
                "param": None,
                "code": "deadline_exceeded",
            }
        await g.settled()


async def test_the_openai_client_does_not_retry_it() -> None:
    """One job, though the client is willing to send a 504 five times more."""
    async with running_gateway(ScriptedFleet(script=lambda job: too_late(""))) as g:
        patient = g.openai.with_options(max_retries=5)
        with pytest.raises(openai.InternalServerError, match="before the first token") as caught:
            await patient.chat.completions.create(model=MODEL, messages=HI)
        assert caught.value.code == "deadline_exceeded"
        assert len(g.fleet.jobs) == 1


async def test_without_a_token_a_stream_ends_in_an_error_event() -> None:
    async with running_gateway(ScriptedFleet(script=lambda job: too_late())) as g:
        chat = await g.openai.chat.completions.create(model=MODEL, messages=HI, stream=True)
        with pytest.raises(openai.APIError, match="waited for a worker") as caught:
            async for chunk in chat:
                assert not chunk.choices[0].finish_reason
        assert caught.value.code == "deadline_exceeded"
        stream = await g.openai.responses.create(model=MODEL, input="Hi", stream=True)
        events = [event async for event in stream]
        assert [event.type for event in events] == [
            "response.created",
            "response.queued",
            "response.failed",
        ]
        assert events[-1].response.error is not None
        assert events[-1].response.error.code == "deadline_exceeded"
        assert events[-1].response.error.message == REASON
        async with g.http.ws_connect("/v1/responses") as socket:
            for _ in range(2):  # the connection lives on
                last = (await socket_turn(socket))[-1]
                assert last["type"] == "response.failed"
                assert last["response"]["error"] == {"code": "deadline_exceeded", "message": REASON}
        await g.settled()


async def test_with_tokens_a_chat_and_a_completion_are_short_answers() -> None:
    """All that was said by then, with its usage; also where text was held back for a stop."""
    async with running_gateway(ScriptedFleet(script=lambda job: cut("Well, th"))) as g:
        tokens = len(encode("Well, th"))
        for stop in (None, ["the end"]):
            answer = await g.openai.chat.completions.create(model=MODEL, messages=HI, stop=stop)
            assert answer.choices[0].finish_reason == "deadline"
            assert answer.choices[0].message.content == "Well, th"
            assert answer.usage is not None
            assert answer.usage.completion_tokens == tokens
        stream = await g.openai.chat.completions.create(
            model=MODEL, messages=HI, stream=True, stream_options={"include_usage": True}
        )
        chunks = [chunk async for chunk in stream]
        assert chunks[-2].choices[0].finish_reason == "deadline"
        assert chunks[-1].usage is not None
        assert chunks[-1].usage.completion_tokens == tokens
        completion = await g.openai.completions.create(model=MODEL, prompt="Hi")
        assert (completion.choices[0].finish_reason, completion.choices[0].text) == (
            "deadline",
            "Well, th",
        )
        async with g.openai.chat.completions.stream(model=MODEL, messages=HI) as helper:
            final = await helper.get_final_completion()
        assert final.choices[0].message.content == "Well, th"
        await g.settled()


async def test_with_tokens_a_response_is_incomplete() -> None:
    """Whole, streamed, through the client's helper and over a socket: the same object."""
    async with running_gateway(ScriptedFleet(script=lambda job: cut("Well"))) as g:
        whole = await g.openai.responses.create(model=MODEL, input="Hi")
        stream = await g.openai.responses.create(model=MODEL, input="Hi", stream=True)
        events = [event async for event in stream]
        assert events[-1].type == "response.incomplete"
        for response in (whole, events[-1].response):
            assert response.status == "incomplete"
            assert response.incomplete_details is not None
            assert response.incomplete_details.reason == "deadline"
            assert response.output_text == "Well"
            assert response.output[0].status == "incomplete"  # type: ignore[union-attr]
            assert response.usage is not None
            assert response.usage.output_tokens == len(encode("Well"))
        async with g.openai.responses.stream(model=MODEL, input="Hi") as helper:
            kinds = [event.type async for event in helper]
        assert kinds[-1] == "response.incomplete"
        async with g.http.ws_connect("/v1/responses") as socket:
            last = (await socket_turn(socket))[-1]
        assert last["type"] == "response.incomplete"
        assert last["response"]["incomplete_details"] == {"reason": "deadline"}
        await g.settled()


@pytest.mark.parametrize("stream", [False, True])
async def test_a_choice_that_came_too_late_does_not_take_the_others_away(stream: bool) -> None:
    """Beside a choice with text it is an empty one, told last."""

    def script(job: Job) -> list[Step]:
        return too_late() if job.id.endswith("-0") else say("Fine.")

    async with running_gateway(ScriptedFleet(script=script)) as g:
        ends: dict[int, str | None] = {}
        texts = ["", ""]
        if stream:
            async for chunk in await g.openai.chat.completions.create(
                model=MODEL, messages=HI, n=2, stream=True
            ):
                choice = chunk.choices[0]
                texts[choice.index] += choice.delta.content or ""
                if choice.finish_reason:
                    ends[choice.index] = choice.finish_reason
        else:
            answer = await g.openai.chat.completions.create(model=MODEL, messages=HI, n=2)
            for each in answer.choices:
                texts[each.index], ends[each.index] = each.message.content or "", each.finish_reason
        assert texts == ["", "Fine."]
        assert ends == {0: "deadline", 1: "stop"}
        await g.settled()


async def test_the_best_of_several_is_none_that_came_too_late() -> None:
    """It has no token, so its mean logprob of nothing does not win."""

    def script(job: Job) -> list[Step]:
        return too_late() if job.id.endswith("-0") else say("Fine.")

    async with running_gateway(ScriptedFleet(script=script)) as g:
        answer = await g.openai.completions.create(model=MODEL, prompt="Hi", best_of=2)
        assert [choice.text for choice in answer.choices] == ["Fine."]


async def test_a_stop_string_that_was_complete_in_time_is_a_stop() -> None:
    async with running_gateway(ScriptedFleet(script=lambda job: cut("one STOP"))) as g:
        answer = await g.openai.chat.completions.create(model=MODEL, messages=HI, stop="STOP")
        assert answer.choices[0].finish_reason == "stop"
        assert answer.choices[0].message.content == "one "


@pytest.fixture
def spans(monkeypatch: pytest.MonkeyPatch) -> Iterator[InMemorySpanExporter]:
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(telemetry, "_provider", provider)
    yield exporter
    provider.shutdown()


async def test_operators_see_where_deadlines_end_turns(spans: InMemorySpanExporter) -> None:
    """One count for each job by stage, an outcome on each span, the status of a stream's end."""
    fleet = ScriptedFleet(script=lambda job: too_late())
    async with running_gateway(fleet) as g:
        body = {"model": MODEL, "messages": HI, "service_tier": "priority"}
        await g.post(CHAT, body | {"n": 2})
        async with g.http.post(CHAT, json=body | {"stream": True}) as response:
            error = (await response.text()).split("\n\n")[-3]
            assert json.loads(error.removeprefix("data: "))["error"]["code"] == "deadline_exceeded"
        fleet.script = lambda job: cut("Well")
        await g.post(CHAT, body)
        await g.settled()
        told = [dict(span.attributes or {}) for span in spans.get_finished_spans()]
        assert [each.get("headrace.deadline") for each in told] == [
            "expired_waiting",
            "expired_waiting",
            "expired_decoding",
        ]
        assert [each["http.response.status_code"] for each in told] == [504, 504, 200]
        assert [each.get("error.type") for each in told] == [
            "deadline_exceeded",
            "deadline_exceeded",
            None,
        ]
        assert told[2]["gen_ai.response.finish_reasons"] == ("deadline",)
        text = g.gateway.metrics.render().decode()
        name = "headrace_gateway_deadline_ends_total"
        for stage, jobs in (("waiting", 3), ("decoding", 1)):
            labels = f'band="interactive",model="{MODEL}",stage="{stage}"'
            assert f"{name}{{{labels}}} {jobs}.0" in text
