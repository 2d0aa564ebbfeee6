"""One request is one trace, over every hop, with what a person needs to understand it."""

from __future__ import annotations

import json
import urllib.request

import openai

from support.fleet import eventually
from support.otlp import OtlpReceiver
from support.stack import Stack

SERVER, CLIENT, PRODUCER, CONSUMER = 2, 3, 4, 5


async def test_the_tree_of_one_request(
    client: openai.AsyncOpenAI, stack: Stack, otlp: OtlpReceiver
) -> None:
    trace_id = "0af7651916cd43dd8448eb211c80319c"
    prompt = "A trace tells the whole story of one request, from its start to its end. " * 4
    await client.chat.completions.create(
        model="smollm2",
        messages=[{"role": "user", "content": prompt}],
        temperature=0,
        max_tokens=5,
        extra_headers={"traceparent": f"00-{trace_id}-b7ad6b7169203331-01"},
    )
    names = {
        "chat smollm2", "send intake smollm2", "process intake smollm2", "route",
        "send jobs smollm2", "process jobs smollm2", "cache lookup", "cache get",
        "prefill", "decode",
    }  # fmt: skip
    await eventually(lambda: names <= {s.name for s in otlp.spans if s.trace_id == trace_id})

    chat = otlp.only("chat smollm2", trace_id)
    send = otlp.only("send intake smollm2", trace_id)
    process = otlp.only("process intake smollm2", trace_id)
    route = otlp.only("route", trace_id)
    hand_off = otlp.only("send jobs smollm2", trace_id)
    job = otlp.only("process jobs smollm2", trace_id)
    lookup = otlp.only("cache lookup", trace_id)
    cache = otlp.only("cache get", trace_id)
    prefill = otlp.only("prefill", trace_id)

    parents = [
        (chat.parent_id, "b7ad6b7169203331"),
        (send.parent_id, chat.span_id),
        (process.parent_id, send.span_id),
        (route.parent_id, process.span_id),
        (hand_off.parent_id, process.span_id),
        (job.parent_id, hand_off.span_id),
        (lookup.parent_id, job.span_id),
        (cache.parent_id, lookup.span_id),
        (prefill.parent_id, job.span_id),
    ]
    assert all(parent == expected for parent, expected in parents), parents
    assert process.links == (send.span_id,)
    assert job.links == (hand_off.span_id,)
    kinds = [chat.kind, send.kind, process.kind, hand_off.kind, job.kind, lookup.kind, cache.kind]
    assert kinds == [SERVER, PRODUCER, CONSUMER, PRODUCER, CONSUMER, CLIENT, SERVER]
    assert (chat.service, process.service) == ("gateway", "gateway")
    assert (job.service, cache.service) == ("worker", "cache-service")

    assert chat.attributes["gen_ai.operation.name"] == "chat"
    assert chat.attributes["gen_ai.request.model"] == "smollm2"
    assert chat.attributes["gen_ai.usage.output_tokens"] == 5
    assert chat.attributes["gen_ai.response.time_to_first_chunk"] > 0
    assert process.attributes["headrace.queue.wait_ms"] >= 0
    assert route.attributes["headrace.route.worker"] == job.attributes["headrace.worker"]
    assert len(route.attributes["headrace.route.scores"]) == 2
    assert route.attributes["headrace.route.reason"]
    assert lookup.attributes["headrace.cache.asked_blocks"] >= 4
    assert prefill.attributes["headrace.prefill.tokens"] > 64
    assert all(s.end_ns >= s.start_ns for s in otlp.spans if s.trace_id == trace_id)


async def test_each_websocket_turn_is_a_trace_of_its_own(
    client: openai.AsyncOpenAI, otlp: OtlpReceiver
) -> None:
    before = {s.trace_id for s in otlp.spans}
    async with client.responses.connect() as connection:
        for _ in range(2):
            await connection.response.create(model="smollm2", input="Hi", max_output_tokens=4)
            async for event in connection:
                if event.type in ("response.completed", "response.incomplete", "error"):
                    break

    def turns() -> set[str]:
        return {s.trace_id for s in otlp.spans if s.name == "chat smollm2"} - before

    await eventually(lambda: len(turns()) >= 2)


def test_without_an_endpoint_nothing_is_traced() -> None:
    """No endpoint: no exporter, no trace id in the answer, no failed connection in the logs."""
    with Stack() as quiet:
        request = urllib.request.Request(
            f"{quiet.url}/v1/completions",
            data=json.dumps({"model": "smollm2", "prompt": "Hi", "max_tokens": 2}).encode(),
            headers={"content-type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            assert answer.status == 200
            assert "x-headrace-trace-id" not in answer.headers
        assert "otlp" not in quiet.log_of("gateway0").lower()
