"""How long one engine step of a worker takes: what the simulator runs on and calibration fits.

Invariant: a step's time is linear in what the step computes, with no negative coefficient, so more
work never takes less time. A step costs `step_ms` (launching, sampling, publishing), each prefill
token its share of the matrix products, each decoding row the same plus reading the KV of its
context, and prefill tokens the attention to what stands before them; a step of one single token
does without `batch_ms`, as products with one row go another, cheaper way. Rejected: a table of
measured steps, which says nothing between its points; a roofline, whose corner no worker that we
measured shows. The same shape: Vidur (Agrawal et al., MLSys 2024) fits such terms per operator.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, fields
from typing import Any

from headrace.errors import SettingsError

CONTEXT_UNIT_TOKENS = 1_000
"""`decode_context_ms` is per this many tokens of KV read."""
PREFILL_CONTEXT_UNIT = 1_000_000
"""`prefill_context_ms` is per this many pairs of a prefill token and a context token."""


@dataclass(frozen=True, slots=True)
class CostModel:
    """Milliseconds of one engine step, and the sizes of the worker that takes it.

    `decode_context_ms`: per 1,000 tokens of KV that decoding rows read. `prefill_context_ms`: per
    1,000 prefill tokens × 1,000 context tokens. `batch_ms`: once, in a step of several tokens.
    `kv_tokens` fit into the KV pool, `max_jobs` run at
    once, a step computes at most `step_tokens`. Raises SettingsError naming a bad field.
    """

    step_ms: float
    prefill_token_ms: float
    decode_row_ms: float
    decode_context_ms: float
    prefill_context_ms: float
    kv_tokens: int
    max_jobs: int
    step_tokens: int
    name: str
    batch_ms: float = 0.0

    def __post_init__(self) -> None:
        for field in ("step_ms", "prefill_token_ms", "decode_row_ms", "decode_context_ms",
                      "prefill_context_ms", "batch_ms"):  # fmt: skip
            value = getattr(self, field)
            if not (isinstance(value, int | float) and not isinstance(value, bool)):
                raise SettingsError(f"cost model: {field} has to be a number, not {value!r}")
            if not (math.isfinite(value) and value >= 0):
                raise SettingsError(f"cost model: {field} has to be 0 or more, not {value!r}")
        for field in ("kv_tokens", "max_jobs", "step_tokens"):
            value = getattr(self, field)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise SettingsError(f"cost model: {field} has to be a whole number, 1 or more")
        if not isinstance(self.name, str) or not self.name:
            raise SettingsError("cost model: name has to be a text")
        if self.step_ms + min(self.prefill_token_ms, self.decode_row_ms) <= 0:
            raise SettingsError("cost model: step_ms is 0 and so are the tokens: steps take time")
        if self.max_jobs > self.step_tokens:
            raise SettingsError("cost model: step_tokens has to give each of max_jobs its token")

    def step_duration_ms(
        self, prefill_tokens: int, decode_rows: int, decode_context: int, prefill_context: float
    ) -> float:
        """Milliseconds of a step of `decode_rows`, which read `decode_context` tokens of KV.

        `prefill_context` sums, over the step's prefill tokens, the tokens each attends to
        (`attended` says it for a chunk).
        """
        return (
            self.step_ms
            + (self.batch_ms if prefill_tokens + decode_rows > 1 else 0)
            + self.prefill_token_ms * prefill_tokens
            + self.decode_row_ms * decode_rows
            + self.decode_context_ms * decode_context / CONTEXT_UNIT_TOKENS
            + self.prefill_context_ms * prefill_context / PREFILL_CONTEXT_UNIT
        )

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2)

    @classmethod
    def from_json(cls, text: str) -> CostModel:
        """Raises SettingsError that names what is wrong."""
        try:
            facts: Any = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise SettingsError(f"cost model: not JSON: {error}") from error
        if not isinstance(facts, dict):
            raise SettingsError(f"cost model: expected an object, got {type(facts).__name__}")
        known = {field.name for field in fields(cls)}
        for field in sorted(known ^ facts.keys()):
            what = "is missing" if field in known else "is not one of its fields"
            raise SettingsError(f"cost model: {field} {what}")
        return cls(**facts)


def attended(start: int, count: int) -> float:
    """Pairs of token and context token in a prefill chunk of `count` tokens from `start`."""
    return count * start + count * (count + 1) / 2
