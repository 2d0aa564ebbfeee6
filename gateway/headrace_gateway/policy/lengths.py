"""How long outputs get, how much of a prompt is cached, how fast tokens come: learned, not asked.

Invariant: what a client asks for (`max_tokens`) only bounds a prediction, it never is one: nobody
gains or loses by asking for more than they use. Everything is a sliding window over finished
generations, per tenant and over all, and bounded. Rejected: a mean, which underestimates as often
as it overestimates, where too little is paid for by preemption and too much by an idle slot.
Source: Past-Future scheduling (Gong et al., ASPLOS 2025, arXiv 2507.10150): lengths are drawn from
the recent history, and for what already runs from the part of it that is longer.
"""

from __future__ import annotations

import math
from bisect import bisect_right, insort
from collections import OrderedDict, deque
from dataclasses import dataclass, field
from statistics import median

from headrace.types import BLOCK_TOKENS, EXPECTED_OUTPUT_TOKENS

TENANT_WINDOW = 128
TOTAL_WINDOW = 1_024
PACE_WINDOW = 64
SAMPLES_MIN = 8
"""Fewer than these say nothing."""
TENANTS_MAX = 1_024
"""Tenants remembered; the one not heard of for longest goes."""
QUANTILE = 0.8
"""Four of five outputs are at most as long as predicted."""


class _Window:
    """The last `size` lengths, in the order of arrival and sorted; O(log n) and a short move."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._arrived: deque[int] = deque()
        self._sorted: list[int] = []

    def __len__(self) -> int:
        return len(self._arrived)

    def push(self, value: int) -> None:
        if len(self._arrived) == self._size:
            oldest = self._arrived.popleft()
            del self._sorted[bisect_right(self._sorted, oldest) - 1]
        self._arrived.append(value)
        insort(self._sorted, value)

    def upper(self, longer_than: int) -> int | None:
        """The QUANTILE of the values above `longer_than`; None where too few are."""
        first = bisect_right(self._sorted, longer_than)
        count = len(self._sorted) - first
        if count < SAMPLES_MIN:
            return None
        return self._sorted[first + math.ceil(QUANTILE * count) - 1]

    def check_integrity(self) -> None:
        assert sorted(self._arrived) == self._sorted, "both orders hold the same values"
        assert len(self._arrived) <= self._size


@dataclass(slots=True)
class _Tenant:
    outputs: _Window = field(default_factory=lambda: _Window(TENANT_WINDOW))
    prompts: deque[tuple[int, int]] = field(default_factory=deque)
    prompt_tokens: int = 0
    cached_tokens: int = 0

    def note_prompt(self, tokens: int, cached: int) -> None:
        self.prompts.append((tokens, cached))
        self.prompt_tokens += tokens
        self.cached_tokens += cached
        if len(self.prompts) > TENANT_WINDOW:
            tokens, cached = self.prompts.popleft()
            self.prompt_tokens -= tokens
            self.cached_tokens -= cached


class Lengths:
    """What one model's finished generations tell of the next ones."""

    def __init__(self, tenants_max: int = TENANTS_MAX) -> None:
        self._tenants_max = tenants_max
        self._tenants: OrderedDict[str, _Tenant] = OrderedDict()
        self._all = _Window(TOTAL_WINDOW)
        self._paces: deque[float] = deque(maxlen=PACE_WINDOW)

    def note(self, tenant: str, output_tokens: int, prompt_tokens: int, cached_tokens: int) -> None:
        """A generation came to its own end, with `cached_tokens` of its prompt not computed."""
        tenants = self._tenants
        known = tenants.get(tenant)
        if known is None:
            known = tenants[tenant] = _Tenant()
            if len(tenants) > self._tenants_max:
                tenants.popitem(last=False)
        else:
            tenants.move_to_end(tenant)
        known.outputs.push(output_tokens)
        known.note_prompt(prompt_tokens, min(cached_tokens, prompt_tokens))
        self._all.push(output_tokens)

    def note_pace(self, token_ms: float) -> None:
        """A generation's tokens came `token_ms` apart."""
        self._paces.append(token_ms)

    def expect(self, tenant: str, max_tokens: int, longer_than: int = 0) -> int:
        """Output tokens of a generation of `tenant` that has `longer_than` and may have more.

        Beyond everything seen, what runs is expected to get twice as long as it is.
        """
        known = self._tenants.get(tenant)
        found = None if known is None else known.outputs.upper(longer_than)
        if found is None:
            found = self._all.upper(longer_than)
        if found is None:
            found = max(EXPECTED_OUTPUT_TOKENS, 2 * longer_than)
        return min(max_tokens, max(found, longer_than + 1))

    def hit_ratio(self, tenant: str) -> float:
        """The part of this tenant's prompt tokens that came from a cache; 0 while unknown.

        Caches are apart by tenant, so that nobody else's hits say anything.
        """
        known = self._tenants.get(tenant)
        if known is None or not known.prompt_tokens:
            return 0.0
        return known.cached_tokens / known.prompt_tokens

    def expect_cached(self, tenant: str, prompt_tokens: int, held_tokens: int = 0) -> int:
        """Tokens of a prompt that need not be computed: whole blocks, and never all of them.

        `held_tokens`: what the cache services are known to spare of this very prompt. What the
        workers hold is not known here, so the tenant's history counts where it promises more.
        """
        likely = max(held_tokens, int(self.hit_ratio(tenant) * prompt_tokens))
        return max(0, min(likely, prompt_tokens - 1)) // BLOCK_TOKENS * BLOCK_TOKENS

    @property
    def token_ms(self) -> float:
        """Between two tokens of one stream: the median of late, 0 while unknown."""
        return median(self._paces) if self._paces else 0.0

    def check_integrity(self) -> None:
        """Windows and sums say the same. Raises AssertionError."""
        assert len(self._tenants) <= self._tenants_max
        self._all.check_integrity()
        for known in self._tenants.values():
            known.outputs.check_integrity()
            assert len(known.outputs) == len(known.prompts)
            assert known.prompt_tokens == sum(tokens for tokens, _ in known.prompts)
            assert known.cached_tokens == sum(cached for _, cached in known.prompts)
            assert 0 <= known.cached_tokens <= known.prompt_tokens
