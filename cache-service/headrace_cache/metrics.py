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

_DISK_GAUGES = {
    "ready": "1 once the disk's entries can be read",
    "paused": "1 while nothing is written, as writing failed",
    "budget_bytes": "budget of the files",
    "used_bytes": "what the files take",
    "entries": "entries on disk",
    "bytes": "bytes of entries on disk",
    "pinned_bytes": "bytes of entries that are pinned on disk",
    "offers_waiting": "copies that wait to be written",
    "offer_bytes_waiting": "bytes of copies that wait to be written",
    "reads_waiting": "requests that wait to be read",
}
_DISK_COUNTERS = {
    "read": "entries read and found right",
    "read_bytes": "bytes of entries read",
    "missed": "entries that were to be read and had gone",
    "promoted": "entries read into RAM for who asked",
    "promoted_bytes": "bytes of entries read into RAM",
    "gone": "entries that were to be read into RAM and could not be",
    "written": "entries written",
    "written_bytes": "bytes of entries written",
    "present": "entries offered that were on disk already",
    "refused": "entries not written: too large, wrong, or the disk in trouble",
    "not_taken": "entries not taken by the queue of writes",
    "not_copied": "entries that left RAM without a copy on disk",
    "disk_full": "pauses of writing because the disk was full",
    "write_errors": "pauses of writing, for whatever reason",
    "read_errors": "reads that the system refused",
    "corrupt": "records that were not what was written",
    "lost_records": "records that could not be read at the start",
    "lost_segments": "files that could not be read at the start",
    "segments_dropped": "files that left to make room",
    "carried": "entries carried over from a file that left",
    "forgotten": "entries forgotten because somebody asked for it",
    "job_failures": "bugs met by the disk's threads",
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
        ("shared_bytes", "of memory that clients of this host map; 0: they use the socket"),
        ("huge_pages", "1 if the kernel gives huge pages to it"),
        ("connections", "clients connected"),
    ):
        yield GaugeMetricFamily(f"headrace_cache_{name}", help_text, value=stats[name])
    yield from _disk_families(stats.get("disk", {}))
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


def _disk_families(stats: dict[str, Any]) -> Iterable[Metric]:
    """What the disk counted; nothing without one."""
    if not stats:
        return
    for name, help_text in _DISK_GAUGES.items():
        yield GaugeMetricFamily(f"headrace_cache_disk_{name}", help_text, value=stats[name])
    for name, help_text in _DISK_COUNTERS.items():
        yield CounterMetricFamily(f"headrace_cache_disk_{name}", help_text, value=stats[name])
    held = GaugeMetricFamily(
        "headrace_cache_disk_tenant_bytes", "bytes of entries on disk", labels=["tenant"]
    )
    for tenant, size_bytes in stats["bytes_by_tenant"].items():
        held.add_metric([tenant], size_bytes)
    yield held
