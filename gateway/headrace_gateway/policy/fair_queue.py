"""The dispatcher's queue: bands first, then arrival.

Invariant: jobs leave in the order of (band, arrival, sequence); a job that is handed on after its
worker died keeps its arrival and so goes before later ones. Each operation costs O(log n); a
removal is lazy.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field

from headrace.types import Band, Job


@dataclass(slots=True)
class Queued:
    """A job that waits. `stream` and `entry` say where it is stored until it is handed off."""

    job: Job
    stream: str
    entry: str
    queued_ns: int
    rescued_from: str = ""


@dataclass(order=True, slots=True)
class _Slot:
    rank: tuple[int, int, int]
    item: Queued | None = field(compare=False)


class FairQueue:
    """Jobs that wait for a worker."""

    def __init__(self) -> None:
        self._heap: list[_Slot] = []
        self._slots: dict[str, _Slot] = {}
        self._sequence = 0
        self._counts = [0] * len(Band)
        self._tokens = 0

    def __len__(self) -> int:
        return len(self._slots)

    def __contains__(self, job_id: str) -> bool:
        return job_id in self._slots

    @property
    def counts(self) -> tuple[int, int, int]:
        """Waiting jobs per Band."""
        return (self._counts[0], self._counts[1], self._counts[2])

    @property
    def tokens(self) -> int:
        """KV tokens that the waiting jobs will reserve."""
        return self._tokens

    def push(self, item: Queued) -> bool:
        """Queue `item`; False if its job waits already."""
        job = item.job
        if job.id in self._slots:
            return False
        self._sequence += 1
        slot = _Slot((int(job.band), job.arrived_ms, self._sequence), item)
        self._slots[job.id] = slot
        heapq.heappush(self._heap, slot)
        self._counts[job.band] += 1
        self._tokens += job.cost_tokens
        return True

    def peek(self) -> Queued | None:
        """The job to serve next."""
        while self._heap and self._heap[0].item is None:
            heapq.heappop(self._heap)
        return self._heap[0].item if self._heap else None

    def remove(self, job_id: str) -> Queued | None:
        """Take `job_id` out, wherever it stands; None if it does not wait."""
        slot = self._slots.pop(job_id, None)
        if slot is None:
            return None
        item = slot.item
        assert item is not None, "a slot in the index holds its item"
        slot.item = None
        self._counts[item.job.band] -= 1
        self._tokens -= item.job.cost_tokens
        return item

    def queued_before(self, instant_ns: int) -> list[Queued]:
        """The jobs that have waited since before `instant_ns`, in order of arrival here."""
        items = (slot.item for slot in self._slots.values())
        return [item for item in items if item is not None and item.queued_ns < instant_ns]

    def check_integrity(self) -> None:
        live = [slot.item for slot in self._heap if slot.item is not None]
        assert len(live) == len(self._slots), "heap and index hold the same jobs"
        assert sum(self._counts) == len(live), "band counts add up"
        assert self._tokens == sum(item.job.cost_tokens for item in live), "tokens add up"
