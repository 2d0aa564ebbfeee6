"""Reading runs of entries: in the arena where it is mapped, else into memory of their own.

Invariant: what a run holds has the CRC its writer computed, and stays as it is until the run is
closed: the service does not reuse what it lent before that, even if the connection ends.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import structlog

from headrace.arena_view import ArenaView
from headrace.cache_lane import Answered, ClientCounts, Connection, Lane
from headrace.cache_threads import copy_all
from headrace.errors import WireError
from headrace.frames import DISK, KEYS_MAX, Counted, EntryKey, Get, Lend, Lent, RunOf, Verify
from headrace.types import Band

KEYS_PER_ROUND = 64
"""Keys in one get: what came before a time limit struck is returned, round by round."""

log = structlog.get_logger(__name__)


@dataclass(slots=True)
class ReadRun:
    """The leading run that was found. `blocks` are not to be written to, nor to be kept.

    `tier` is where it came from: "arena" (read in place), "remote" (sent over the connection),
    "disk" (some of it, either way), or "none". `took_ms` is what finding and checking it took.
    """

    hashes: list[bytes] = field(default_factory=list)
    blocks: list[memoryview] = field(default_factory=list)
    tier: str = "none"
    bytes: int = 0
    took_ms: float = 0.0
    leases: list[tuple[Connection, int]] = field(default_factory=list, repr=False)

    def close(self) -> None:
        """Give back what was lent."""
        for block in self.blocks:
            # somebody still has a view of it: the mapping, and with it our lock, live as long
            with contextlib.suppress(BufferError):
                block.release()
        for connection, lease in self.leases:
            connection.give_back(lease)
        self.leases.clear()


@dataclass(frozen=True, slots=True)
class Wish:
    """What to read, for whom."""

    keys: tuple[EntryKey, ...]
    band: Band | None
    tenant: str
    layout: bytes
    trace: Mapping[str, str]

    def build(self, first: int) -> Callable[[int, ArenaView | None], Get]:
        def request(message_id: int, arena: ArenaView | None) -> Get:
            kind, count = (Get, KEYS_PER_ROUND) if arena is None else (Lend, KEYS_MAX)
            keys = self.keys[first : first + count]
            return kind(message_id, keys, self.band, self.trace, self.layout, self.tenant)

        return request


async def read_run(
    lane: Lane,
    wish: Wish,
    counts: ClientCounts,
    left_s: Callable[[], float],
    targets: Sequence[memoryview] | None = None,
) -> ReadRun:
    """The leading run of `wish` that the service has; the caller closes it.

    With `targets`, one for each key, it is copied there as it is checked. An entry of another
    length than its target ends the run.
    """
    run = ReadRun()
    loop = asyncio.get_running_loop()
    began_s = loop.time()
    try:
        more = True
        while more and len(run.blocks) < len(wish.keys) and left_s() > 0:
            more = await _read_round(lane, wish, run, counts, left_s, targets)
    except BaseException:
        run.close()
        raise
    counts.hits += len(run.blocks)
    counts.misses += len(wish.keys) - len(run.blocks)
    run.took_ms = 1000 * (loop.time() - began_s)
    return run


async def _read_round(
    lane: Lane,
    wish: Wish,
    run: ReadRun,
    counts: ClientCounts,
    left_s: Callable[[], float],
    targets: Sequence[memoryview] | None,
) -> bool:
    """Add to `run` what one request brings; whether it is worth asking for what is behind."""
    first = len(run.blocks)
    into = () if targets is None else targets[first : first + KEYS_PER_ROUND]
    answered = await lane.ask(wish.build(first), RunOf, left_s(), places=into)
    if answered is None:
        return False
    answer = answered.answer
    asked = wish.keys[first : first + (KEYS_MAX if isinstance(answer, Lent) else KEYS_PER_ROUND)]
    blocks = _blocks(answered, run, len(asked))
    if targets is None:
        good = await _leading_good(blocks, answer.crcs)
    else:
        places = targets[first : first + len(blocks)]
        fits = [len(block) == len(place) for block, place in zip(blocks, places, strict=True)]
        blocks = blocks[: fits.index(False)] if False in fits else blocks
        good = await _leading_good(blocks, answer.crcs, places)
    for key, block in zip(asked, blocks[:good], strict=False):
        run.hashes.append(key.hash)
        run.blocks.append(block)
        run.bytes += len(block)
    if good:
        _note_tier(run, answer)
    if good < len(blocks):
        counts.corrupt += 1
        key = asked[good]
        log.warning("corrupt cache entry dropped", hash=key.hash.hex())
        await lane.ask(lambda each, _: Verify(each, (key,)), Counted, left_s())
        return False
    return bool(blocks) and (answer.more or len(blocks) == len(asked))


def _blocks(answered: Answered[RunOf], run: ReadRun, asked: int) -> list[memoryview]:
    """The bytes of an answer, not yet checked. What was lent is noted in `run`."""
    answer = answered.answer
    if not isinstance(answer, Lent):
        return [part for part in answered.parts if part is not None][:asked]
    run.leases.append((answered.connection, answer.lease))
    arena = answered.connection.arena
    if arena is None:
        return []
    try:
        views = map(arena.view, answer.places[:asked], answer.found)
        return list(views)
    except WireError as error:
        log.warning("the cache service lends what it has not", error=error.message)
        return []


def _note_tier(run: ReadRun, answer: RunOf) -> None:
    if DISK in answer.tiers or run.tier == "disk":
        run.tier = "disk"
    else:
        run.tier = "arena" if isinstance(answer, Lent) else "remote"


async def _leading_good(
    blocks: Sequence[memoryview],
    crcs: Sequence[int],
    targets: Sequence[memoryview] | None = None,
) -> int:
    """How many of `blocks`, from the first on, have their CRC; there or, copied, in `targets`."""

    places = [
        # what was received right there is checked there
        None if targets is None or block is targets[number] else targets[number]
        for number, block in enumerate(blocks)
    ]
    found = await copy_all(places, blocks)
    flags = [crc == expected for crc, expected in zip(found, crcs, strict=False)]
    return flags.index(False) if False in flags else len(flags)
