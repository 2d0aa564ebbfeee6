"""Writing a batch of entries: into reserved places of the arena where it is mapped, else as a put.

Invariant: bytes are copied only for what the service has a place for; a batch whose copying failed
or was given up is never committed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import structlog

from headrace.arena_view import ArenaView
from headrace.cache_entries import Entry, facts_of
from headrace.cache_lane import Connection, Lane
from headrace.cache_threads import in_threads
from headrace.checksum import checksum
from headrace.errors import WireError
from headrace.frames import Buffer, Commit, Counted, Put, Reserve, Reserved

log = structlog.get_logger(__name__)

NOWHERE = -1


async def write_batch(
    lane: Lane, batch: Sequence[Entry], trace: Mapping[str, str], timeout_s: float
) -> int | None:
    """How many entries of `batch` the service holds now; None where it could not be told of them.

    Raises what an entry's `fill` raises.
    """
    connection = await lane.reach(timeout_s)
    if connection is None:
        return None
    if connection.arena is not None:
        return await _write_in_place(lane, connection, connection.arena, batch, trace, timeout_s)
    return await _send(lane, connection, batch, trace, timeout_s)


async def _send(
    lane: Lane,
    connection: Connection,
    batch: Sequence[Entry],
    trace: Mapping[str, str],
    timeout_s: float,
) -> int | None:
    def work(first: int, last: int) -> list[tuple[Buffer, int]]:
        payloads = [entry.payload() for entry in batch[first:last]]
        return [(payload, checksum(payload)) for payload in payloads]

    filled = await in_threads(work, [entry.size_bytes for entry in batch])
    facts = tuple(facts_of(entry, crc) for entry, (_, crc) in zip(batch, filled, strict=True))
    answered = await lane.ask(
        lambda message_id, _: Put(message_id, facts, trace),
        Counted,
        timeout_s,
        [payload for payload, _ in filled],
        on=connection,
    )
    return answered.answer.count if answered is not None else None


async def _write_in_place(
    lane: Lane,
    connection: Connection,
    arena: ArenaView,
    batch: Sequence[Entry],
    trace: Mapping[str, str],
    timeout_s: float,
) -> int | None:
    """Reserve, copy, commit."""
    facts = tuple(map(facts_of, batch))
    asked = await lane.ask(
        lambda message_id, _: Reserve(message_id, facts, trace),
        Reserved,
        timeout_s,
        on=connection,
    )
    if asked is None or not asked.answer.ticket:
        return asked.answer.held if asked is not None else None
    reserved = asked.answer
    try:
        crcs = await _fill(arena, batch, reserved.places)
    except BaseException as error:
        connection.give_back(reserved.ticket)
        if not isinstance(error, WireError):
            raise
        log.warning("the cache service gives places it has not", error=error.message)
        return None
    committed = await lane.ask(
        lambda message_id, _: Commit(message_id, reserved.ticket, tuple(crcs)),
        Counted,
        timeout_s,
        on=connection,
    )
    return reserved.held + committed.answer.count if committed is not None else None


async def _fill(arena: ArenaView, batch: Sequence[Entry], places: Sequence[int]) -> list[int]:
    """The CRC of each entry that was given a place, written there. Raises WireError."""
    given = [
        (entry, arena.view(place, entry.size_bytes))
        for entry, place in zip(batch, places, strict=False)
        if place != NOWHERE
    ]

    def work(first: int, last: int) -> list[int]:
        crcs = []
        for entry, view in given[first:last]:
            entry.fill(view)
            crcs.append(checksum(view))
        return crcs

    return await in_threads(work, [entry.size_bytes for entry, _ in given])
