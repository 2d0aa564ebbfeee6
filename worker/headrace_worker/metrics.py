"""What `/metrics` says of a worker: read when asked, nothing is counted per token.

Invariant: names and units follow Prometheus' rules; a gauge is what the last step left.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from prometheus_client import start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector, CollectorRegistry

from headrace.types import WorkerState, WorkerStatus
from headrace_worker import native
from headrace_worker.cache_counts import CacheCounts


@dataclass(slots=True)
class Counts:
    """What a worker has done since it started, counted as jobs end."""

    late_jobs: int = 0
    guessed: int = 0
    guessed_right: int = 0
    forced: int = 0
    moved_out: int = 0
    stayed: int = 0
    sent_blocks: int = 0
    taken_blocks: int = 0
    cache: CacheCounts = field(default_factory=CacheCounts)


class WorkerCollector(Collector):
    """Turns a worker's own status into metrics."""

    def __init__(
        self, model: str, status: Callable[[], WorkerStatus], counts: Callable[[], Counts]
    ) -> None:
        self._model = model
        self._status = status
        self._counts = counts

    def collect(self) -> Iterable[Metric]:
        status = self._status()
        gauges = {
            "headrace_worker_running_jobs": ("Jobs being computed", status.running),
            "headrace_worker_waiting_jobs": ("Jobs waiting inside the engine", status.waiting),
            "headrace_worker_free_kv_tokens": ("KV tokens not in use", status.free_tokens),
            "headrace_worker_ready": (
                "1 while the worker takes jobs",
                int(status.state is WorkerState.READY),
            ),
        }
        for name, (text, value) in gauges.items():
            gauge = GaugeMetricFamily(name, text, labels=["model"])
            gauge.add_metric([self._model], value)
            yield gauge
        library = native.library()
        kernels = GaugeMetricFamily(
            "headrace_worker_kernels",
            "1, with the instruction set of the native kernels; none: torch computes",
            labels=["model", "isa"],
        )
        kernels.add_metric([self._model, "none" if library is None else library.isa], 1)
        yield kernels
        counts = self._counts()
        counters = {
            "headrace_worker_steps": ("Engine steps", status.steps),
            "headrace_worker_unwritten_blocks": (
                "KV blocks not written to the cache service: no room in the queue or there",
                counts.cache.unwritten_blocks,
            ),
            "headrace_worker_late_jobs": (
                "Jobs ended because a deadline had passed",
                counts.late_jobs,
            ),
            "headrace_worker_guessed_tokens": ("Tokens guessed by speculation", counts.guessed),
            "headrace_worker_guessed_right_tokens": (
                "Guessed tokens that came true",
                counts.guessed_right,
            ),
            "headrace_worker_forced_tokens": (
                "Tokens that a grammar left no choice about",
                counts.forced,
            ),
            "headrace_worker_moved_jobs": ("Jobs handed to a decoding worker", counts.moved_out),
            "headrace_worker_stayed_jobs": (
                "Jobs that were to move and went on here",
                counts.stayed,
            ),
            "headrace_worker_sent_blocks": ("KV blocks sent to other workers", counts.sent_blocks),
            "headrace_worker_taken_blocks": (
                "KV blocks taken in from other workers",
                counts.taken_blocks,
            ),
        }
        for name, (text, value) in counters.items():
            counter = CounterMetricFamily(name, text, labels=["model"])
            counter.add_metric([self._model], value)
            yield counter
        yield from counts.cache.metrics(self._model)


def serve(
    port: int,
    model: str,
    status: Callable[[], WorkerStatus],
    counts: Callable[[], Counts],
) -> Callable[[], None]:
    """Answer on loopback at `port`; returns what stops it."""
    registry = CollectorRegistry()
    registry.register(WorkerCollector(model, status, counts))
    server, thread = start_http_server(port, addr="127.0.0.1", registry=registry)

    def stop() -> None:
        server.shutdown()
        server.server_close()
        thread.join()

    return stop
