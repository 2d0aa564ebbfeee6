"""What is known of a turn's wait in the queue: for its client, its span and the histogram of waits.

Invariant: a turn of several jobs has one place, that of the first of them; it has left the queue
with the first that has, and nothing is said of the queue after that. Every job's wait is observed
once, when it is seen to have left or to have expired; that of a job which was never seen in the
queue counts as nothing. Span events are bounded, however long a turn waits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from opentelemetry.trace import Span

from headrace.clock import Clock
from headrace_gateway.generation import Standing

PLACES_TRACED_MAX = 32


@dataclass(frozen=True, slots=True)
class Place:
    """For a client: `position` counts from 1; `start_in_ms` is predicted, None where unknown."""

    position: int
    start_in_ms: int | None


class Waiting:
    """One turn's; `observe_s` takes a job's wait."""

    def __init__(self, span: Span, clock: Clock, observe_s: Callable[[float], object]) -> None:
        self._span = span
        self._clock = clock
        self._observe_s = observe_s
        self._accepted_ms = clock.now_ms()
        self._places: dict[int, int] = {}
        """Choice → its last known place, of those that were seen in the queue."""
        self._gone: set[int] = set()
        self._traced = 0

    @property
    def over(self) -> bool:
        """Whether a job of this turn has left the queue."""
        return bool(self._gone)

    def note(self, index: int, standing: Standing) -> Place | None:
        """The turn's place, if `standing` of choice `index` is news of it."""
        if standing.place == 0:
            self.leave(index, standing.at_ms)
            return None
        self._places[index] = standing.place
        if self.over or standing.place > min(self._places.values()):
            return None
        start_in_ms = max(0, standing.start_ms - self._clock.wall_ms())
        place = Place(standing.place, start_in_ms if standing.start_ms else None)
        self._trace(place)
        return place

    def leave(self, index: int, at_ms: int) -> None:
        """Choice `index` waits no more, since `at_ms`; harmless when that is known already."""
        if index in self._gone:
            return
        self._gone.add(index)
        waited_ms = max(0, at_ms - self._accepted_ms) if index in self._places else 0
        self._observe_s(waited_ms / 1000)
        if index in self._places and len(self._gone) == 1:
            self._span.set_attribute("headrace.queue.wait_ms", waited_ms)

    def _trace(self, place: Place) -> None:
        if self._traced >= PLACES_TRACED_MAX:
            return
        self._traced += 1
        attributes = {"headrace.queue.position": place.position}
        if place.start_in_ms is not None:
            attributes["headrace.queue.predicted_start_ms"] = place.start_in_ms
        self._span.add_event("queued", attributes)
