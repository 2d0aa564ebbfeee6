"""Writing a batch of entries: into reserved places of the arena where it is mapped, else as a put.

Invariant: bytes are copied only to places that are this connection's until it commits or gives
them back; a batch whose copying failed or was given up is never committed.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import structlog

from headrace.arena_view import ArenaView
from headrace.cache_ahead import Ahead, wish_of
from headrace.cache_entries import Entry, PutEntry, batches, facts_of
from headrace.cache_lane import Connection, Lane
from headrace.cache_threads import copy_all, in_threads
from headrace.checksum import checksum
from headrace.errors import WireError
from headrace.frames import NONE_AHEAD, Buffer, Commit, Counted, Put, Reserve, Reserved

log = structlog.get_logger(__name__)

NOWHERE = -1

PIECE_BYTES_MAX = 16 * 1024 * 1024
"""Reserved and copied at a time: some 2 ms."""

FIRST_BYTES_MAX = 1024 * 1024
"""The first piece where nothing else is under way: copying begins the sooner, and the next pieces'
places are made meanwhile."""

AHEAD_MAX = 3
"""Pieces that places are asked for at a time."""

SENT_BYTES_MAX = 4 * 1024 * 1024
SENT_FRAMES_MAX = 4
"""Frames of that size that one batch has under way at a time."""


@dataclass(slots=True)
class Written:
    """What became of entries: `held` are with the service now, of `failed` it could not be told."""

    held: int = 0
    failed: int = 0
    ahead: int = 0
    """Written to places that were had ahead."""


async def write_entries(
    lane: Lane, entries: Sequence[Entry], trace: Mapping[str, str], timeout_s: float
) -> Written:
    """Write `entries`, parents first. Raises what an entry's `fill` raises."""
    connection = await lane.reach(timeout_s)
    if connection is None:
        return Written(failed=len(entries))
    if connection.arena is not None:
        writer = _InPlace(lane, connection, connection.arena, trace, timeout_s)
        connection.writers += 1
        try:
            return await writer.write(entries)
        finally:
            connection.writers -= 1
    return await _send_all(lane, connection, entries, trace, timeout_s)


async def _send_all(
    lane: Lane,
    connection: Connection,
    entries: Sequence[Entry],
    trace: Mapping[str, str],
    timeout_s: float,
) -> Written:
    """Put `entries` in frames: one is sent while the next one's bytes are read and checked."""
    written = Written()
    puts: list[tuple[int, asyncio.Task[int | None]]] = []
    try:
        for batch in batches(entries, SENT_BYTES_MAX, FIRST_BYTES_MAX):
            if any(put.done() and put.result() is None for _, put in puts):
                written.failed += len(batch)
                continue
            filled = await _filled(batch)
            if len(puts) >= SENT_FRAMES_MAX:
                await asyncio.wait({puts[-SENT_FRAMES_MAX][1]})
            sending = _send(lane, connection, batch, filled, trace, timeout_s)
            puts.append((len(batch), asyncio.ensure_future(sending)))
    except BaseException as error:
        # where a `fill` failed, what is being sent goes on: half a frame would end the connection
        if isinstance(error, asyncio.CancelledError):
            for _, put in puts:
                put.cancel()
        await asyncio.gather(*(put for _, put in puts), return_exceptions=True)
        raise
    counts = await asyncio.gather(*(put for _, put in puts))
    for (count, _), held in zip(puts, counts, strict=True):
        written.held += held or 0
        written.failed += count if held is None else 0
    return written


async def _filled(batch: Sequence[Entry]) -> list[tuple[Buffer, int]]:
    """Each entry's bytes and their CRC."""

    def work(number: int) -> tuple[Buffer, int]:
        payload = batch[number].payload()
        return payload, checksum(payload)

    ready = [entry.data for entry in batch if isinstance(entry, PutEntry)]
    if len(ready) == len(batch):
        crcs = await copy_all([None] * len(ready), ready)
        return list(zip(ready, crcs, strict=True))
    return await in_threads(work, [entry.size_bytes for entry in batch])


