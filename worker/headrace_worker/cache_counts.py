"""What the cache service did for one worker, counted for `/metrics`: costs beside what they saved.

Invariant: counters only grow. A fetch that took longer than computing would have counts as lost
time, apart from what others saved.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from prometheus_client.core import CounterMetricFamily, Metric


@dataclass(slots=True)
class CacheCounts:
    """Since the worker started. Lookups by reason, fetches by tier."""

    lookups: Counter[str] = field(default_factory=Counter)
    fetched_blocks: Counter[str] = field(default_factory=Counter)
    fetched_bytes: Counter[str] = field(default_factory=Counter)
    fetch_us: Counter[str] = field(default_factory=Counter)
    saved_us: Counter[str] = field(default_factory=Counter)
    lost_us: Counter[str] = field(default_factory=Counter)
    written_blocks: int = 0
    written_bytes: int = 0
    unwritten_blocks: int = 0

    def note_lookup(
        self, reason: str, tier: str, blocks: int, size_bytes: int, took_ms: float, saved_ms: float
    ) -> None:
        """`saved_ms`: less than nothing where computing would have been faster."""
        self.lookups[reason] += 1
        self.fetched_blocks[tier] += blocks
        self.fetched_bytes[tier] += size_bytes
        self.fetch_us[tier] += round(1000 * took_ms)
        (self.saved_us if saved_ms > 0 else self.lost_us)[tier] += round(abs(1000 * saved_ms))

    def metrics(self, model: str) -> Iterator[Metric]:
        yield _family(
            "headrace_worker_cache_lookups",
            "Jobs that lacked KV, by what was decided about fetching it",
            ("reason", model, {name: float(count) for name, count in self.lookups.items()}),
        )
        for name, text, counted, unit in (
            ("fetched_blocks", "KV blocks fetched", self.fetched_blocks, 1),
            ("fetched_bytes", "Bytes of KV fetched", self.fetched_bytes, 1),
            ("fetch_seconds", "Time that lookups took", self.fetch_us, 1_000_000),
            (
                "saved_seconds",
                "Prefill time saved, less the fetching",
                self.saved_us,
                1_000_000,
            ),
            ("lost_seconds", "Time by which computing was faster", self.lost_us, 1_000_000),
        ):
            values = {tier: count / unit for tier, count in counted.items()}
            yield _family(f"headrace_worker_cache_{name}", text, ("tier", model, values))
        for name, text, count in (
            ("written_blocks", "KV blocks written to the cache service", self.written_blocks),
            ("written_bytes", "Bytes of KV written to the cache service", self.written_bytes),
        ):
            counter = CounterMetricFamily(f"headrace_worker_cache_{name}", text, labels=["model"])
            counter.add_metric([model], count)
            yield counter


def _family(name: str, text: str, rows: tuple[str, str, dict[str, float]]) -> CounterMetricFamily:
    """A counter with a value for each of a label's values: (label, model, values)."""
    label, model, values = rows
    counter = CounterMetricFamily(name, text, labels=["model", label])
    for value, count in sorted(values.items()):
        counter.add_metric([model, value], count)
    return counter
