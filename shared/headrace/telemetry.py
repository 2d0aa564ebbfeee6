"""OpenTelemetry traces: one per request, over every hop, or nothing at all.

Invariant: with no endpoint set nothing is recorded, sent or allocated per token. Context crosses a
queue as W3C headers inside the job: the producer's span is what the message carries, the
consumer's span is its child and also links it (messaging conventions, one message a request).
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import Link, Span, SpanKind, Tracer
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from headrace import __version__

EXPORT_EVERY_MS = 500
QUEUE_SPANS_MAX = 8_192

_propagator = TraceContextTextMapPropagator()
_provider: TracerProvider | None = None
_OFF = trace.NoOpTracer()
_NOWHERE = Context()


def setup(service: str, endpoint: str, instance: str = "") -> None:
    """Send this process's spans to `endpoint` (base URL, `/v1/traces` is added); '' means off."""
    global _provider
    if not endpoint:
        return
    resource = Resource.create(
        {
            "service.namespace": "headrace",
            "service.name": service,
            "service.version": __version__,
            "service.instance.id": instance or f"{socket.gethostname()}-{os.getpid()}",
        }
    )
    _provider = TracerProvider(resource=resource)
    _provider.add_span_processor(
        BatchSpanProcessor(
            OTLPSpanExporter(endpoint=endpoint.rstrip("/") + "/v1/traces"),
            max_queue_size=QUEUE_SPANS_MAX,
            schedule_delay_millis=EXPORT_EVERY_MS,
        )
    )


def enabled() -> bool:
    return _provider is not None


def shutdown() -> None:
    """Send what is left. Call from a thread that may block for a few seconds."""
    global _provider
    if _provider is not None:
        _provider.shutdown()
        _provider = None


def tracer() -> Tracer:
    """The process's tracer; its spans record nothing while tracing is off."""
    return _provider.get_tracer("headrace") if _provider is not None else _OFF


def inject(span: Span) -> dict[str, str]:
    """The W3C headers that make a later span a child of `span`; empty while tracing is off."""
    carrier: dict[str, str] = {}
    if _provider is not None:
        _propagator.inject(carrier, context=trace.set_span_in_context(span))
    return carrier


def extract(carrier: Mapping[str, str]) -> Context:
    """The context that `carrier` (W3C headers) names; none while tracing is off."""
    if _provider is None:
        return _NOWHERE
    return _propagator.extract(dict(carrier), context=Context())


def under(span: Span) -> Context:
    """The context in which a new span becomes a child of `span`; none while tracing is off."""
    if _provider is None:
        return _NOWHERE
    return trace.set_span_in_context(span, Context())


def consumer_span(
    name: str, carrier: Mapping[str, str], start_ns: int | None = None, **attributes: str | int
) -> Span:
    """A CONSUMER span that is the child of the message's producer and links it."""
    if _provider is None:
        return trace.INVALID_SPAN
    context = extract(carrier)
    producer = trace.get_current_span(context).get_span_context()
    return tracer().start_span(
        name,
        context=context,
        kind=SpanKind.CONSUMER,
        links=[Link(producer)] if producer.is_valid else [],
        attributes={"messaging.system": "redis", "messaging.operation.type": "process"}
        | {key.replace("__", "."): value for key, value in attributes.items()},
        start_time=start_ns,
    )
