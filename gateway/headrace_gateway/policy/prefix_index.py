"""Which worker's KV pool holds which blocks, as far as the dispatcher knows.

Invariant: the index is a hint. It follows the workers' reports (`stored`, `removed`, snapshots),
and what was dispatched counts as held until the reports come (expectations.py). A block's key is
part of its chained hash, so it names the whole prefix that ends there; a worker counts for a block
only if it holds those before it, because a hole has to be computed with all that follows.

One table maps a key to the bit set of the workers that hold it, one per worker its keys in order of
age. Both hold the same pairs. Bounded per worker and in total: past a bound a worker's oldest
eighth is forgotten, which costs a missed hit.

A look-up of a random key costs a cache miss, half a microsecond in a large table, so a long prompt
is not walked. Pools evict tails before heads, so along a prompt holders only get fewer: beyond the
first WALKED blocks the places where they do are found by bisection. A hole that it does not
hit counts as held, which costs some prefill. Rejected: a radix tree over tokens, which says what
chained hashes say and needs its nodes split.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from itertools import islice

from headrace.types import BLOCK_KEY_BYTES
from headrace_gateway.policy.expectations import (
    Expectations,
    Holders,
    Prompt,
    first_less,
    prompt_of,
)

WORKER_BLOCKS_MAX = 262_144
"""Of a worker whose size nobody told; 4 million tokens."""
TOTAL_BLOCKS_MAX = 1_048_576
"""Pairs of worker and block; about 150 bytes each."""
WALKED = 16
NAMED_MAX = 2_048
"""Sets of slots whose workers' names are kept at hand: the holders of a hot prefix stay the same
for many decisions."""


class PrefixIndex:
    """Blocks by worker, and workers by block."""

    def __init__(self, total_max: int = TOTAL_BLOCKS_MAX) -> None:
        self._total_max = total_max
        self._slots: dict[str, int] = {}
        self._names: dict[int, str] = {}
        self._named: dict[int, list[str]] = {}
        self._retired: deque[tuple[int, int]] = deque()
        self.bits: dict[str, int] = {}
        """The bit of each worker in Holders, for who asks for many; not to be changed."""
        self._live = 0
        self._held: dict[str, dict[int, None]] = {}
        self._limits: dict[str, int] = {}
        self._holders: dict[int, int] = {}
        self._expected = Expectations()
        self._count = 0
        self._last = (b"", prompt_of((0,)))
        """The blocks that were looked at last: who gets them is to hold them next."""

    def __len__(self) -> int:
        """Pairs of worker and block."""
        return self._count

    def limit(self, worker: str, blocks: int) -> None:
        """`worker` can hold no more than `blocks` blocks; a tenth more are kept."""
        self._limits[worker] = blocks + blocks // 10 + 1
        if worker in self._held:
            self._trim(worker)

    def stored(self, worker: str, keys: bytes) -> None:
        """Blocks came into `worker`'s pool."""
        if not keys:
            return
        held, bit = self._of(worker)
        holders = self._holders
        before = len(held)
        for key in _split(keys):
            held[key] = None
            others = holders.get(key)
            holders[key] = others | bit if others else bit
        self._count += len(held) - before
        self._trim(worker)

    def removed(self, worker: str, keys: bytes) -> None:
        """Blocks left `worker`'s pool."""
        if keys and worker in self._held:
            gone = _split(keys)
            self._expected.remove(self.bits[worker], gone)
            self._drop(worker, gone)

    def replace(self, worker: str, keys: bytes) -> None:
        """`worker` holds these blocks, and none but those it is expected to."""
        present = dict.fromkeys(_split(keys))
        held, _ = self._of(worker)
        self._drop(worker, [key for key in held if key not in present])
        self.stored(worker, keys)

    def expect(self, worker: str, keys: bytes, now_ms: int) -> None:
        """A prompt of these blocks was sent to `worker`: it will hold them."""
        if keys:
            bit = self.bits.get(worker) or self._of(worker)[1]
            self._expected.add(bit, self._prompt(keys), now_ms)

    def forget_worker(self, worker: str) -> None:
        """`worker` is gone, and its blocks with it."""
        self._limits.pop(worker, None)
        held = self._held.get(worker)
        if held is None:
            return
        self._drop(worker, list(held))
        self._live ^= self.bits.pop(worker)
        del self._held[worker]
        slot = self._slots.pop(worker)
        del self._names[slot]
        self._named.clear()
        # expectations may still name it: it is used again when these have ended
        self._retired.append((self._expected.generation + 2, slot))

    def expire(self, now_ms: int) -> None:
        """Forget what was expected and did not come in time."""
        self._expected.expire(now_ms)

    def match(self, keys: bytes) -> dict[str, int]:
        """Leading blocks of the prompt that each worker holds, for those that hold any."""
        return {
            self._names[slot]: found.blocks
            for found in self.leaders(keys)
            for slot in _slots_of(found.slots)
        }

    def leaders(self, keys: bytes) -> list[Holders]:
        """The workers that hold leading blocks, by how many: most first, each worker once."""
        if not keys:
            return []
        prompt = self._prompt(keys)
        expected = self._expected.leaders(prompt, self._live)
        alive = self._holders.get(prompt.marks[0], 0)
        if not alive:
            return expected
        held = self._stored(prompt.keys, alive)
        return _merged(held, expected) if expected else held

    def _prompt(self, blocks: bytes) -> Prompt:
        known, prompt = self._last
        if known is not blocks:
            prompt = prompt_of(memoryview(blocks).cast("Q"))
            self._last = blocks, prompt
        return prompt

    def _stored(self, view: Sequence[int], alive: int) -> list[Holders]:
        """`leaders` by what was reported; `alive` hold the first block."""
        found: list[Holders] = []
        get, total, place = self._holders.get, len(view), 1
        while place < total:
            both = alive & get(view[place], 0)
            if both != alive:
                found.append(Holders(place, alive ^ both))
                alive = both
                if not alive:
                    break
            place += 1
            if place >= WALKED:
                place += first_less(get, view, range(place, total), alive)
        else:
            found.append(Holders(total, alive))
        found.reverse()
        return found

    def among(self, workers: Iterable[str], slots: int, limit: int) -> list[str]:
        """The first `limit` of `workers` that are in a set of slots."""
        get_bit, found = self.bits.get, []
        for worker in workers:
            if slots & get_bit(worker, 0):
                found.append(worker)
                if len(found) == limit:
                    break
        return found

    def names(self, slots: int, limit: int) -> list[str] | None:
        """The workers of a set of slots, not to be changed; None if they are more than `limit`."""
        if slots.bit_count() > limit:
            return None
        named = self._named.get(slots)
        if named is None:
            if len(self._named) >= NAMED_MAX:
                self._named.clear()
            named = self._named[slots] = [self._names[slot] for slot in _slots_of(slots)]
        return named

    def check_integrity(self) -> None:
        assert self._count == sum(map(len, self._held.values())), "pairs add up"
        assert self._count <= self._total_max, "the total is bounded"
        assert self._slots == {name: slot for slot, name in self._names.items()}
        assert self.bits == {name: 1 << slot for name, slot in self._slots.items()}
        for holders, named in self._named.items():
            assert named == [self._names[slot] for slot in _slots_of(holders)], "names are true"
        assert self._slots.keys() == self._held.keys(), "a worker has a slot and a table"
        seen: dict[int, int] = {}
        for worker, held in self._held.items():
            bit = self.bits[worker]
            for key in held:
                seen[key] = seen.get(key, 0) | bit
        assert seen == self._holders, "both tables hold the same pairs"
        for worker, held in self._held.items():
            assert len(held) <= self._cap(worker), "a worker's blocks are bounded"
        assert self._live == sum(self.bits.values())
        slots = [*self._names, *(slot for _, slot in self._retired)]
        assert sorted(slots) == list(range(len(slots))), "a slot is used or retired"
        self._expected.check_integrity()

    def _of(self, worker: str) -> tuple[dict[int, None], int]:
        """A worker's own table and its bit; it gets a slot if it has none."""
        if worker not in self._held:
            slot = len(self._slots) + len(self._retired)
            if self._retired and self._retired[0][0] <= self._expected.generation:
                slot = self._retired.popleft()[1]
            self._slots[worker] = slot
            self._names[slot] = worker
            self._named.clear()
            self.bits[worker] = 1 << slot
            self._live |= 1 << slot
            self._held[worker] = {}
            # everybody's part of the total has become smaller
            for each in self._held:
                self._trim(each)
        return self._held[worker], self.bits[worker]

    def _cap(self, worker: str) -> int:
        share = self._total_max // len(self._held)
        return max(1, min(self._limits.get(worker, WORKER_BLOCKS_MAX), share))

    def _trim(self, worker: str) -> None:
        held, cap = self._held[worker], self._cap(worker)
        if len(held) > cap:
            # an eighth at once: finding the oldest of a dict costs time when they go one by one
            self._drop(worker, list(islice(held, len(held) - cap + cap // 8)))

    def _drop(self, worker: str, keys: list[int]) -> None:
        held, holders = self._held[worker], self._holders
        bit = self.bits[worker]
        for key in keys:
            if key not in held:
                continue
            del held[key]
            self._count -= 1
            slots = holders[key] ^ bit
            if slots:
                holders[key] = slots
            else:
                del holders[key]


def _split(keys: bytes) -> list[int]:
    """Block keys as integers; which ones does not matter, as long as equal ones stay equal."""
    assert len(keys) % BLOCK_KEY_BYTES == 0, "whole keys"
    return memoryview(keys).cast("Q").tolist() if keys else []


def _merged(one: list[Holders], other: list[Holders]) -> list[Holders]:
    """Each worker where it has most."""
    found: list[Holders] = []
    seen = 0
    for each in sorted((*one, *other), key=_blocks, reverse=True):
        fresh = each.slots & ~seen
        seen |= fresh
        if not fresh:
            continue
        if found and found[-1].blocks == each.blocks:
            fresh |= found.pop().slots
        found.append(Holders(each.blocks, fresh))
    return found


def _blocks(holders: Holders) -> int:
    return holders.blocks


def _slots_of(slots: int) -> list[int]:
    """The bits of a set, lowest first."""
    found = []
    while slots:
        low = slots & -slots
        found.append(low.bit_length() - 1)
        slots ^= low
    return found
