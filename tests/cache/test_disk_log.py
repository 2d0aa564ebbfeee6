"""The disk tier's log under faults: killed between any two system calls, full, broken, corrupt.

What is read is compared with all that was ever written under its key; what was forgotten must not
come back. Seeds are printed by the test's parameters.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import pytest

from cache.builders import data_of, facts_of, hash_of
from cache.faulty_files import Faults, FaultyFiles, Killed
from headrace.clock import ManualClock
from headrace.frames import KV, EntryKey
from headrace.types import Band
from headrace_cache.disk_log import DiskLog
from headrace_cache.disk_terms import Came, Outcome
from headrace_cache.segments import segment_name, segment_number

BUDGET_BYTES = 128 * 1024
SEGMENT_BYTES = 16 * 1024
NAMES = 60
TENANTS = ("a", "b", "c")
DAY_MS = 24 * 3600 * 1000


@lru_cache(maxsize=4096)
def key_of(name: object) -> EntryKey:
    return EntryKey(KV, hash_of(name))


class World:
    """A directory, the log in it, and the truth about what it may say."""

    def __init__(self, directory: Path, seed: int, faults: Faults | None = None) -> None:
        self.rng = random.Random(seed)
        self.directory = directory
        directory.mkdir(exist_ok=True)
        self.clock = ManualClock()
        self.written: dict[int, set[bytes]] = {}
        self.forgotten: set[int] = set()
        self.events: dict[EntryKey, Came] = {}
        self.counts: dict[str, int] = {}
        self.start(faults or Faults())

    def start(self, faults: Faults) -> None:
        self.files = FaultyFiles(self.directory, self.rng, faults)
        self.events.clear()
        self.log = DiskLog(self.files, BUDGET_BYTES, self.clock, self._heard, SEGMENT_BYTES)
        self.log.recover()

    def _heard(self, came: Came, key: EntryKey) -> None:
        self.events[key] = came

    def kill(self) -> None:
        self.files.bury()

    def put(self, name: int, *, band: Band = Band.STANDARD, pinned_until_ms: int = 0) -> Outcome:
        version = self.rng.randrange(3)
        data = data_of((name, version), self.rng.randint(40, 3000))
        facts = facts_of(name, data, tenant=TENANTS[name % 3], band=band)
        self.written.setdefault(name, set()).add(data)
        outcome = self.log.put(facts, data, pinned_until_ms)
        if outcome is Outcome.WRITTEN:
            self.forgotten.discard(name)
        return outcome

    def forget(self, names: list[int]) -> None:
        """Of a purge that fails, nothing is known; one that returns is for good."""
        try:
            self.log.forget([key_of(name) for name in names])
        except OSError:
            self.forgotten -= set(names)
        else:
            self.forgotten |= set(names)

    def forget_tenant(self, tenant: str) -> None:
        names = {name for name in range(NAMES) if TENANTS[name % 3] == tenant}
        try:
            self.log.forget_tenant(tenant)
        except OSError:
            self.forgotten -= names
        else:
            self.forgotten |= names

    def held(self) -> set[int]:
        return {name for name in range(NAMES) if self.log.catalog.find(key_of(name)) is not None}

    def segment_of(self, name: int) -> str:
        place = self.log.catalog.find(key_of(name))
        assert place is not None
        return segment_name(place.segment)

    def check(self) -> int:
        """Read everything there is and compare; the entries found."""
        names = list(range(NAMES))
        self.rng.shuffle(names)
        found = [(name, self.log.catalog.find(key_of(name))) for name in names]
        places = [(name, place) for name, place in found if place is not None]
        loaded = self.log.read([place for _, place in places])
        hits = 0
        for (name, _), each in zip(places, loaded, strict=True):
            assert name not in self.forgotten, "what was forgotten stays forgotten"
            if each is not None:
                assert each.facts.key == key_of(name)
                assert bytes(each.data) in self.written[name], "only what was written is read"
                assert each.facts.tenant == TENANTS[name % 3]
                hits += 1
        self.log.check_integrity()
        return hits

    def disk_bytes(self) -> int:
        return sum(
            path.stat().st_size
            for path in self.directory.iterdir()
            if segment_number(path.name) is not None
        )

    def step(self) -> None:
        """One thing that may happen to a log."""
        rng, name = self.rng, self.rng.randrange(NAMES)
        choice = rng.random()
        if choice < 0.70:
            until_ms = self.clock.wall_ms() + DAY_MS if rng.random() < 0.1 else 0
            self.put(name, band=rng.choice(list(Band)), pinned_until_ms=until_ms)
        elif choice < 0.85:
            place = self.log.catalog.find(key_of(name))
            if place is not None:
                self.log.read([place])
        elif choice < 0.90:
            self.log.pin([key_of(name)], self.clock.wall_ms() + DAY_MS * rng.randrange(2))
        elif choice < 0.95:
            self.forget([name, rng.randrange(NAMES)])
        elif choice < 0.96:
            self.forget_tenant(rng.choice(TENANTS))
        self.clock.advance(rng.choice([1, 100, 5000]))


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    world = World(tmp_path / "disk", 1)
    yield world
    world.kill()


@pytest.mark.parametrize("seed", range(80))
def test_killed_between_any_two_calls(tmp_path: Path, seed: int) -> None:
    """Several lives in one directory, each ended at a random system call, some in recovery too.

    What the log knew when it was killed is there after the next start.
    """
    world = World(tmp_path / "disk", seed)
    for _ in range(3):
        kill_at = world.files.calls + world.rng.randint(1, 400)
        world.files.faults = Faults(short=0.2, kill_at=kill_at)
        with contextlib.suppress(Killed):
            for _ in range(80):
                forgotten = set(world.forgotten)
                world.step()
                forgotten = set(world.forgotten)
        world.forgotten &= forgotten  # a purge that was cut off promises nothing
        known = {name: world.segment_of(name) for name in world.held()}
        world.kill()
        with contextlib.suppress(Killed):
            world.start(Faults(short=0.1, kill_at=world.rng.randint(1, 60)))
        world.kill()
        world.start(Faults())
        left = {path.name for path in world.directory.iterdir()}
        kept = {name for name, segment in known.items() if segment in left}
        assert kept <= world.held(), "nothing whole is lost but with the oldest segments"
        assert len(kept) >= 0.6 * len(known)
        assert world.disk_bytes() <= BUDGET_BYTES
        world.check()
    world.kill()


@pytest.mark.parametrize("seed", range(25))
def test_a_kill_between_two_operations_loses_nothing(tmp_path: Path, seed: int) -> None:
    world = World(tmp_path / "disk", seed)
    for _ in range(4):
        for _ in range(world.rng.randint(0, 150)):
            world.step()
        before = world.held()
        pinned = {name: world.log.catalog.pinned_until_ms(key_of(name)) for name in before}
        world.kill()
        world.start(Faults())
        assert world.held() == before
        after = {name: world.log.catalog.pinned_until_ms(key_of(name)) for name in before}
        now_ms = world.clock.wall_ms()
        assert {n for n, until in after.items() if until > now_ms} == {
            n for n, until in pinned.items() if until > now_ms
        }
        assert world.check() == len(before)
        assert {
            name for name in range(NAMES) if world.events.get(key_of(name)) is Came.CAME
        } == before
    world.kill()


@pytest.mark.parametrize("seed", range(30))
def test_full_and_broken_disks(tmp_path: Path, seed: int) -> None:
    """Any call may fail: nothing wrong is read, and once the disk is well it is used again."""
    world = World(tmp_path / "disk", seed)
    for _ in range(3):
        world.files.faults = Faults(
            short=0.1, full=world.rng.choice([0.0, 0.1, 1.0]),
            broken=world.rng.choice([0.0, 0.05]), flipped=world.rng.choice([0.0, 0.02]),
        )  # fmt: skip
        for _ in range(80):
            world.step()
        world.files.faults = Faults()
        world.check()
        if world.rng.random() < 0.5:
            world.kill()
            world.start(Faults())
            world.check()
    world.clock.advance(100_000)
    assert world.put(NAMES) is Outcome.WRITTEN
    world.kill()


@pytest.mark.parametrize("seed", range(30))
def test_corrupt_files(tmp_path: Path, seed: int) -> None:
    """Bytes of the files change while nobody looks, between lives and within them."""
    world = World(tmp_path / "disk", seed)
    for _ in range(4):
        for _ in range(60):
            world.step()
        world.forgotten.clear()  # a note that forgets may be among what is lost
        if world.rng.random() < 0.5:
            world.kill()
            damage(world)
            world.start(Faults())
        else:
            damage(world)
        world.check()
        assert world.disk_bytes() <= BUDGET_BYTES
    world.kill()


def damage(world: World) -> None:
    """Flip, overwrite or cut some of the files."""
    rng = world.rng
    for path in sorted(world.directory.iterdir()):
        size = path.stat().st_size
        if rng.random() < 0.4 and size:
            with path.open("r+b") as file:
                file.seek(rng.randrange(size))
                file.write(rng.randbytes(rng.choice([1, 1, 8, 512])))
                if rng.random() < 0.2:
                    file.truncate(rng.randrange(size))


def test_the_oldest_go_first_and_the_budget_holds(world: World) -> None:
    for name in range(400):
        data = data_of(name, 2000)
        assert world.log.put(facts_of(name, data), data) is Outcome.WRITTEN
        assert world.disk_bytes() <= world.log.used_bytes <= BUDGET_BYTES
    held = [name for name in range(400) if world.log.catalog.find(key_of(name)) is not None]
    assert held == list(range(400 - len(held), 400))
    assert len(held) * 2000 > 0.7 * BUDGET_BYTES
    went = {key for key, came in world.events.items() if came is Came.WENT}
    assert went == {key_of(name) for name in range(400)} - {key_of(name) for name in held}


def test_what_is_pinned_or_read_is_carried_over(world: World) -> None:
    """Pins stay as long as they last; what was read stays one more round, the rest goes."""
    for name in range(NAMES):
        data = data_of(name, 1000)
        world.log.put(facts_of(name, data), data)
    until_ms = world.clock.wall_ms() + DAY_MS
    assert world.log.pin([key_of(0), key_of(1), key_of("absent")], until_ms) == 2
    place = world.log.catalog.find(key_of(2))
    assert place is not None and world.log.read([place])[0] is not None
    more(world, 1000, 1060)
    assert [name for name in range(5) if world.log.catalog.find(key_of(name))] == [0, 1, 2]
    more(world, 2000, 2200)
    assert [name for name in range(5) if world.log.catalog.find(key_of(name))] == [0, 1]
    world.clock.advance(2 * DAY_MS)
    more(world, 3000, 3200)
    assert [name for name in range(5) if world.log.catalog.find(key_of(name))] == []
    assert world.log.catalog.pinned_bytes == 0


def more(world: World, first: int, last: int) -> None:
    for name in range(first, last):
        data = data_of(name, 1500)
        assert world.log.put(facts_of(name, data), data) is Outcome.WRITTEN


def test_pins_hold_no_more_than_their_share(world: World) -> None:
    """Everything is offered pinned: a quarter is, and newcomers still find room."""
    until_ms = world.clock.wall_ms() + DAY_MS
    for name in range(500):
        data = data_of(name, 1000)
        assert world.log.put(facts_of(name, data), data, until_ms) is Outcome.WRITTEN
        assert world.log.catalog.pinned_bytes <= BUDGET_BYTES / 4
    assert world.log.catalog.find(key_of(0)) is not None, "those that were pinned first stay"
    assert world.log.catalog.find(key_of(499)) is not None
    world.log.check_integrity()


def test_a_full_disk_is_left_alone_for_a_while(world: World) -> None:
    assert world.put(1) is Outcome.WRITTEN
    world.files.faults = Faults(full=1.0)
    assert world.put(2) is Outcome.FAILED
    assert not world.log.can_write()
    calls = world.files.calls
    assert world.put(3) is Outcome.PAUSED
    assert world.files.calls == calls, "while it pauses no call is made"
    place = world.log.catalog.find(key_of(1))
    assert place is not None and world.log.read([place])[0] is not None, "it is read from on"
    world.clock.advance(1001)
    assert world.put(3) is Outcome.FAILED, "tried again, and left alone for longer"
    world.clock.advance(1001)
    assert world.put(3) is Outcome.PAUSED
    world.files.faults = Faults()
    world.clock.advance(1001)
    assert world.put(3) is Outcome.WRITTEN
    assert world.log.counts.disk_full == 2


def test_a_purge_holds_on_a_full_disk(world: World) -> None:
    """No room for the note that forgets: the oldest segments go until there is, or none is left."""
    for name in range(NAMES):
        world.put(name)
    world.files.faults = Faults(full=1.0)
    assert world.log.forget_tenant("a") > 0
    world.kill()
    world.start(Faults())
    assert not {name for name in world.held() if TENANTS[name % 3] == "a"}


def test_what_is_wrong_before_it_is_written_is_refused(world: World) -> None:
    data = data_of("x", 1000)
    facts = facts_of("x", data)
    assert world.log.put(facts, data[:-1]) is Outcome.CORRUPT
    assert world.log.put(facts, b"y" + data[1:]) is Outcome.CORRUPT
    large = data_of("large", SEGMENT_BYTES)
    assert world.log.put(facts_of("large", large), large) is Outcome.TOO_LARGE
    assert world.log.put(facts, data) is Outcome.WRITTEN
    assert world.log.put(facts, data) is Outcome.PRESENT


def test_a_place_that_moved_is_found_again(world: World) -> None:
    """Between the lookup and the read the entry is carried over; the read still finds it."""
    world.put(1)
    world.log.pin([key_of(1)], world.clock.wall_ms() + DAY_MS)
    place = world.log.catalog.find(key_of(1))
    assert place is not None
    more(world, 1000, 1200)
    assert world.log.catalog.find(key_of(1)) != place
    loaded = world.log.read([place._replace(size_bytes=place.size_bytes)])[0]
    assert loaded is not None and bytes(loaded.data) in world.written[1]


def test_a_chain_is_read_in_one_call_a_run(world: World) -> None:
    """Written from its end, as chains leave RAM; read in order, with few system calls."""
    chain = list(range(10))
    for name in reversed(chain):
        data = data_of(name, 1000)
        world.log.put(facts_of(name, data), data)
    places = world.log.catalog.find_run([key_of(name) for name in [*chain, "absent", 5]])
    assert len(places) == 10
    buffers = [memoryview(bytearray(place.size_bytes)) for place in places]
    calls = world.files.calls
    loaded = world.log.read(places, buffers)
    assert world.files.calls == calls + 1
    for name, each, buffer in zip(chain, loaded, buffers, strict=True):
        assert each is not None and each.data is buffer and buffer == data_of(name, 1000)
