"""Copies that are checked as they are made, and the threads that share a batch of them."""

from __future__ import annotations

import asyncio
import os
import platform
import random
import shutil
import threading
import time
from array import array
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cache.builders import data_of
from headrace import cache_threads, copying
from headrace.cache_threads import COPIERS, copy_all, in_threads
from headrace.checksum import checksum
from headrace.compiled import MACHINES, C
from headrace.copying import CHECKED_BYTES, Copies, copy_checked

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


@pytest.fixture
def compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], str]:
    """Starts a process's copies anew, with a cache directory of their own; what they are then."""
    monkeypatch.setenv("HEADRACE_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv(copying.VARIABLE, raising=False)
    monkeypatch.setattr(copying, "_library", copying._Library())

    def prepared() -> str:
        copying.prepare()
        for thread in threading.enumerate():
            if thread.name == "headrace-compiler":
                thread.join(PATIENCE_S)
        return copying.state()

    return prepared


needs_compiler = pytest.mark.skipif(
    platform.machine() not in MACHINES or not any(map(shutil.which, C.compilers)),
    reason="no C compiler, or not for this processor",
)


@needs_compiler
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    sizes=st.lists(st.integers(1, 40_000), min_size=1, max_size=5),
    offsets=st.tuples(st.integers(0, 80), st.integers(0, 80)),
    seed=st.integers(0, 1000),
)
def test_copies_in_c_are_those_of_python(
    native: None, sizes: list[int], offsets: tuple[int, int], seed: int
) -> None:
    """Any sizes at any addresses: the bytes, nothing beside them, and the CRCs."""
    total, (out, into) = sum(sizes), offsets
    data = bytearray(random.Random(seed).randbytes(total + out))
    memory = bytearray(total + into + 8)
    sources, targets, at = [], [], 0
    for size in sizes:
        sources.append(memoryview(data)[out + at : out + at + size])
        targets.append(memoryview(memory)[into + at : into + at + size])
        at += size
    copies = Copies.of(targets, sources)
    assert copies is not None
    copies.run()
    assert memory == bytes(into) + data[out:] + bytes(8)
    assert copies.crcs == [checksum(source) for source in sources]
    summed = Copies.of([None] * len(sources), [bytes(source) for source in sources])
    assert summed is not None
    summed.run()
    assert summed.crcs == copies.crcs


@pytest.fixture(scope="module")
def native() -> None:
    copying.prepare()
    end = time.monotonic() + PATIENCE_S
    while copying.state() == "being compiled" and time.monotonic() < end:
        time.sleep(0.01)
    assert copying.state() == "native"


def aligned(size_bytes: int) -> memoryview:
    """Memory from a whole line of the cache on."""
    memory = memoryview(bytearray(size_bytes + copying.LINE_BYTES))
    start = -copying._address(memory) % copying.LINE_BYTES
    return memory[start : start + size_bytes]


