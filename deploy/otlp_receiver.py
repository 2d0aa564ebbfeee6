"""A small OTLP/HTTP receiver that answers Jaeger's query API, where Jaeger's image cannot be had.

It keeps the last SPANS_MAX spans in memory. Ports as Jaeger's: 4318 takes spans (POST /v1/traces,
protobuf), 16686 shows them (GET /api/services, /api/traces?service=…, /api/traces/<id>).
Runs in the gateway's image, which has all it needs: `python otlp_receiver.py`.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Any

from aiohttp import web
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.common.v1.common_pb2 import AnyValue

OTLP_PORT = 4318
QUERY_PORT = 16686
SPANS_MAX = 50_000
BODY_BYTES_MAX = 16 * 1024 * 1024
TRACES_MAX = 100

Span = dict[str, Any]


def plain(value: AnyValue) -> Any:
    kind = value.WhichOneof("value")
    if kind == "array_value":
        return [plain(item) for item in value.array_value.values]
    return getattr(value, kind) if kind else None


def spans_of(request: ExportTraceServiceRequest) -> list[Span]:
    """Spans as Jaeger shows them, each with its service's name."""
    found = []
    for resource in request.resource_spans:
        facts = {a.key: plain(a.value) for a in resource.resource.attributes}
        service = str(facts.get("service.name", "unknown"))
        for span in (span for scope in resource.scope_spans for span in scope.spans):
            trace_id = span.trace_id.hex()
            parent = span.parent_span_id.hex()
            reference = {"refType": "CHILD_OF", "traceID": trace_id, "spanID": parent}
            found.append(
                {
                    "traceID": trace_id,
                    "spanID": span.span_id.hex(),
                    "operationName": span.name,
                    "references": [reference] if parent else [],
                    "startTime": span.start_time_unix_nano // 1_000,
                    "duration": (span.end_time_unix_nano - span.start_time_unix_nano) // 1_000,
                    "tags": [{"key": a.key, "value": plain(a.value)} for a in span.attributes],
                    "service": service,
                }
            )
    return found


def trace_json(trace_id: str, spans: list[Span]) -> dict[str, Any]:
    services = sorted({span["service"] for span in spans})
    names = {service: f"p{index + 1}" for index, service in enumerate(services)}
    return {
        "traceID": trace_id,
        "spans": [
            {k: v for k, v in span.items() if k != "service"}
            | {"processID": names[span["service"]]}
            for span in spans
        ],
        "processes": {key: {"serviceName": service} for service, key in names.items()},
    }


class Receiver:
    """The last spans, newest last."""

    def __init__(self) -> None:
        self._spans: deque[Span] = deque(maxlen=SPANS_MAX)

    async def take(self, request: web.Request) -> web.Response:
        message = ExportTraceServiceRequest()
        message.ParseFromString(await request.read())
        self._spans.extend(spans_of(message))
        answer = ExportTraceServiceResponse().SerializeToString()
        return web.Response(body=answer, content_type="application/x-protobuf")

    async def services(self, _: web.Request) -> web.Response:
        return web.json_response({"data": sorted({span["service"] for span in self._spans})})

    async def trace(self, request: web.Request) -> web.Response:
        return self._answer([request.match_info["id"]])

    async def traces(self, request: web.Request) -> web.Response:
        service = request.query.get("service")
        newest = [s["traceID"] for s in reversed(self._spans) if s["service"] == service]
        return self._answer(list(dict.fromkeys(newest))[:TRACES_MAX])

    def _answer(self, trace_ids: list[str]) -> web.Response:
        spans: dict[str, list[Span]] = {trace_id: [] for trace_id in trace_ids}
        for span in self._spans:
            if span["traceID"] in spans:
                spans[span["traceID"]].append(span)
        return web.json_response(
            {"data": [trace_json(trace_id, found) for trace_id, found in spans.items() if found]}
        )

    def app(self) -> web.Application:
        app = web.Application(client_max_size=BODY_BYTES_MAX)
        app.router.add_post("/v1/traces", self.take)
        app.router.add_get("/api/services", self.services)
        app.router.add_get("/api/traces", self.traces)
        app.router.add_get("/api/traces/{id}", self.trace)
        return app


async def main() -> None:
    runner = web.AppRunner(Receiver().app())
    await runner.setup()
    for port in (OTLP_PORT, QUERY_PORT):
        await web.TCPSite(runner, "0.0.0.0", port).start()
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main())
