"""How many prompt tokens fit into a time, and how many beside streams, by the steps that ran here.

Invariant: what is allowed to prompts is a time, as that is what others wait; tokens differ by a
hundred between a small CPU and a GPU. Rejected: a number of tokens as a setting, which was right on
one machine.

Beside running streams a step may take `stretch` times as long as one of all the streams that will
run when those who are here have started, or STEP_MS_MIN where that is longer: a reader does not see
more often than that. So tokens of a stream come evenly, however long the prompts that arrive; and
as everybody's prompt makes the streams' steps longer anyway, those who start together are not held
up by the first of them. The chunks are those of Agrawal et al., "Taming Throughput-Latency Tradeoff
in LLM Inference with Sarathi-Serve" (OSDI 2024), whose budget is a number found by profiling.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

TOKENS_UNKNOWN = 128
"""Before anything was measured."""
TOKENS_MIN = 16
"""A chunk of fewer costs as much as one of these."""
TOKENS_UNLIMITED = 1 << 30
HALF_LIFE_STEPS = 8
TOKEN_MS_MIN = 1e-6
STRETCH = 1.7
"""Below 2, so that the slowest hundredth of a stream's gaps stays below twice their median."""
STEP_MS_MIN = 75.0
"""A step beside streams may be as long as this, whatever theirs take: prompts get on as well."""
STREAM_STEPS = 5
"""Of as many last steps the median counts: one that the machine held up says nothing."""
ROWS_BITS = 3
"""Steps of streams are told apart by so many leading bits of their number of rows."""


class Pace:
    """Milliseconds of a prompt token, averaged with a half-life of HALF_LIFE_STEPS; steps of
    streams alone, by their rows. `stretch` 0: prompts are not limited beside streams."""

    def __init__(self, stretch: float = 0.0) -> None:
        self._stretch = stretch
        self._token_ms = 0.0
        self._beside_ms = 0.0
        self._streams_ms: dict[int, tuple[float, ...]] = {}

    def note(self, prompt_tokens: int, stream_rows: int, took_ms: float) -> None:
        """A step computed `prompt_tokens` of prompts beside `stream_rows` of running streams."""
        if took_ms <= 0:
            return  # wall clocks are set back now and then
        if not prompt_tokens:
            self.note_streams(stream_rows, (took_ms,))
            return
        if stream_rows and prompt_tokens >= TOKENS_MIN:
            measured = (took_ms - self.streams_ms(stream_rows)) / prompt_tokens
            self._beside_ms = _averaged(self._beside_ms, measured)
        if prompt_tokens >= max(TOKENS_MIN, stream_rows):  # others say little of a prompt token
            self._token_ms = _averaged(self._token_ms, took_ms / (prompt_tokens + stream_rows))

    def note_streams(self, rows: int, took_ms: Iterable[float]) -> None:
        """Steps of streams alone, each of `rows` rows."""
        if rows:
            size = _size(rows)
            kept = (*self._streams_ms.get(size, ()), *took_ms)
            self._streams_ms[size] = kept[-STREAM_STEPS:]

    @property
    def token_ms(self) -> float:
        """Milliseconds of a prompt token; 0 before anything was measured."""
        return self._token_ms

    def tokens_within(self, limit_ms: int) -> int:
        """Prompt tokens that take about `limit_ms`; never none."""
        if not self._token_ms:
            return TOKENS_UNKNOWN
        return max(TOKENS_MIN, int(limit_ms / self._token_ms))

    def tokens_beside(self, streams: int, later: int) -> int:
        """Prompt tokens in a step of so many `streams`, `later` of which will run; never none."""
        if not self._stretch or not streams:
            return TOKENS_UNLIMITED
        each_ms = self._beside_ms or self._token_ms
        if not each_ms:
            return TOKENS_UNKNOWN
        limit_ms = max(STEP_MS_MIN, self._stretch * self.streams_ms(max(streams, later)))
        room = (limit_ms - self.streams_ms(streams)) / each_ms
        # sums that differ in their last bit do not count
        return min(TOKENS_UNLIMITED, max(TOKENS_MIN, int(room + 1e-6)))

    def streams_ms(self, rows: int) -> float:
        """About how long a step of `rows` streams alone takes.

        Measured, or between two sizes that were, or in proportion to the nearest, or to prompts.
        """
        size = _size(rows)
        known_ms = self._streams_ms.get(size)
        if known_ms is not None:
            return _median(known_ms)
        below = above = 0
        for known in self._streams_ms:
            if below < known < size:
                below = known
            elif known > size and (not above or known < above):
                above = known
        if not below and not above:
            return rows * self._token_ms
        if not below or not above:
            near = below or above
            return _median(self._streams_ms[near]) * rows / near
        low, high = (_median(self._streams_ms[known]) for known in (below, above))
        return low + (high - low) * (rows - below) / (above - below)


def _averaged(before_ms: float, measured_ms: float) -> float:
    keep = 0.5 ** (1 / HALF_LIFE_STEPS) if before_ms else 0.0
    return keep * before_ms + (1 - keep) * max(TOKEN_MS_MIN, measured_ms)


def _median(values: Collection[float]) -> float:
    """There is at least one; statistics.median takes three times as long, and each step asks."""
    ordered = sorted(values)
    middle = len(ordered) // 2
    if len(ordered) % 2:
        return ordered[middle]
    return (ordered[middle - 1] + ordered[middle]) / 2


def _size(rows: int) -> int:
    """`rows` with its ROWS_BITS leading bits alone: steps of sizes that differ less are alike."""
    shift = rows.bit_length() - ROWS_BITS
    return rows >> shift << shift if shift > 0 else rows
