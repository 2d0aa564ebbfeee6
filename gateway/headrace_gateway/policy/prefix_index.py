"""Which worker's KV pool holds which blocks, as far as the dispatcher knows.

Invariant: the index is a hint. It follows the workers' reports (`stored`, `removed`, snapshots) and
runs ahead of them by what was dispatched (`expect`), which is believed for TTL_MS only. A block's
key is part of its chained hash, so it names the whole prefix that ends there; a worker counts for
a block only if it holds all before it, because a hole has to be computed with all that follows.

One table maps a key to the bit set of the workers that hold it, one per worker maps its keys, in
order of age, to CONFIRMED or the instant at which an expectation ends. Both hold the same pairs.
Bounded per worker and in total: past a bound a worker's oldest eighth is forgotten, which costs a
missed hit. Rejected: a radix tree over tokens, which says what chained hashes say and needs its
nodes split; trusting dispatches alone, which believes in blocks that were evicted long ago.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from itertools import islice, repeat

from headrace.types import BLOCK_KEY_BYTES

TTL_MS = 30_000
"""How long a dispatched prompt counts as held by its worker without being reported."""
WORKER_BLOCKS_MAX = 262_144
"""Of a worker whose size nobody told; 4 million tokens."""
TOTAL_BLOCKS_MAX = 1_048_576
"""Pairs of worker and block; about 150 bytes each."""
CONFIRMED = 0


@dataclass(frozen=True, slots=True)
class Holders:
    """The workers, as a bit set of slots, that hold exactly `blocks` leading blocks of a prompt."""

    blocks: int
    slots: int


class PrefixIndex:
    """Blocks by worker, and workers by block."""

    def __init__(self, ttl_ms: int = TTL_MS, total_max: int = TOTAL_BLOCKS_MAX) -> None:
        self._ttl_ms = ttl_ms
        self._total_max = total_max
        self._slots: dict[str, int] = {}
        self._names: dict[int, str] = {}
        self._free: list[int] = []
        self._bits: dict[str, int] = {}
        self._held: dict[str, dict[int, int]] = {}
        self._limits: dict[str, int] = {}
        self._holders: dict[int, int] = {}
        self._expected: deque[tuple[int, str, list[int]]] = deque()
        self._pending = 0
        self._count = 0

    def __len__(self) -> int:
        """Pairs of worker and block."""
        return self._count

    def limit(self, worker: str, blocks: int) -> None:
        """`worker` can hold no more than `blocks` blocks; a tenth more are kept."""
        self._limits[worker] = blocks + blocks // 10 + 1

    def stored(self, worker: str, keys: bytes) -> None:
        """Blocks came into `worker`'s pool."""
        if not keys:
            return
        held, bit = self._of(worker)
        holders = self._holders
        for key in _split(keys):
            if key not in held:
                others = holders.get(key)
                holders[key] = others | bit if others else bit
                self._count += 1
            held[key] = CONFIRMED
        self._trim(worker)

    def removed(self, worker: str, keys: bytes) -> None:
        """Blocks left `worker`'s pool."""
        if worker in self._held:
            self._drop(worker, _split(keys))

    def replace(self, worker: str, keys: bytes) -> None:
        """`worker` holds these blocks, and none but those still expected."""
        present = dict.fromkeys(_split(keys))
        held, _ = self._of(worker)
        gone = [key for key, until in held.items() if until == CONFIRMED and key not in present]
        self._drop(worker, gone)
        self.stored(worker, keys)

    def expect(self, worker: str, keys: bytes, now_ms: int) -> None:
        """A prompt of these blocks was sent to `worker`: it will hold them, unless it does not
        say so within the time that expectations live."""
        self.expire(now_ms)
        if not keys:
            return
        held, bit = self._of(worker)
        until = now_ms + self._ttl_ms
        blocks = _split(keys)
        states = list(map(held.get, blocks))
        news = [key for key, state in zip(blocks, states, strict=True) if state != CONFIRMED]
        if not news:
            return
        fresh = [key for key in news if key not in held] if any(states) else news
        known = len(held)
        held.update(dict.fromkeys(news, until))
        self._count += len(held) - known
        others = map(self._holders.get, fresh, repeat(0))
        slots = [each | bit if each else bit for each in others]
        self._holders.update(zip(fresh, slots, strict=True))
        self._expected.append((until, worker, news))
        self._pending += len(news)
        self._trim(worker)
        while self._pending > self._total_max:
            self._end_oldest()

    def expire(self, now_ms: int) -> None:
        """Forget what was expected and never came."""
        while self._expected and self._expected[0][0] <= now_ms:
            self._end_oldest()

    def _end_oldest(self) -> None:
        until, worker, keys = self._expected.popleft()
        self._pending -= len(keys)
        held = self._held.get(worker)
        if held is not None:
            self._drop(worker, [key for key in keys if held.get(key) == until])

    def forget_worker(self, worker: str) -> None:
        """`worker` is gone, and its blocks with it."""
        self._limits.pop(worker, None)
        held = self._held.get(worker)
        if held is None:
            return
        self._drop(worker, list(held))
        del self._held[worker]
        del self._bits[worker]
        slot = self._slots.pop(worker)
        del self._names[slot]
        self._free.append(slot)

    def match(self, keys: bytes) -> dict[str, int]:
        """Leading blocks of the prompt that each worker holds, for those that hold any."""
        return {
            self._names[slot]: found.blocks
            for found in self.leaders(keys)
            for slot in _slots_of(found.slots)
        }

    def leaders(self, keys: bytes) -> list[Holders]:
        """The workers that hold leading blocks, by how many: most first, each worker once."""
        found: list[Holders] = []
        alive = last = -1
        blocks = len(keys) // BLOCK_KEY_BYTES
        get = self._holders.get
        for place, key in enumerate(memoryview(keys).cast("Q") if keys else ()):
            slots = get(key, 0)
            # long runs of blocks have one and the same set of holders
            if slots != last:
                last = slots
                both = alive & slots
                if both != alive:
                    if place:
                        found.append(Holders(place, alive ^ both))
                    alive = both
                    if not alive:
                        break
        if alive > 0 and blocks:
            found.append(Holders(blocks, alive))
        found.reverse()
        return found

    def slot(self, worker: str) -> int:
        """The bit of `worker` in Holders, as a set of one; 0 if nothing is known of it."""
        return self._bits.get(worker, 0)

    def names(self, slots: int, limit: int) -> list[str] | None:
        """The workers of a set of slots; None if they are more than `limit`."""
        if slots.bit_count() > limit:
            return None
        return [self._names[slot] for slot in _slots_of(slots)]

    def check_integrity(self) -> None:
        assert self._count == sum(map(len, self._held.values())), "pairs add up"
        assert self._count <= self._total_max, "the total is bounded"
        assert self._slots == {name: slot for slot, name in self._names.items()}
        assert self._bits == {name: 1 << slot for name, slot in self._slots.items()}
        assert self._slots.keys() == self._held.keys(), "a worker has a slot and a table"
        seen: dict[int, int] = {}
        for worker, held in self._held.items():
            bit = self._bits[worker]
            for key in held:
                seen[key] = seen.get(key, 0) | bit
        assert seen == self._holders, "both tables hold the same pairs"
        assert self._pending == sum(len(keys) for _, _, keys in self._expected)
        ends = {(worker, key, until) for until, worker, keys in self._expected for key in keys}
        for worker, held in self._held.items():
            assert len(held) <= self._cap(worker), "a worker's blocks are bounded"
            assert all(
                until == CONFIRMED or (worker, key, until) in ends for key, until in held.items()
            ), "every expectation ends"

    def _of(self, worker: str) -> tuple[dict[int, int], int]:
        """A worker's own table and its bit; it gets a slot if it has none."""
        if worker not in self._held:
            slot = self._free.pop() if self._free else len(self._slots)
            self._slots[worker] = slot
            self._names[slot] = worker
            self._bits[worker] = 1 << slot
            self._held[worker] = {}
            # everybody's part of the total has become smaller
            for each in self._held:
                self._trim(each)
        return self._held[worker], self._bits[worker]

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
        bit = self._bits[worker]
        for key in keys:
            if held.pop(key, None) is None:
                continue
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


def _slots_of(slots: int) -> list[int]:
    """The bits of a set, lowest first."""
    found = []
    while slots:
        low = slots & -slots
        found.append(low.bit_length() - 1)
        slots ^= low
    return found