@needs_compiler
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    words=st.integers(1, 3000),
    width=st.sampled_from([2, 4]),
    wrong=st.one_of(st.none(), st.integers(0, 100_000)),
    sign=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_numbers_are_looked_through_as_they_are_copied(
    native: None, words: int, width: int, wrong: int | None, sign: bool, seed: int
) -> None:
    """One too many, wherever it stands and whatever its sign, and there is no CRC."""
    kind, bits = {2: ("H", 16), 4: ("I", 32)}[width]
    most, signed = {2: 0x7F7F, 4: 0x7F7FFFFF}[width], 1 << (bits - 1)
    dice = random.Random(seed)
    numbers = array(
        kind, [dice.randint(0, most) | dice.choice((0, signed)) for _ in range(8 * words // width)]
    )
    if wrong is not None:
        numbers[wrong % len(numbers)] = most + 1 | signed * sign
    source, target = memoryview(numbers).cast("B"), aligned(8 * words)
    places = (copying._address(target), copying._address(source))
    crc = copying.copy_numbers(*places, len(source), width, most)
    assert bytes(target) == bytes(source)
    assert crc == (checksum(source) if wrong is None else -1)


@needs_compiler
def test_what_c_does_not_look_through_is_left_alone(native: None) -> None:
    """Off a line's start, of no whole words, or numbers of another kind."""
    target, source = aligned(128), bytearray(b"1" * 64)
    place, from_ = copying._address(target), copying._address(source)
    for to, size, width in ((place + 8, 64, 2), (place, 60, 2), (place, 64, 1)):
        assert copying.copy_numbers(to, from_, size, width, 0x7F7F) is None
    assert not any(target)


@needs_compiler
def test_a_target_that_c_cannot_write_is_not_passed_over(native: None) -> None:
    """Python's way says what is wrong with it; in C it would be a checksum without a copy."""
    source = data_of(1, 1000)
    for target in (memoryview(bytes(1000)), memoryview(bytearray(2000))[::2]):
        assert Copies.of([target], [source]) is None


@needs_compiler
def test_copies_are_compiled_once(compiled: Callable[[], str], tmp_path: Path) -> None:
    """The first process compiles; the next one finds the library and has it at once."""
    assert compiled() == "native"
    (library,) = (tmp_path / "kernels").glob("copying-*.so")
    before = library.stat().st_mtime_ns
    copying._library = copying._Library()
    copying.prepare()
    assert copying.state() == "native"
    assert library.stat().st_mtime_ns == before


@needs_compiler
async def test_without_a_compiler_python_copies(
    compiled: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor with one that fails, nor where it is switched off."""
    sources = [data_of(number, LARGE) for number in range(3)]
    for variable, value in (("PATH", "/nowhere"), ("CC", "false"), (copying.VARIABLE, "off")):
        with monkeypatch.context() as patch:
            patch.setenv(variable, value)
            copying._library = copying._Library()
            assert compiled() not in ("native", "being compiled")
            memory = [bytearray(LARGE) for _ in sources]
            assert Copies.of(list(map(memoryview, memory)), sources) is None
            crcs = await copy_all(list(map(memoryview, memory)), sources)
            assert memory == sources
            assert crcs == list(map(checksum, sources)) == await copy_all([None] * 3, sources)


@needs_compiler
async def test_a_batch_of_copies_that_is_given_up_begins_no_further_one(native: None) -> None:
    """`stop` leaves what was not begun, and `done` comes all the same."""
    sources = [bytearray(data_of(number, 1000)) for number in range(10)]
    memory = [bytearray(1000) for _ in sources]
    copies = Copies.of(list(map(memoryview, memory)), sources)
    assert copies is not None
    copies.stop()
    copies.run()
    assert not any(map(any, memory))


@needs_compiler
async def test_a_batch_copied_by_turns_lets_the_loop_go_on_between_them(
    native: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On two cores: nothing but the event loop's own thread copies, some of the entries at a time.
    Who gives up the wait has the rest uncopied."""
    monkeypatch.setattr(cache_threads, "COPIERS_ASIDE", 1)
    monkeypatch.setattr(cache_threads, "TURN_BYTES_MAX", LARGE)
    sources = [data_of(number, size) for number, size in enumerate([LARGE, LARGE // 2, 7, LARGE])]
    memory = [memoryview(bytearray(len(source))) for source in sources]
    copying_all = asyncio.ensure_future(copy_all(memory, sources, asyncio.Lock()))
    turns = []
    while not copying_all.done():
        await asyncio.sleep(0)
        turns.append([bytes(each) == source for each, source in zip(memory, sources, strict=True)])
    assert copying_all.result() == list(map(checksum, sources))
    assert turns[0] == [True, False, False, False] and turns[-1] == [True] * 4
    for each in memory:
        each[:] = bytes(len(each))
    given_up = asyncio.ensure_future(copy_all(memory, sources, asyncio.Lock()))
    await asyncio.sleep(0)
    given_up.cancel()
    await asyncio.wait({given_up})
    assert bytes(memory[0]) == sources[0] and not any(memory[3])


@needs_compiler
async def test_batches_copied_by_turns_come_one_after_the_other(
    native: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Taking turns entry by entry, both would be done as late as the second. Who gives up waiting
    is passed over."""
    monkeypatch.setattr(cache_threads, "COPIERS_ASIDE", 1)
    monkeypatch.setattr(cache_threads, "TURN_BYTES_MAX", LARGE)
    sources = [data_of(number, LARGE) for number in range(3)]
    memory = [[memoryview(bytearray(LARGE)) for _ in sources] for _ in range(3)]
    turn = asyncio.Lock()
    copying_all = [asyncio.ensure_future(copy_all(each, sources, turn)) for each in memory]
    await asyncio.sleep(0)
    copying_all[1].cancel()
    while not copying_all[2].done():
        assert memory[0] == sources or not any(map(any, memory[2]))
        await asyncio.sleep(0)
    assert await copying_all[2] == list(map(checksum, sources))
    assert memory[2] == sources and not any(map(any, memory[1]))
    assert not turn.locked()


async def test_calls_have_their_turn_in_the_event_loop_where_that_copies(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As a worker's blocks are. What may take long, and is given no turn, is for threads."""
    monkeypatch.setattr(cache_threads, "COPIERS_ASIDE", 1)
    here, turn = threading.get_ident(), asyncio.Lock()

    def thread(number: int) -> tuple[int, bool]:
        return number, threading.get_ident() == here

    sizes = [LARGE] * 5
    assert await in_threads(thread, sizes, turn) == [(number, True) for number in range(5)]
    assert await in_threads(thread, sizes) == [(number, False) for number in range(5)]
    monkeypatch.setattr(cache_threads, "COPIERS_ASIDE", 2)
    assert await in_threads(thread, sizes, turn) == [(number, False) for number in range(5)]
