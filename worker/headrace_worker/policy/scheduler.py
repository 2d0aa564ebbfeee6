"""The scheduler: which tokens of which sequences the next step computes.

Invariant: there is no prefill or decode mode. Each step, under one token budget, computed tokens
catch up with known tokens: first the sequences that lack one (so that no stream stalls behind
somebody's prompt), then those whose output ran ahead a little (a grammar forced some tokens), then
larger gaps in chunks, in order of rank, as much as does not hold up those streams (policy/pace.py).
Guesses (policy/speculation.py) get what is left of the budget and of the blocks: nobody waits and
nothing is preempted for them.

One rank, `headrace.policy.priority`'s, orders batch, admission and preemption. Who takes part in a
step, and with how many tokens, is policy/turns.py's: lower bands do not lengthen the step that
computes a better band's prompt. Admission is strict: while the first in rank does not fit, nobody
behind it is let in; but who would compute a prefix that somebody is computing waits for it, so that
the n choices of a request compute their prompt once. It sets aside the blocks for all known tokens
of whoever runs, so only the growth of outputs can make blocks run out; then the lowest band gives
way, in it the one preempted least often, in that the one that loses least work. Every step either
computes tokens that stay or yields output, which preemption never takes back; so everything ends.

Rejected: reserving the whole possible output at admission, which leaves most of the pool idle;
swapping KV out on preemption, which the prefix cache mostly makes unnecessary.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from collections.abc import Sequence as Sequences
from dataclasses import replace
from types import MappingProxyType

from headrace.types import BLOCK_TOKENS, Band, FinishReason
from headrace_worker.policy import turns
from headrace_worker.policy.blocks import BlockPool
from headrace_worker.policy.pace import TOKENS_UNKNOWN, Pace
from headrace_worker.policy.plan import ITEMS_MAX, Draft, Outcome, Plan, PlanItem
from headrace_worker.policy.sequence import Sequence, Status, blocks_for

CALM_MS = 5_000


class Scheduler:
    """Sequences waiting and running over one pool. Holds no tensor, reads no clock."""

    def __init__(
        self,
        pool: BlockPool,
        *,
        running_max: int,
        step_tokens_max: int,
        calm_ms: int = CALM_MS,
        pace: Pace | None = None,
    ) -> None:
        """Lower bands' prompts are limited while a better band is here, or ran within `calm_ms`.

        `pace`: what the caller has measured, for the limit of prompts beside streams.
        """
        assert 0 < running_max <= step_tokens_max, "every running sequence needs a token a step"
        self.pool = pool
        self._running_max = running_max
        self._step_tokens_max = step_tokens_max
        self._calm_ms = calm_ms
        self._pace = pace or Pace()
        self._waiting: dict[str, Sequence] = {}
        self._running: dict[str, Sequence] = {}
        self._hurried_steps: dict[int, int] = {}
        self._ran_ms: dict[int, int] = {}

    @property
    def waiting(self) -> tuple[Sequence, ...]:
        return tuple(self._waiting.values())

    @property
    def running(self) -> tuple[Sequence, ...]:
        return tuple(self._running.values())

    def prompts_ahead(self) -> tuple[int, ...]:
        """Tokens of prompts that are here and not computed, by band."""
        ahead = [0] * len(Band)
        for sequence in (*self.running, *self.waiting):
            if sequence.lacks_prompt():
                ahead[sequence.band] += sequence.pending
        return tuple(ahead)

    def refuse(self, tokens: int) -> str | None:
        """Why a sequence that starts with `tokens` known tokens can never run; None if it can."""
        capacity = self.pool.total * BLOCK_TOKENS
        if tokens > capacity:
            return f"{tokens} tokens do not fit into this worker's KV cache of {capacity} tokens"
        return None

    def add(self, sequence: Sequence) -> None:
        assert self.refuse(sequence.known) is None, "refuse() comes before add()"
        assert sequence.tokens_max <= self.pool.total * BLOCK_TOKENS, "it could not finish alone"
        assert sequence.id not in self._waiting and sequence.id not in self._running, "added twice"
        self._waiting[sequence.id] = sequence

    def remove(self, sequence: Sequence) -> tuple[int, ...]:
        """Ends `sequence` now, whatever it is doing. Its full, computed blocks, head first."""
        self._waiting.pop(sequence.id, None)
        self._running.pop(sequence.id, None)
        full = tuple(sequence.blocks[: sequence.registered])
        self.pool.release(sequence.blocks, sequence.band)
        sequence.blocks, sequence.computed, sequence.registered = [], 0, 0
        sequence.become(Status.FINISHED)
        return full

    def schedule(
        self,
        now: int,
        guesses: Mapping[str, tuple[int, ...]] = MappingProxyType({}),
        *,
        lower_prefill_tokens: int = TOKENS_UNKNOWN,
        under_way: Collection[str] = (),
        leaving: Collection[str] = (),
        plans: int = 1,
    ) -> Plan:
        """The next step's plan; `now` in monotonic milliseconds. Allocates what it plans.

        `guesses` by sequence id, for sequences that lack one token. `lower_prefill_tokens`: how
        much of all prompts of lower bands may be computed while a better band is about.
        `plans`: how many are computed at a time, one behind the other; each takes its share of the
        sequences, so that all of them have some. `under_way`: sequences of plans that are not
        applied yet: they keep their blocks, and only more of their prompt can be planned.
        `leaving`: of those, who gets nothing more.
        """
        assert lower_prefill_tokens > 0, "lower bands get on as well"
        every = [*self._running.values(), *self._waiting.values()]
        here = [
            sequence
            for sequence in every
            if sequence.id not in under_way or (sequence.id not in leaving and _goes_on(sequence))
        ]
        guarded = turns.guarded_band(every, self._ran_ms, now, self._calm_ms)
        items_max = -(-len(every) // plans) if plans > 1 else ITEMS_MAX
        limit = self._step_tokens_max
        draft = Draft(now, limit, guarded, lower_prefill_tokens, under_way, items_max)
        hurried_for = self._plan_groups(draft, turns.groups(here, now, self._hurried_steps))
        if hurried_for is None:
            self._hurried_steps.clear()
        else:
            self._hurried_steps[hurried_for] = self._hurried_steps.get(hurried_for, 0) + 1
        for sequence in here:
            self._note_step(sequence, sequence.id in draft.items, now)
            if guesses.get(sequence.id) and sequence.id in draft.items:
                self._guess(draft, sequence, guesses[sequence.id])
        if plans > 1:
            for item in draft.items.values():  # the next plan goes on behind this one
                item.sequence.computed = item.start + item.count
        return Plan(
            tuple(draft.items.values()),
            tuple(draft.admitted.values()),
            tuple(draft.preempted.values()),
            self.pool.take_evicted(),
            hurried_for is not None,
        )

    def late(self, now: int) -> list[Sequence]:
        """Those whose deadline has passed; the caller ends them before it plans a step."""
        here = (*self._running.values(), *self._waiting.values())
        return [sequence for sequence in here if sequence.is_late(now)]

    def apply(self, plan: Plan, drawn: Sequences[Sequences[int]]) -> list[Outcome]:
        """Takes in what the step computed.

        `drawn[i]` are the tokens chosen for item i: one for its last known token and one for each
        guessed one, or fewer where a choice was not possible; none if it does not sample.
        """
        outcomes: list[Outcome] = []
        for item, tokens in zip(plan.items, drawn, strict=True):
            sequence = item.sequence
            if sequence.status is not Status.RUNNING:
                continue  # it was failed for what the run said of it
            assert item.samples == bool(tokens), "a token for each item that samples"
            reached = item.start + item.count
            sequence.computed = max(sequence.computed, reached)  # more may be under way
            sequence.scored = max(sequence.scored, min(reached, sequence.scoring))
            said, ending = self._say(item, tokens)
            self._register(sequence, sequence.computed if tokens else reached)
            if said or ending is not None:
                full = self.remove(sequence) if ending else ()
                outcomes.append(Outcome(sequence, said, ending, full))
        return outcomes

    def extend(self, sequence: Sequence, token: int) -> FinishReason | None:
        """Adds output that needed no choice; why the sequence is complete, if it is.

        Then the caller ends it.
        """
        sequence.tokens.append(token)
        return sequence.ending()

    def check_integrity(self) -> None:
        self.pool.check_integrity([s.blocks for s in self._running.values()])
        assert not self._running.keys() & self._waiting.keys(), "both waiting and running"
        for sequence in self._running.values():
            assert sequence.status is Status.RUNNING, "a running sequence says so"
            sequence.check_integrity()
        for sequence in self._waiting.values():
            assert sequence.status in (Status.WAITING, Status.PREEMPTED), "a waiting one says so"
            sequence.check_integrity()

    def _plan_groups(self, draft: Draft, groups: Sequences[Sequences[Sequence]]) -> int | None:
        """Plans group after group; the effective band for which others were left out, if any."""
        now = draft.now
        for place, group in enumerate(groups, 1):
            running = turns.streams(group, now)
            for sequence in running:
                if draft.room(sequence) and sequence.status is Status.RUNNING:
                    self._extend(draft, sequence)
            prompts = self._plan_prompts(draft, group)
            if place < len(groups) and (prompts or not draft.budget):
                return group[0].effective_band(now)
            still = [s for s in running if s.status is Status.RUNNING and s.pending == 1]
            if not draft.budget and any(sequence.id not in draft.items for sequence in still):
                return groups[0][0].effective_band(now)  # its catching up took the budget
        return None

    def _plan_prompts(self, draft: Draft, group: Sequences[Sequence]) -> bool:
        """Plans chunks of what lacks more than a token, and lets in who waits; whether any."""
        planned = len(draft.items)
        here = min(self._running_max, len(self._running) + len(self._waiting))
        draft.beside_left = self._pace.tokens_beside(planned, here)
        for sequence in turns.ranked((s for s in group if s.id not in draft.items), draft.now):
            if not draft.room(sequence):
                continue
            if sequence.status is Status.RUNNING:
                self._extend(draft, sequence)
            elif not draft.blocked and not self._awaits_prefix(sequence, draft.now):
                # one preempted a moment ago waits for the next step, or the two would trade places
                preempted = sequence.id in draft.preempted
                draft.blocked = preempted or not self._admit(draft, sequence)
        return len(draft.items) > planned

    def _note_step(self, sequence: Sequence, computed: bool, now: int) -> None:
        sequence.note_step(computed, now)
        if computed:
            self._ran_ms[sequence.band] = now

    @staticmethod
    def _say(item: PlanItem, drawn: Sequences[int]) -> tuple[tuple[int, ...], FinishReason | None]:
        """Adds those of `drawn` that stand: up to the first that had been guessed differently."""
        sequence = item.sequence
        if not drawn:
            finished = item.start + item.count == sequence.known
            return (), sequence.ending() if finished else None
        for place, token in enumerate(drawn):
            sequence.tokens.append(token)
            ending = sequence.ending()
            if ending or item.guess[place : place + 1] != (token,):
                break
        sequence.computed += place  # the guesses before this token were right and have KV
        return tuple(drawn[: place + 1]), ending

    def _register(self, sequence: Sequence, reached: int) -> None:
        """Its first `reached` tokens have KV that others may use."""
        full = reached // BLOCK_TOKENS
        for index in range(sequence.registered, full):
            self.pool.register(
                sequence.blocks[index],
                sequence.block_hash(index),
                sequence.parent_hash(index),
                index,
                sequence.band,
                sequence.tenant,
            )
        sequence.registered = full

    def _extend(self, draft: Draft, sequence: Sequence) -> None:
        """Plans as much of a running sequence as budget and blocks allow, at least one token."""
        wanted = min(sequence.pending, draft.room(sequence))
        assert wanted > 0, "a sequence is planned while the step has room for it"
        while True:
            room = (len(sequence.blocks) + self.pool.free_count) * BLOCK_TOKENS - sequence.computed
            count = min(wanted, room)
            if count > 0:
                self._give(sequence, count)
                draft.add(sequence, count)
                return
            victim = self._victim(draft)
            if victim is None:
                return  # until something that is under way lands
            self._preempt(draft, victim)
            if victim is sequence:
                return

    def _guess(self, draft: Draft, sequence: Sequence, guess: tuple[int, ...]) -> None:
        """Adds to the sequence's item as much of `guess` as costs nobody anything."""
        item = draft.items[sequence.id]
        spare = self.pool.free_count - sum(self._reserved(s) for s in self._running.values())
        room = (len(sequence.blocks) + max(0, spare)) * BLOCK_TOKENS - item.start - item.count
        length = min(draft.budget, room, sequence.tokens_max - sequence.known - 1)
        if item.samples and item.count == 1 and length > 0:
            guess = guess[:length]
            self._give(sequence, item.count + len(guess))
            draft.items[sequence.id] = replace(item, guess=guess)
            draft.budget -= len(guess)

    def _give(self, sequence: Sequence, count: int) -> None:
        missing = blocks_for(sequence.computed + count) - len(sequence.blocks)
        if missing > 0:
            sequence.blocks.extend(self.pool.allocate(missing))

    def _awaits_prefix(self, sequence: Sequence, now: int) -> bool:
        """Whether somebody is computing right now what `sequence` would compute first.

        Somebody of a lower band is not waited for: others may go before it.
        """
        band = sequence.effective_band(now)
        hashes = sequence.reusable_hashes()
        index = len(self.pool.match_prefix(hashes))
        return index < len(hashes) and any(
            s.effective_band(now) <= band
            and s.registered <= index < s.known // BLOCK_TOKENS
            and s.block_hash(index) == hashes[index]
            for s in self._running.values()
        )

    def _admit(self, draft: Draft, sequence: Sequence) -> bool:
        """Starts a waiting sequence if it fits, at the cost of lower bands where that helps."""
        found = self.pool.match_prefix(sequence.reusable_hashes())
        if not self._make_room(draft, sequence, found):
            return False
        self.pool.acquire(found)
        sequence.blocks = list(found)
        sequence.computed = len(found) * BLOCK_TOKENS
        sequence.registered = len(found)
        if sequence.cached_blocks is None:
            sequence.cached_blocks = tuple(found)
        del self._waiting[sequence.id]
        self._running[sequence.id] = sequence
        sequence.become(Status.RUNNING)
        count = min(sequence.pending, draft.room(sequence))
        self._give(sequence, count)
        draft.admitted[sequence.id] = sequence
        draft.add(sequence, count)
        return True

    def _make_room(self, draft: Draft, sequence: Sequence, found: list[int]) -> bool:
        """Whether all known tokens of `sequence` fit, after preempting lower bands if they must."""
        lacking = self._lacking(sequence, found)
        full = len(self._running) >= self._running_max
        if lacking <= 0 and not full:
            return True
        now = draft.now
        band = sequence.effective_band(now)
        lower = [
            s
            for s in self._running.values()
            if s.effective_band(now) > band and s.id not in draft.under_way
        ]
        # what was found is not gained by taking it from somebody else
        gain = sum(
            self.pool.freed_by(set(s.blocks) - set(found)) + self._reserved(s) for s in lower
        )
        if not lower or gain < lacking:
            return False
        for victim in sorted(lower, key=lambda s: self._expendable(s, now), reverse=True):
            self._preempt(draft, victim)
            if self._lacking(sequence, found) <= 0:
                return True
        return False

    def _lacking(self, sequence: Sequence, found: list[int]) -> int:
        """Blocks missing for all known tokens, those set aside for who runs not counted."""
        reserved = sum(self._reserved(s) for s in self._running.values())
        spare = self.pool.free_count - self.pool.unreferenced(found) - reserved
        return blocks_for(sequence.known) - len(found) - spare

    def _reserved(self, sequence: Sequence) -> int:
        return max(0, blocks_for(sequence.known) - len(sequence.blocks))

    def _expendable(self, sequence: Sequence, now: int) -> turns.Expendable:
        """The victim score. What others hold as well is not lost, nor is what is not computed."""
        shared = len(sequence.blocks) - self.pool.freed_by(sequence.blocks)
        lost_tokens = max(0, sequence.computed - shared * BLOCK_TOKENS)
        return turns.expendable(sequence, lost_tokens, now)

    def _victim(self, draft: Draft) -> Sequence | None:
        """Who gives way first; None where all that run are under way."""
        running = [s for s in self._running.values() if s.id not in draft.under_way]
        return max(running, key=lambda s: self._expendable(s, draft.now), default=None)

    def _preempt(self, draft: Draft, sequence: Sequence) -> None:
        del self._running[sequence.id]
        self.pool.release(sequence.blocks, sequence.band)
        sequence.blocks, sequence.computed, sequence.registered = [], 0, 0
        sequence.preemptions += 1
        sequence.become(Status.PREEMPTED)
        self._waiting[sequence.id] = sequence
        draft.drop(sequence)


def _goes_on(sequence: Sequence) -> bool:
    """Whether more of a sequence can be computed behind what is under way of it.

    The rest of a prompt can: it does not depend on what comes of the part before. But rows that are
    scored may end the sequence, which has to wait until nothing of it is under way.
    """
    return sequence.pending > 0 and sequence.scored == sequence.scoring
