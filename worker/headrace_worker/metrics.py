"""What `/metrics` says of a worker: read when asked, nothing is counted per token.

Invariant: names and units follow Prometheus' rules; a gauge is what the last step left.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from prometheus_client import start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector, CollectorRegistry

from headrace.types import WorkerState, WorkerStatus


class WorkerCollector(Collector):
    """Turns a worker's own status into metrics."""

    def __init__(self, model: str, status: Callable[[], WorkerStatus]) -> None:
        self._model = model
        self._status = status

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
        steps = CounterMetricFamily("headrace_worker_steps", "Engine steps", labels=["model"])
        steps.add_metric([self._model], status.steps)
        yield steps


def serve(port: int, model: str, status: Callable[[], WorkerStatus]) -> Callable[[], None]:
    """Answer on loopback at `port`; returns what stops it."""
    registry = CollectorRegistry()
    registry.register(WorkerCollector(model, status))
    server, thread = start_http_server(port, addr="127.0.0.1", registry=registry)

    def stop() -> None:
        server.shutdown()
        server.server_close()
        thread.join()

    return stop
