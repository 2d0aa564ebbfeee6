"""The spans of a hand-off: process intake (consumer) → route, send (producer).

Invariant: a job carries the context of the span that sent it on, so one trace tells its whole way.
Where nothing is traced no span is made.
"""

from __future__ import annotations

from opentelemetry.trace import Span, SpanKind

from headrace import keys, telemetry
from headrace.policy.priority import due_ms
from headrace_gateway.policy.dispatch import Decision
from headrace_gateway.policy.fetching import Spared
from headrace_gateway.policy.pairing import Pairing
from headrace_gateway.policy.route import Route, Score


class Hop:
    """The spans of one decision. `carrier` is the context that the job takes along."""

    carrier: dict[str, str]

    def __init__(self, decision: Decision, now_ns: int) -> None:
        self.carrier = {}
        self._spans: list[Span] = []
        if not telemetry.enabled():
            return
        item, route = decision.item, decision.route
        job = item.job
        process = telemetry.consumer_span(f"process intake {job.model}", job.trace, item.queued_ns)
        process.set_attributes(
            {
                "messaging.destination.name": item.stream,
                "messaging.message.id": item.entry,
                "headrace.job.id": job.id,
                "headrace.job.attempt": job.attempt,
                "headrace.queue.wait_ms": (now_ns - item.queued_ns) / 1e6,
                "headrace.band": job.band.label,
                "headrace.tenant": job.tenant,
                "headrace.tenant.virtual": decision.virtual,
                "headrace.priority": job.priority,
                "headrace.due_in_ms": due_ms(job) - now_ns // 1_000_000,
                "headrace.rescued_from": item.rescued_from,
            }
        )
        route_span = telemetry.tracer().start_span("route", telemetry.under(process))
        route_span.set_attributes(route_attributes(route))
        if decision.pairing.reason:
            route_span.set_attributes(pairing_attributes(decision.pairing))
        route_span.end()
        send = telemetry.tracer().start_span(
            f"send jobs {job.model}",
            telemetry.under(process),
            SpanKind.PRODUCER,
            {
                "messaging.system": "redis",
                "messaging.operation.type": "send",
                "messaging.destination.name": keys.jobs(job.model, route.worker),
                "headrace.worker": route.worker,
            },
        )
        self.carrier = telemetry.inject(send)
        self._spans = [send, process]

    def end(self, answer: str) -> None:
        for span in self._spans:
            span.set_attribute("headrace.handoff", answer)
            span.end()


def route_attributes(route: Route) -> dict[str, str | int | list[str]]:
    """A routing decision, readable in a trace viewer."""
    return {
        "headrace.route.worker": route.worker,
        "headrace.route.reason": route.reason,
        "headrace.route.cached_blocks": route.cached_blocks,
        "headrace.route.shared_blocks": route.spared.blocks,
        "headrace.route.spared_tokens": route.spared.tokens,
        "headrace.route.scores": [_words(score, route.spared) for score in route.scores],
    }


def pairing_attributes(pairing: Pairing) -> dict[str, str | list[str]]:
    """Why one worker or two."""
    return {
        "headrace.pair.decode_worker": pairing.decode,
        "headrace.pair.reason": pairing.reason,
        "headrace.pair.scores": [f"{score.price:.0f}: {score.words}" for score in pairing.scores],
    }


def _words(score: Score, spared: Spared) -> str:
    fetched = f" or fetch ({spared.blocks} blocks)" if spared.blocks else ""
    return (
        f"{score.worker}: {score.verdict}, cost {score.cost:.0f}, "
        f"{score.uncached_tokens} tokens to compute{fetched}, {score.jobs} jobs"
    )
