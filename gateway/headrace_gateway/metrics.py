"""What `/metrics` says of a gateway.

Invariant: labels come from bounded sets (routes, statuses, models that the fleet knows, bands), so
a client cannot make series. Each app has its own registry: two in one process do not collide.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector

TTFT_BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40)
QUEUE_WAIT_BUCKETS_S = (0.01, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 600, 3_600)
ITL_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2.5)
DURATION_BUCKETS_S = (0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160)


class _Counts(Collector):
    """Gauges read at scrape time, so that they cannot drift from what they describe."""

    def __init__(self, read: Callable[[], dict[str, int]]) -> None:
        self._read = read

    def collect(self) -> Iterable[GaugeMetricFamily]:
        for name, value in sorted(self._read().items()):
            yield GaugeMetricFamily(
                f"headrace_gateway_{name}", f"{name.replace('_', ' ')} in this gateway", value
            )


class Buckets:
    """What was observed under one set of labels."""

    __slots__ = ("_bounds", "counts", "total")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self._bounds, value)] += 1
        self.total += value


class QuickHistogram(Collector):
    """A histogram for what is observed with each token, by one thread: no locks, one addition."""

    def __init__(
        self, name: str, documentation: str, labels: Sequence[str], bounds: tuple[float, ...]
    ) -> None:
        self._name, self._documentation, self._labels = name, documentation, tuple(labels)
        self._bounds = bounds
        self._children: dict[tuple[str, ...], Buckets] = {}

    def labels(self, *values: str) -> Buckets:
        assert len(values) == len(self._labels), "a value for each label"
        found = self._children.get(values)
        if found is None:
            found = self._children[values] = Buckets(self._bounds)
        return found

    def collect(self) -> Iterable[HistogramMetricFamily]:
        family = HistogramMetricFamily(self._name, self._documentation, labels=self._labels)
        names = [*map(str, map(float, self._bounds)), "+Inf"]
        for values, child in sorted(self._children.items()):
            buckets = list(zip(names, accumulate(child.counts), strict=True))
            family.add_metric(values, buckets, child.total)
        yield family


class GatewayMetrics:
    """Counters and histograms of the API, and gauges from `counts`."""

    def __init__(self, counts: Callable[[], dict[str, int]]) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(_Counts(counts))
        self.requests = Counter(
            "headrace_gateway_requests",
            "Answered requests; WebSocket turns count as route /v1/responses#turn",
            ["route", "status"],
            registry=self.registry,
        )
        self.refusals = Counter(
            "headrace_gateway_refusals",
            "Requests that were understood and not accepted, by error code",
            ["code", "band"],
            registry=self.registry,
        )
        self.tokens = Counter(
            "headrace_gateway_tokens",
            "Tokens of finished requests; kind is prompt, cached or completion",
            ["model", "kind"],
            registry=self.registry,
        )
        self.ttft = Histogram(
            "headrace_gateway_time_to_first_token_seconds",
            "From the arrival of a request to its first token",
            ["model", "band"],
            buckets=TTFT_BUCKETS_S,
            registry=self.registry,
        )
        self.itl = QuickHistogram(
            "headrace_gateway_inter_token_latency_seconds",
            "Mean time per token between two deliveries of one stream, one sample a delivery",
            ["model", "band"],
            ITL_BUCKETS_S,
        )
        self.registry.register(self.itl)
        self.queue_wait = QuickHistogram(
            "headrace_gateway_queue_wait_seconds",
            "From a job's acceptance to its leaving the queue, as far as it was seen in there",
            ["model", "band"],
            QUEUE_WAIT_BUCKETS_S,
        )
        self.registry.register(self.queue_wait)
        self.deadline_ends = Counter(
            "headrace_gateway_deadline_ends",
            "Jobs that their deadline ended; stage is waiting (no token yet) or decoding",
            ["model", "band", "stage"],
            registry=self.registry,
        )
        self.prompt_answers = Counter(
            "headrace_gateway_prompt_answers",
            "Deterministic jobs of tenants that opted in; way is entry (kept from before), "
            "followed (the same request was being computed) or computed",
            ["model", "way"],
            registry=self.registry,
        )
        self.prompt_saved = Counter(
            "headrace_gateway_prompt_saved_seconds",
            "What kept outputs took when they were computed, summed up each time one was told",
            ["model"],
            registry=self.registry,
        )
        self.duration = Histogram(
            "headrace_gateway_request_duration_seconds",
            "From the arrival of a generation request to its end",
            ["model", "band"],
            buckets=DURATION_BUCKETS_S,
            registry=self.registry,
        )

    def render(self) -> bytes:
        """The exposition text."""
        return generate_latest(self.registry)
