"""Prometheus metrics of the cache service: read from the store at scrape time.

Invariant: the scraping thread never touches the store; it asks the event loop for a snapshot and
gives up after SNAPSHOT_S. Rejected: a second set of counters to keep in step with the store's.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from typing import Any

from prometheus_client import CollectorRegistry, Histogram, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

SNAPSHOT_S = 2.0
SECONDS_BUCKETS = (0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)

_GAUGES = {"entries": "entries resident", "bytes": "bytes of entries resident"}
_COUNTERS = {
    "hits": "keys asked for and given",
    "hit_bytes": "bytes of keys asked for and given",
    "saved_us": "microseconds that computing what was given would have taken",
    "misses": "keys asked for and not given",
    "kept": "entries taken in",
    "present": "entries offered that were there already",
    "refused": "entries offered and not taken in",
    "evictions": "entries that left to make room",
    "corrupt": "entries dropped because their CRC was wrong",
}


class Metrics:
    """Owns the registry and, once `listen` was called, the HTTP listener."""

    def __init__(self, snapshot: Callable[[], dict[str, Any]]) -> None:
        self.registry = CollectorRegistry()
        self.seconds = Histogram(
            "headrace_cache_request_seconds",
            "From a request's arrival until its answer is handed to the kernel",
            ["op"],
            buckets=SECONDS_BUCKETS,
            registry=self.registry,
        )
        self._snapshot = snapshot
        self._close: Callable[[], None] = lambda: None

    def listen(self, host: str, port: int) -> int:
        """Serve `/metrics` from a thread of its own; returns the port. Raises OSError."""
        self.registry.register(_StoreCollector(asyncio.get_running_loop(), self._snapshot))
        server, thread = start_http_server(port, host, registry=self.registry)

        def close() -> None:
            server.shutdown()
            server.server_close()
            thread.join()

        self._close = close
        return int(server.server_address[1])

    async def close(self) -> None:
        """Stop listening. A scrape in progress ends first, so it needs the loop to run on."""
        close, self._close = self._close, lambda: None
        await asyncio.to_thread(close)


class _StoreCollector(Collector):
    def __init__(
        self, loop: asyncio.AbstractEventLoop, snapshot: Callable[[], dict[str, Any]]
    ) -> None:
        self._loop = loop
        self._snapshot = snapshot

    def describe(self) -> Iterable[Metric]:
        """Nothing: said at registration, when no snapshot can be had yet."""
        return []

    def collect(self) -> Iterable[Metric]:
        answer: Future[dict[str, Any]] = Future()
        self._loop.call_soon_threadsafe(lambda: answer.set_result(self._snapshot()))
        return _families(answer.result(SNAPSHOT_S))


def _families(stats: dict[str, Any]) -> Iterable[Metric]:
    for name, help_text in (
        ("budget_bytes", "budget for all entries"),
        ("used_bytes", "charged to the budget now"),
        ("reserved_bytes", "charged for what is being written"),
        ("pinned_bytes", "charged for what is pinned, and what stands before it"),
        ("leases", "runs that are being read"),
        ("connections", "clients connected"),
    ):
        yield GaugeMetricFamily(f"headrace_cache_{name}", help_text, value=stats[name])
    for label, tallies in (("kind", stats["by_kind"]), ("tenant", stats["by_tenant"])):
        suffix = "" if label == "kind" else "_tenant"
        for name, help_text in _GAUGES.items():
            gauge = GaugeMetricFamily(f"headrace_cache{suffix}_{name}", help_text, labels=[label])
            for value, tally in tallies.items():
                gauge.add_metric([value], tally[name])
            yield gauge
        for name, help_text in _COUNTERS.items():
            counter = CounterMetricFamily(
                f"headrace_cache{suffix}_{name}", help_text, labels=[label]
            )
            for value, tally in tallies.items():
                counter.add_metric([value], tally[name])
            yield counter
