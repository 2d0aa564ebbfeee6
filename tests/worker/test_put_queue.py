"""Blocks on their way to the cache service: two batches at a time, and what becomes of either."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from cache.builders import reap, spawn, wait_ready
from headrace.cache_client import CacheClient
from headrace_worker.cache_link import CacheLink
from headrace_worker.kv.export import Export, ExportFacts, State
from headrace_worker.put_queue import BATCH_BLOCKS_MAX, BATCHES_MAX, PutQueue
from support.fleet import eventually

BLOCK_BYTES = 128 * 1024
"""A batch of them is copied by threads, all but a first megabyte."""

FIRST_BLOCKS = 8


def export_of(
    number: int,
    size_bytes: int = BLOCK_BYTES,
    *,
    read: Callable[[], object] = lambda: None,
    good: bool = True,
) -> Export:
    """A block of `number`s, told apart by it. `read` is called before its bytes are."""

    def copy(target: NDArray[np.uint8]) -> None:
        read()
        target[:] = number % 251

    facts = ExportFacts(f"{number:032d}".encode(), b"", number, job="job")
    return Export(facts, size_bytes, copy, lambda _: good)


def exports_of(first: int, count: int, **options: object) -> list[Export]:
    return [export_of(first + n, **options) for n in range(count)]  # type: ignore[arg-type]


def numbers(batch: list[Export]) -> list[int]:
    return [export.facts.depth for export in batch]


# the queue


async def test_a_second_batch_is_a_whole_one_and_there_is_no_third() -> None:
    """What comes in a trickle waits until it is a batch, or nothing else is under way."""
    queue = PutQueue()
    queue.offer(export_of(0))
    first = await queue.take()
    for number in range(1, BATCH_BLOCKS_MAX):
        queue.offer(export_of(number))
    assert not queue.can_begin(), "one is missing"
    queue.offer(export_of(BATCH_BLOCKS_MAX))
    second = await queue.take()
    assert (numbers(first), numbers(second)) == ([0], list(range(1, BATCH_BLOCKS_MAX + 1)))
    for export in exports_of(100, 2 * BATCH_BLOCKS_MAX):
        queue.offer(export)
    assert not queue.can_begin(), "as many as may be are under way"
    queue.done(second)
    assert queue.can_begin()
    queue.check_integrity()


async def test_a_block_is_not_written_twice_at_a_time() -> None:
    """Offered again, as with a pin, it waits for what is written of it."""
    queue = PutQueue()
    for export in exports_of(0, BATCH_BLOCKS_MAX):
        queue.offer(export)
    first = await queue.take()
    for export in (*exports_of(100, BATCH_BLOCKS_MAX - 1), export_of(3)):
        queue.offer(export)
    assert not queue.can_begin()
    queue.done(first)
    assert numbers(await queue.take())[-1] == 3


async def test_who_waits_for_the_queue_to_be_empty_waits_for_what_is_under_way() -> None:
    queue = PutQueue()
    await queue.flushed()
    queue.offer(export_of(0))
    batch = await queue.take()
    waiting = asyncio.ensure_future(queue.flushed())
    await asyncio.sleep(0)
    assert not waiting.done()
    queue.done(batch)
    await waiting


async def test_a_taker_that_was_cancelled_has_taken_nothing() -> None:
    queue = PutQueue()
    takers = [asyncio.ensure_future(queue.take()) for _ in range(BATCHES_MAX)]
    await asyncio.sleep(0)
    queue.offer(export_of(0))
    takers[0].cancel()
    assert numbers(await takers[1]) == [0]


@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("offer"), st.integers(0, 60), st.sampled_from([1, 1 << 20, 9 << 20])),
            st.tuples(st.sampled_from(["take", "done"]), st.integers(0, 1), st.just(0)),
        ),
        max_size=120,
    )
)
def test_any_program_keeps_order_and_limits(steps: list[tuple[str, int, int]]) -> None:
    """Batches are of what was offered, in that order, and of no more bytes than allowed."""

    async def program() -> None:
        queue, taken = PutQueue(), 0
        order: list[int] = []
        under_way: list[list[Export]] = []
        for what, number, size_bytes in steps:
            if what == "offer":
                order += [number] if queue.offer(export_of(number, size_bytes)) else []
            elif what == "take" and queue.can_begin():
                batch = await queue.take()
                assert numbers(batch) == order[taken : taken + len(batch)]
                taken += len(batch)
                under_way.append(batch)
            elif what == "done" and number < len(under_way):
                queue.done(under_way.pop(number))
            queue.check_integrity()
            assert queue.blocks == len(order) - taken + sum(map(len, under_way))
        for batch in under_way:
            queue.done(batch)
        while queue.blocks:
            assert queue.can_begin(), "what waits gets on"
            queue.done(await queue.take())

    asyncio.run(program())


# with a service


def stuck(first: int, count: int, go_on: threading.Event) -> list[Export]:
    """Blocks that are copied by threads, which wait for `go_on` meanwhile."""
    quick = exports_of(first, FIRST_BLOCKS)
    return [*quick, *exports_of(first + len(quick), count - len(quick), read=go_on.wait)]


@asynccontextmanager
async def writing_to(url: str, go_on: threading.Event | None = None) -> AsyncIterator[CacheLink]:
    """A link to the service. Nothing waits for `go_on` at the end."""
    client = CacheClient(url, timeout_s=10)
    link = CacheLink(client, layout=b"a layout", block_bytes=BLOCK_BYTES)
    writers = asyncio.create_task(link.run())
    try:
        yield link
    finally:
        if go_on is not None:
            threading.Timer(0.05, go_on.set).start()
        writers.cancel()
        await asyncio.gather(writers, return_exceptions=True)
        link.check_integrity()
        await link.close()


async def reserved_bytes(url: str) -> int:
    """For what is being written; what is had ahead is not."""
    client = CacheClient(url, arena=False)
    stats = await client.stats()
    await client.close()
    return int(stats["reserved_bytes"] - stats["ahead_bytes"]) if stats is not None else 0


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"unix://{tmp_path / 'cache.sock'}"


async def both_reserved(url: str) -> bool:
    return await reserved_bytes(url) >= BATCHES_MAX * BATCH_BLOCKS_MAX * BLOCK_BYTES


async def test_one_batch_has_its_places_while_the_other_is_copied(url: str) -> None:
    """And all of both arrives, whoever is done first."""
    go_on = threading.Event()
    process = spawn(url)
    try:
        await wait_ready(url)
        async with writing_to(url, go_on) as link:
            exports = [*stuck(0, BATCH_BLOCKS_MAX, go_on), *exports_of(100, BATCH_BLOCKS_MAX + 5)]
            link.store_later(exports)
            await eventually(lambda: both_reserved(url))
            assert link.counts.written_blocks == 0 and link.is_writing("job")
            go_on.set()
            await link.flushed()
            assert link.counts.written_blocks == len(exports)
            assert all(await link._client.has([each.facts.hash for each in exports]))
    finally:
        reap(process)


async def test_a_service_that_is_killed_with_two_under_way_takes_no_account_along(
    url: str,
) -> None:
    """Neither is written, nobody waits for ever, and what is offered later is written again."""
    go_on = threading.Event()
    process = spawn(url)
    try:
        await wait_ready(url)
        async with writing_to(url, go_on) as link:
            lost = stuck(0, BATCHES_MAX * BATCH_BLOCKS_MAX, go_on)
            link.store_later(lost)
            await eventually(lambda: both_reserved(url))
            reap(process)
            go_on.set()
            await link.written("job")
            assert link.written_tokens("job") == link.counts.written_blocks == 0
            assert link.counts.unwritten_blocks == len(lost)
            assert not any(export.state is State.OFFERED for export in lost)
            link.check_integrity()
            process = spawn(url)
            await wait_ready(url)
            number = 1000

            async def is_written() -> bool:
                nonlocal number  # each try is of new blocks: a dropped one is not offered again
                number += 1
                link.store_later([export_of(number)])
                await link.flushed()
                return link.counts.written_blocks > 0

            await eventually(is_written)
    finally:
        reap(process)


async def test_a_batch_that_fails_leaves_the_other_its_account(url: str) -> None:
    """A block with wrong numbers costs its own batch."""
    process = spawn(url)
    try:
        await wait_ready(url)
        async with writing_to(url) as link:
            wrong = exports_of(0, BATCH_BLOCKS_MAX, good=False)
            right = exports_of(100, BATCH_BLOCKS_MAX)
            link.store_later([*wrong, *right])
            await link.flushed()
            assert link.counts.unwritten_blocks == link.counts.written_blocks == BATCH_BLOCKS_MAX
            assert link.written_tokens("job") == 16 * BATCH_BLOCKS_MAX
            assert not link.is_writing("job")
            held = await link._client.has([each.facts.hash for each in (*wrong, *right)])
            assert held == [False] * BATCH_BLOCKS_MAX + [True] * BATCH_BLOCKS_MAX
    finally:
        reap(process)


async def test_whoever_ends_while_two_are_written_owes_nobody_an_answer(url: str) -> None:
    """Cancelled in the middle: what was being written is dropped, its places are given back."""
    go_on = threading.Event()
    process = spawn(url)
    try:
        await wait_ready(url)
        async with writing_to(url, go_on) as link:
            link.store_later(stuck(0, BATCHES_MAX * BATCH_BLOCKS_MAX, go_on))
            await eventually(lambda: both_reserved(url))
        assert link._puts.blocks == 0 and not link.is_writing("job")

        async def is_free() -> bool:
            return await reserved_bytes(url) == 0

        await eventually(is_free)
    finally:
        reap(process)
