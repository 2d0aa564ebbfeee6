"""The gateway's own span: name, parent, attributes, status; one for each turn of a WebSocket."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from headrace import telemetry
from headrace.errors import JobFailedError
from support.api import MODEL, ScriptedFleet, encode, running_gateway, say

CHAT = "/v1/chat/completions"
BODY = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}]}
TRACE_ID = "0af7651916cd43dd8448eb211c80319c"
PARENT = f"00-{TRACE_ID}-b7ad6b7169203331-01"


@pytest.fixture
def spans(monkeypatch: pytest.MonkeyPatch) -> Iterator[InMemorySpanExporter]:
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(telemetry, "_provider", provider)
    yield exporter
    provider.shutdown()


async def test_a_request_continues_the_clients_trace(spans: InMemorySpanExporter) -> None:
    async with running_gateway(ScriptedFleet(script=lambda job: say("ok", cached=3))) as g:
        async with g.http.post(CHAT, json=BODY, headers={"traceparent": PARENT}) as response:
            assert response.headers["x-headrace-trace-id"] == TRACE_ID
        await g.settled()
        [span] = spans.get_finished_spans()
        assert span.name == f"chat {MODEL}"
        assert span.kind is SpanKind.SERVER
        assert format(span.context.trace_id, "032x") == TRACE_ID
        assert span.parent is not None
        assert format(span.parent.span_id, "016x") == "b7ad6b7169203331"
        assert span.status.status_code is StatusCode.UNSET
        attributes = dict(span.attributes or {})
        first_chunk_s = attributes.pop("gen_ai.response.time_to_first_chunk")
        assert isinstance(first_chunk_s, float)
        assert attributes.pop("gen_ai.response.id")
        assert attributes == {
            "http.request.method": "POST",
            "http.route": CHAT,
            "http.response.status_code": 200,
            "url.path": CHAT,
            "url.scheme": "http",
            "network.protocol.name": "http",
            "gen_ai.operation.name": "chat",
            "gen_ai.provider.name": "headrace",
            "gen_ai.request.model": MODEL,
            "gen_ai.request.stream": False,
            "gen_ai.response.model": MODEL,
            "gen_ai.response.finish_reasons": ("stop",),
            "gen_ai.usage.input_tokens": len(g.fleet.jobs[0].prompt),
            "gen_ai.usage.output_tokens": len(encode("ok")) + 1,
            "gen_ai.usage.cache_read.input_tokens": 3,
            "gen_ai.usage.cache_write.input_tokens": 0,
            "headrace.tenant": "default",
            "headrace.band": "standard",
        }
        assert g.fleet.spans[0].get_span_context() == span.context


async def test_errors_are_on_the_span(spans: InMemorySpanExporter) -> None:
    """A caller's mistake leaves the status unset, as HTTP's conventions say; ours sets it."""
    broken = ScriptedFleet(script=lambda job: [JobFailedError("broke")])
    async with running_gateway(broken) as g:
        for body in (BODY | {"n": 99}, BODY, BODY | {"stream": True}):
            async with g.http.post(CHAT, json=body) as response:
                await response.read()
                assert response.headers["x-headrace-trace-id"]
        await g.settled()
        refused, failed, failed_in_stream = spans.get_finished_spans()
        assert refused.name == "chat"
        assert refused.status.status_code is StatusCode.UNSET
        assert (refused.attributes or {})["error.type"] == "invalid_value"
        for span in (failed, failed_in_stream):
            assert span.name == f"chat {MODEL}"
            assert span.status.status_code is StatusCode.ERROR
            assert (span.attributes or {})["error.type"] == "generation_failed"
            assert (span.attributes or {})["http.response.status_code"] == 500


async def test_each_turn_of_a_websocket_has_its_span(spans: InMemorySpanExporter) -> None:
    async with (
        running_gateway() as g,
        g.http.ws_connect("/v1/responses", headers={"traceparent": PARENT}) as socket,
    ):
        for _ in range(2):
            await socket.send_json({"type": "response.create", "model": MODEL, "input": "Hi"})
            while (await socket.receive_json(timeout=5))["type"] != "response.completed":
                pass
        await g.settled()
        finished = spans.get_finished_spans()
        assert [span.name for span in finished] == [f"chat {MODEL}"] * 2
        for span in finished:
            assert format(span.context.trace_id, "032x") == TRACE_ID
            assert (span.attributes or {})["network.protocol.name"] == "websocket"
            assert (span.attributes or {})["gen_ai.request.stream"] is True


async def test_completions_have_their_operation_and_off_means_off(
    spans: InMemorySpanExporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running_gateway() as g:
        body = {"model": MODEL, "prompt": "Hi"}
        await g.post("/v1/completions", body)
        await g.settled()
        assert [span.name for span in spans.get_finished_spans()] == [f"text_completion {MODEL}"]
        monkeypatch.setattr(telemetry, "_provider", None)
        async with g.http.post("/v1/completions", json=body) as response:
            assert "x-headrace-trace-id" not in response.headers
        assert len(spans.get_finished_spans()) == 1


async def test_what_a_request_wants_of_the_cache_stands_in_its_trace(
    spans: InMemorySpanExporter,
) -> None:
    """Options on the turn's span, and in one of its own where its tokens came from."""
    keys = "sk-test:red prompt_entries=true"
    async with running_gateway(ScriptedFleet(script=lambda job: say("ok")), api_keys=keys) as g:
        asked = BODY | {"temperature": 0, "prompt_cache_options": {"mode": "explicit", "ttl": "1m"}}
        status, _ = await g.post(CHAT, asked, Authorization="Bearer sk-test")
        assert status == 200
        await g.settled()
        lookup, turn = spans.get_finished_spans()
        assert lookup.name == "prompt cache"
        assert lookup.parent is not None
        assert turn.context is not None
        assert lookup.parent.span_id == turn.context.span_id
        assert dict(lookup.attributes or {}) == {
            "headrace.prompt_cache.way": "computed",
            "headrace.prompt_cache.saved_ms": 0,
        }
        attributes = turn.attributes or {}
        assert attributes["headrace.cache.mode"] == "explicit"
        assert attributes["headrace.cache.ttl_ms"] == 60_000
        assert attributes["headrace.cache.until_tokens"] == 0
