"""Whose turn it is in a step: what keeps the best band's time to first token under overload.

A new prompt waits for the step that runs and then for its own. So, while a better band has been
about lately, the others' prompts are computed in small chunks, which keeps every step short; and a
better band's prompt is computed in a step of its own, without the streams and prompts of lower
bands: a hurried step. With one band alone neither rule applies, and steps are as full as they can.

Invariant: between two steps that leave nobody out, at most HURRIED_STEPS_MAX are hurried for each
band. So a stream is left out for at most HURRIED_STEPS_MAX steps in a row for each band that is
better than its own, as long as it keeps its KV: 3 for a standard one, 6 for batch. The bands have
separate allowances, so that standard prompts do not use up what an interactive one will need.
Rejected: leaving out streams until no prompt is there, which under
sustained overload is never; a smaller step for all, which costs throughput where nobody hurries.
The chunks are those of Agrawal et al., "Taming Throughput-Latency Tradeoff in LLM Inference with
Sarathi-Serve" (OSDI 2024), with the limit on those who can wait.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from headrace.policy.priority import Rank
from headrace.types import Band
from headrace_worker.policy.sequence import Sequence, Status

HURRIED_STEPS_MAX = 3


def groups(
    sequences: Iterable[Sequence], now: int, hurried_steps: Mapping[int, int]
) -> list[list[Sequence]]:
    """Who is planned together: each effective band for itself, the best first.

    `hurried_steps`: how many there were for each band since a step left nobody out. One that
    has used up its allowance goes together with all behind it.
    """
    bands: dict[int, list[Sequence]] = {}
    for sequence in sequences:
        bands.setdefault(sequence.effective_band(now), []).append(sequence)
    together: list[list[Sequence]] = []
    spent = False
    for band in sorted(bands):
        if spent:
            together[-1] += bands[band]
        else:
            together.append(bands[band])
        spent = spent or hurried_steps.get(band, 0) >= HURRIED_STEPS_MAX
    return together


def guarded_band(
    here: Iterable[Sequence], ran_ms: Mapping[int, int], now: int, calm_ms: int
) -> int:
    """The best band that is here or ran (`ran_ms`: when, by band) within the last `calm_ms`.

    Prompts of worse bands are limited. It is the jobs' own band that counts: age earns a place in
    the order, not the right to a long step.
    """
    bands = [int(sequence.band) for sequence in here]
    bands += [band for band, ran in ran_ms.items() if now - ran < calm_ms]
    return min(bands, default=int(Band.BATCH))


def streams(group: Iterable[Sequence], now: int) -> list[Sequence]:
    """The running ones that go before prompts, by rank.

    First those that lack one token, so that no stream stalls behind somebody's prompt, then those
    whose output ran ahead a little.
    """
    running = [sequence for sequence in group if sequence.status is Status.RUNNING]
    lacking_one = [sequence for sequence in running if sequence.pending == 1]
    ahead = [sequence for sequence in running if sequence.runs_ahead()]
    return [*ranked(lacking_one, now), *ranked(ahead, now)]


def ranked(sequences: Iterable[Sequence], now: int) -> list[Sequence]:
    """The first to go first."""
    return sorted(sequences, key=lambda sequence: sequence.rank(now))


Expendable = tuple[int, int, int, tuple[Rank, int]]


def expendable(sequence: Sequence, lost_tokens: int, now: int) -> Expendable:
    """The victim score: the highest gives way first.

    The worst effective band; in it the one preempted least often, or two would push each other out
    for ever; then who loses least computed work; then the worst rank.
    """
    return (
        sequence.effective_band(now),
        -sequence.preemptions,
        -lost_tokens,
        sequence.rank(now),
    )
