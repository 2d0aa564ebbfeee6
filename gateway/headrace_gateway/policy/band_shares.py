"""Guaranteed minimum shares: when a lower band may go before a higher one.

Invariant: for every token of work handed out while a band waits, the band earns its share of a
token, and it may go before a higher band once it has earned its next job. So from any instant on at
which it waits it has had at least share * (all work since) less one job; and what it took ahead of
higher bands is what it had earned, so no more than one job at a time is in their way. Nothing is
earned while nothing waits, and what was earned and not used is gone when the band's last job
leaves. What a band gets in strict order uses up what it has earned, but never makes a debt.
Work is measured as expected at the hand-off and put right when the job's end is known.
Rejected: weighted fair queueing between bands, which would let batch delay interactive jobs in
proportion even where its minimum is met; and aging by time alone, which guarantees no rate.
"""

from __future__ import annotations

from collections.abc import Sequence

from headrace.types import Band

EARNED_TOKENS_MAX = 65_536
"""The most that a waiting band is owed; more would pile up only while its jobs find no room."""


class BandShares:
    """What each band has earned, in work tokens. Negative: it has had more than it had earned."""

    def __init__(self, shares: tuple[float, float, float]) -> None:
        """Raises ValueError if shares are negative or promise more than everything."""
        if min(shares) < 0 or sum(shares) > 1:
            raise ValueError(f"shares of bands are at least 0 and at most 1 in all: {shares}")
        self.shares = shares
        self.earned = [0.0 for _ in Band]
        self._earning = [(band, share) for band, share in enumerate(shares) if share]
        """Who has no share never has more than nothing."""

    def is_due(self, band: int, work: int) -> bool:
        """Whether `band`, whose next job takes `work` tokens, may go before the bands above it."""
        earned = self.earned[band]
        if earned < 0 or not self.shares[band]:
            return False
        return earned >= min(work, EARNED_TOKENS_MAX)

    def taken(self, band: int, work: int, waits: Sequence[int]) -> bool:
        """A job of `band` was handed off. `waits`: how many waited in each band, with itself.

        Says whether it went ahead of a higher band.
        """
        self._earn(work, waits)
        ahead = any(waits[:band])
        earned = self.earned[band]
        if ahead:
            self.earned[band] = earned - work
        elif earned > 0:
            self.earned[band] = earned - work if work < earned else 0.0
        return ahead

    def corrected(self, band: int, work: int, waits: Sequence[int], ahead: bool) -> None:
        """A job of `band` took `work` tokens more than `taken` was told; `ahead` as it said."""
        if ahead:
            self.earned[band] -= work
        self._earn(work, waits)

    def idle(self, band: int) -> None:
        """`band` waits no more: what it has not used is gone, what it owes stays."""
        self.earned[band] = min(0.0, self.earned[band])

    def check_integrity(self, waits: Sequence[int]) -> None:
        """Assert that idle bands have saved nothing and that no band is owed too much."""
        for band, earned in enumerate(self.earned):
            assert earned <= (EARNED_TOKENS_MAX if waits[band] else 0), f"band {band}: {earned}"

    def _earn(self, work: int, waits: Sequence[int]) -> None:
        earned = self.earned
        for band, share in self._earning:
            more, most = earned[band] + share * work, EARNED_TOKENS_MAX if waits[band] else 0.0
            earned[band] = more if more < most else most
