"""Copies that are checked as they are made, and the threads that share a batch of them."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable

import pytest

from cache.builders import data_of
from headrace import cache_threads
from headrace.cache_threads import COPIERS, in_threads
from headrace.checksum import checksum
from headrace.copying import CHECKED_BYTES, copy_checked

LARGE = cache_threads.INLINE_BYTES_MAX
PATIENCE_S = 20.0


@pytest.mark.parametrize(
    "size", [1, CHECKED_BYTES, CHECKED_BYTES + 1, 2 * CHECKED_BYTES, 3 * CHECKED_BYTES - 7]
)
@pytest.mark.parametrize(
    "build", [bytes, bytearray, memoryview, lambda d: memoryview(bytearray(d))]
)
def test_a_copy_has_the_checksum_of_what_it_is_now(
    size: int, build: Callable[[bytes], bytes | bytearray | memoryview]
) -> None:
    """In one piece and in several, and nothing is written past its place."""
    data = data_of("copied", size)
    memory = bytearray(size + 2)
    assert copy_checked(memoryview(memory)[1:-1], build(data)) == checksum(data)
    assert memory == b"\0" + data + b"\0"
    with pytest.raises(ValueError, match="do not fit"):
        copy_checked(memoryview(memory), build(data))


@pytest.mark.parametrize("size", [1, LARGE])
async def test_each_entry_is_worked_on_once_and_results_are_in_order(size: int) -> None:
    """In the loop where it is little, by the copiers where it is much."""
    threads: list[str] = []

    def work(number: int) -> int:
        threads.append(threading.current_thread().name)
        return number * number

    assert await in_threads(work, [size] * 50) == [number * number for number in range(50)]
    assert len(threads) == 50
    assert all(name.startswith("headrace-copier") for name in threads) == (size == LARGE)


async def test_batches_in_flight_share_the_copiers() -> None:
    seen: set[str] = set()

    def work(number: int) -> int:
        seen.add(threading.current_thread().name)
        return number

    batches = [in_threads(work, [LARGE] * 20) for _ in range(10)]
    assert await asyncio.gather(*batches) == [list(range(20))] * 10
    assert 1 <= len(seen) <= COPIERS


async def test_an_error_is_raised_and_the_rest_is_not_begun() -> None:
    begun: list[int] = []

    def work(number: int) -> None:
        begun.append(number)
        if number == 3:
            raise RuntimeError("the block is gone")

    with pytest.raises(RuntimeError, match="gone"):
        await in_threads(work, [LARGE] * 200_000)
    assert len(begun) < 200_000


async def test_nothing_runs_any_more_when_a_wait_was_given_up() -> None:
    """Cancelled in the middle: the entries being copied are finished first, no other is begun."""
    started, go_on = threading.Event(), threading.Event()
    running = 0
    begun: list[int] = []
    lock = threading.Lock()

    def work(number: int) -> None:
        nonlocal running
        with lock:
            running += 1
            begun.append(number)
        started.set()
        go_on.wait(PATIENCE_S)
        with lock:
            running -= 1

    waiting = asyncio.ensure_future(in_threads(work, [LARGE] * 100))
    await asyncio.to_thread(started.wait, PATIENCE_S)
    waiting.cancel()
    for _ in range(5):
        await asyncio.sleep(0)
    assert not waiting.done(), "a thread is still writing"
    go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert running == 0
    assert len(begun) <= COPIERS


async def test_a_wait_given_up_before_a_thread_was_free_ends_at_once() -> None:
    """All copiers are busy with another batch; that one is not disturbed."""
    hold, held = threading.Event(), threading.Semaphore(0)

    def work(number: int) -> int:
        held.release()
        hold.wait(PATIENCE_S)
        return number

    first = asyncio.ensure_future(in_threads(work, [LARGE] * COPIERS))
    for _ in range(COPIERS):
        await asyncio.to_thread(held.acquire, True, PATIENCE_S)
    second = asyncio.ensure_future(in_threads(lambda number: number, [LARGE] * 5))
    await asyncio.sleep(0)
    second.cancel()
    with pytest.raises(asyncio.CancelledError):
        await second
    hold.set()
    assert await first == list(range(COPIERS))


async def test_a_forked_process_has_copiers_of_its_own() -> None:
    assert await in_threads(lambda number: number, [LARGE] * 4) == [0, 1, 2, 3]
    pid = os.fork()
    if not pid:
        code = 1
        try:
            asyncio._set_running_loop(None)
            done = asyncio.run(in_threads(lambda number: number, [LARGE] * 4))
            code = 0 if done == [0, 1, 2, 3] else 2
        finally:
            os._exit(code)
    status = (await asyncio.to_thread(os.waitpid, pid, 0))[1]
    assert os.waitstatus_to_exitcode(status) == 0