async def _send(
    lane: Lane,
    connection: Connection,
    batch: Sequence[Entry],
    filled: Sequence[tuple[Buffer, int]],
    trace: Mapping[str, str],
    timeout_s: float,
) -> int | None:
    facts = tuple(facts_of(entry, crc) for entry, (_, crc) in zip(batch, filled, strict=True))
    answered = await lane.ask(
        lambda message_id, _: Put(message_id, facts, trace),
        Counted,
        timeout_s,
        [payload for payload, _ in filled],
        on=connection,
    )
    return answered.answer.count if answered is not None else None


class _Filled(NamedTuple):
    """A piece that is copied: how many entries it had, and what commits them."""

    entries: int
    ticket: int
    crcs: Sequence[int]


_Asked = asyncio.Task[Reserved | None]


class _InPlace:
    """Reserve, copy, commit: while one piece is copied, the next ones' places are made free.

    Where there are places from before (`cache_ahead.py`), the first piece goes there at once: what
    they are for is told first, so that the service enters it meanwhile.
    """

    def __init__(
        self,
        lane: Lane,
        connection: Connection,
        arena: ArenaView,
        trace: Mapping[str, str],
        timeout_s: float,
    ) -> None:
        self._lane = lane
        self._connection = connection
        self._arena = arena
        self._trace = trace
        self._timeout_s = timeout_s
        self._wish = NONE_AHEAD
        self._asked: deque[tuple[Sequence[Entry], _Asked]] = deque()

    async def write(self, entries: Sequence[Entry]) -> Written:
        """Raises what a `fill` raises."""
        if not entries:
            return Written()
        self._wish = wish_of(entries)
        ahead = self._connection.kept.take(entries)
        pieces = deque(self._cut(entries, ahead))
        written = Written()
        filled: list[_Filled] = []
        naming: list[_Asked] = []
        try:
            if ahead is not None:
                first = pieces.popleft()
                naming.append(self._ask(first, last=not pieces, using=ahead.ticket))
                self._ask_some(pieces)
                filled.append(await self._fill(first, ahead.ticket, ahead.places, aside=True))
                written.ahead = len(first)
            while self._ask_some(pieces):
                piece, answer = self._asked[0]
                reserved = await answer
                self._asked.popleft()
                written.failed += 0 if reserved is not None else len(piece)
                written.held += reserved.held if reserved is not None else 0
                if reserved is not None and reserved.ticket:
                    beside = self._connection.writers > 1
                    fill = self._fill(piece, reserved.ticket, reserved.places, aside=beside)
                    filled.append(await fill)
        except BaseException:
            commits = self._begin_commits(filled)
            await asyncio.sleep(0)  # they are sent; nobody waits for their answers
            await self._give_up([*naming, *(answer for _, answer in self._asked), *commits])
            raise
        for (count, _, _), held in zip(filled, await self._commit_all(filled), strict=True):
            written.held += held or 0
            written.failed += count if held is None else 0
        for named in naming:
            told = await named
            written.held += told.held if told is not None else 0
        return written

    def _cut(self, entries: Sequence[Entry], ahead: Ahead | None) -> list[Sequence[Entry]]:
        if ahead is not None:
            count = ahead.fits(entries)
            return [entries[:count], *batches(entries[count:], PIECE_BYTES_MAX)]
        alone = self._connection.writers == 1
        return [*batches(entries, PIECE_BYTES_MAX, FIRST_BYTES_MAX if alone else 0)]

    def _ask_some(self, pieces: deque[Sequence[Entry]]) -> bool:
        """Ask for places for some of `pieces`, which are taken out; whether answers are to come."""
        while pieces and len(self._asked) < AHEAD_MAX:
            piece = pieces.popleft()
            self._asked.append((piece, self._ask(piece, last=not pieces)))
        return bool(self._asked)

    def _ask(self, piece: Sequence[Entry], *, last: bool, using: int = 0) -> _Asked:
        """The last one asks for places ahead of the next batch, too."""
        kept = self._connection.kept
        wished = last and kept.wants(self._wish, piece[0].tenant)
        wish = self._wish if wished else NONE_AHEAD
        asked = asyncio.ensure_future(self._reserve(piece, using, wish))
        if wished:
            kept.note_asked(asked)
        return asked

    async def _commit_all(self, filled: Sequence[_Filled]) -> list[int | None]:
        if len(filled) == 1:  # at once: as a task it would stand behind another batch's copying
            return [await self._commit(filled[0].ticket, filled[0].crcs)]
        return await asyncio.gather(*self._begin_commits(filled))

    def _begin_commits(self, filled: Sequence[_Filled]) -> list[asyncio.Task[int | None]]:
        """All at a time: each would wake the service while it makes the next piece's places."""
        return [asyncio.ensure_future(self._commit(each.ticket, each.crcs)) for each in filled]

    async def _give_up(self, tasks: Collection[asyncio.Task[Any]]) -> None:
        """Wait no more. What is reserved is given back now, or when its answer comes."""
        for task in tasks:
            task.cancel()
        for answer in await asyncio.gather(*tasks, return_exceptions=True):
            if isinstance(answer, Reserved):
                self._connection.give_back(answer.ticket)

    async def _reserve(
        self, piece: Sequence[Entry], using: int, wish: tuple[int, int]
    ) -> Reserved | None:
        facts = tuple(map(facts_of, piece))
        asked = await self._lane.ask(
            lambda message_id, _: Reserve(message_id, facts, self._trace, using, wish),
            Reserved,
            self._timeout_s,
            on=self._connection,
        )
        if asked is None:
            return None
        self._connection.kept.keep(asked.answer, wish, piece[0].tenant)
        return asked.answer

    async def _fill(
        self, piece: Sequence[Entry], ticket: int, places: Sequence[int], *, aside: bool = False
    ) -> _Filled:
        """Copy what was given a place. Where that fails, the places are given back.

        `aside`: once what the service is to do meanwhile is on its way.
        """
        crcs: list[int] = []
        try:
            if aside:
                await asyncio.sleep(0)
                await asyncio.sleep(0)  # uvloop writes when all that was ready has run
            turn = self._connection.turn if aside else None
            crcs = await _fill(self._arena, piece, places, turn)
        except WireError as error:
            log.warning("the cache service gives places it has not", error=error.message)
        except BaseException:
            self._connection.give_back(ticket)
            raise
        return _Filled(len(piece), ticket, crcs)

    async def _commit(self, ticket: int, crcs: Sequence[int]) -> int | None:
        asked = await self._lane.ask(
            lambda message_id, _: Commit(message_id, ticket, tuple(crcs)),
            Counted,
            self._timeout_s,
            on=self._connection,
        )
        return asked.answer.count if asked is not None else None


async def _fill(
    arena: ArenaView, batch: Sequence[Entry], places: Sequence[int], turn: asyncio.Lock | None
) -> list[int]:
    """The CRC of each entry that was given a place, written there. Raises WireError."""
    given = [
        (entry, arena.view(place, entry.size_bytes))
        for entry, place in zip(batch, places, strict=False)
        if place != NOWHERE
    ]

    def work(number: int) -> int:
        entry, view = given[number]
        return entry.fill_checked(view)

    ready = [entry.data for entry, _ in given if isinstance(entry, PutEntry)]
    if len(ready) == len(given):
        return await copy_all([view for _, view in given], ready, turn)
    quick = all(isinstance(entry, PutEntry) or entry.quick for entry, _ in given)
    sizes = [entry.size_bytes for entry, _ in given]
    return await in_threads(work, sizes, turn if quick else None)
