"""The disk tier as the service uses it: threads, queues, restarts, one service a directory."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cache.builders import data_of, facts_of, hash_of
from cache.faulty_files import Faults, FaultyFiles
from headrace.clock import ManualClock
from headrace.errors import SettingsError
from headrace.frames import KV, EntryKey
from headrace_cache import disk
from headrace_cache.disk import BUDGET_BYTES_MIN, DiskTier, offer_bytes_for
from headrace_cache.disk_terms import Came
from headrace_cache.policy.lineage import Below

BUDGET_BYTES = 4 * 1024 * 1024
PATIENCE_S = 20.0
DAY_MS = 24 * 3600 * 1000


def key_of(name: object) -> EntryKey:
    return EntryKey(KV, hash_of(name))


def offer(tier: DiskTier, name: object, size_bytes: int = 5000, tenant: str = "t") -> bool:
    data = data_of(name, size_bytes)
    return tier.offer(facts_of(name, data, tenant=tenant), data)


@contextlib.contextmanager
def open_tier(path: Path, **options: object) -> Iterator[DiskTier]:
    tier = DiskTier(path, BUDGET_BYTES, **options)  # type: ignore[arg-type]
    tier.start().result(PATIENCE_S)
    try:
        yield tier
        assert tier.settle(PATIENCE_S)
        tier.check_integrity()
        assert tier.stats()["job_failures"] == 0
    finally:
        tier.close()


def test_what_was_offered_is_there_after_a_restart(tmp_path: Path) -> None:
    with open_tier(tmp_path) as tier:
        assert all(offer(tier, name) for name in range(100))
    with open_tier(tmp_path) as tier:
        places = tier.find_run([key_of(name) for name in [*range(100), "absent", 5]])
        assert len(places) == 100
        for name, loaded in enumerate(tier.read(places).result(PATIENCE_S)):
            assert loaded is not None and loaded.data == data_of(name, 5000)
            assert loaded.facts == facts_of(name, data_of(name, 5000))
        assert {(came, key) for came, key in tier.drain_events().changes} == {
            (Came.CAME, key_of(name)) for name in range(100)
        }
        assert tier.drain_events() == ([], 0)


def test_two_services_never_share_a_directory(tmp_path: Path) -> None:
    with open_tier(tmp_path), pytest.raises(SettingsError, match="another cache service"):
        DiskTier(tmp_path, BUDGET_BYTES).start()
    with open_tier(tmp_path):
        pass


def test_a_directory_that_cannot_be_had_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(SettingsError, match="file"):
        DiskTier(tmp_path / "file", BUDGET_BYTES_MIN).start()


def test_other_files_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "0000000000000007.segment").write_bytes(b"nonsense")
    with open_tier(tmp_path) as tier:
        assert tier.stats()["lost_segments"] == 1
        assert offer(tier, 1)
    assert (tmp_path / "notes.txt").read_text() == "mine"


class SlowFiles(FaultyFiles):
    """Appends wait until they may go on."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory, random.Random(1))
        self.go = threading.Event()

    def append(self, fd, buffers):  # type: ignore[no-untyped-def]
        self.go.wait(PATIENCE_S)
        return super().append(fd, buffers)


@pytest.mark.parametrize(("ram_mib", "mib"), [(1, 8), (48, 8), (512, 64), (100_000, 128)])
def test_what_may_wait_for_the_disk_goes_with_the_memory_there_is(ram_mib: int, mib: int) -> None:
    assert offer_bytes_for(ram_mib << 20) == mib << 20


def test_offers_that_find_no_room_are_refused(tmp_path: Path) -> None:
    """The disk is slow: a bounded number of bytes waits for it, the rest is told so at once."""
    files = SlowFiles(tmp_path)
    with open_tier(tmp_path, files=files, offer_bytes_max=50_000) as tier:
        taken = [name for name in range(100) if offer(tier, name)]
        assert 9 <= len(taken) <= 11
        assert tier.stats()["not_taken"] == 100 - len(taken)
        assert not tier.can_take(5000)
        files.go.set()
        assert tier.settle(PATIENCE_S)
        assert len(tier.find_run([key_of(name) for name in taken])) == len(taken)


def test_a_copy_is_taken(tmp_path: Path) -> None:
    """The arena reuses the bytes at once; what was offered is written all the same."""
    files = SlowFiles(tmp_path)
    with open_tier(tmp_path, files=files) as tier:
        data = bytearray(data_of("x", 1000))
        assert tier.offer(facts_of("x", data), data)
        data[:] = bytes(1000)
        files.go.set()
        assert tier.settle(PATIENCE_S)
        loaded = tier.read(tier.find_run([key_of("x")])).result(PATIENCE_S)[0]
        assert loaded is not None and loaded.data == data_of("x", 1000)


def test_a_full_disk_refuses_and_still_reads(tmp_path: Path) -> None:
    clock = ManualClock()
    files = FaultyFiles(tmp_path, random.Random(1))
    with open_tier(tmp_path, files=files, clock=clock) as tier:
        assert offer(tier, 1) and tier.settle(PATIENCE_S)
        files.faults = Faults(full=1.0)
        assert offer(tier, 2) and tier.settle(PATIENCE_S)
        assert not offer(tier, 3)
        assert tier.stats()["paused"] and tier.stats()["disk_full"] == 1
        assert tier.read(tier.find_run([key_of(1)])).result(PATIENCE_S)[0] is not None
        files.faults = Faults()
        clock.advance(1001)
        assert offer(tier, 3) and tier.settle(PATIENCE_S)
        assert tier.find(key_of(3)) is not None and tier.find(key_of(2)) is None


def test_purges_and_pins_outlive_a_restart(tmp_path: Path) -> None:
    """A purge covers what was offered just before; others' entries stay."""
    clock = ManualClock()
    with open_tier(tmp_path, clock=clock) as tier:
        for name in range(30):
            assert offer(tier, name, tenant="ab"[name % 2])
        assert tier.pin([key_of(1)], clock.wall_ms() + DAY_MS).result(PATIENCE_S) == 1
        assert tier.forget_tenant("a").result(PATIENCE_S) == 15
        assert tier.forget([key_of(3), key_of("absent")]).result(PATIENCE_S) == 1
        assert (
            len(tier.forget_where(lambda facts: facts.key == key_of(5)).result(PATIENCE_S).sizes)
            == 1
        )
        assert tier.tenant_bytes("a") == 0 and tier.tenant_bytes("b") == 13 * 5000
    with open_tier(tmp_path, clock=clock) as tier:
        held = [name for name in range(30) if tier.find(key_of(name)) is not None]
        assert held == [name for name in range(1, 30, 2) if name not in (3, 5)]
        assert tier.stats()["pinned_bytes"] == 5000
        for name in range(1000, 3000):
            while not offer(tier, name):
                assert tier.settle(PATIENCE_S)
        assert tier.settle(PATIENCE_S)
        assert [name for name in held if tier.find(key_of(name)) is not None] == [1]


def test_a_chain_is_forgotten_from_a_block_on(tmp_path: Path) -> None:
    """Chains leave RAM from their ends, so children stand before their parents; all go at once.

    0 - 1 - 2 - 3 - 4
          \\- 5 - 6      7 - 8
    """
    parents = {0: None, 1: 0, 2: 1, 3: 2, 4: 3, 5: 1, 6: 5, 7: None, 8: 7}
    with open_tier(tmp_path) as tier:
        for name, parent in reversed(parents.items()):
            data = data_of(name, 1000)
            above = hash_of(parent) if parent is not None else b""
            assert tier.offer(facts_of(name, data, parent=above, tenant="ab"[name == 6]), data)
        gone = tier.forget_where(lambda facts: facts.tenant == "a", Below(hash_of(2)))
        assert gone.result(PATIENCE_S).sizes == {key_of(name): 1000 for name in (2, 3, 4)}
        gone = tier.forget_where(lambda facts: facts.tenant == "a", Below(hash_of(1)))
        assert len(gone.result(PATIENCE_S).sizes) == 2
    with open_tier(tmp_path) as tier:
        assert [name for name in parents if tier.find(key_of(name))] == [0, 6, 7, 8]


def test_entries_are_listed_in_pages(tmp_path: Path) -> None:
    """In one order, each once; also of one chain alone."""
    with open_tier(tmp_path) as tier:
        for name in range(20):
            data = data_of(name, 100)
            above = hash_of(name - 2) if name > 1 else b""
            assert tier.offer(facts_of(name, data, parent=above, tenant="ab"[name % 2]), data)
        for below, first in ((None, 0), (Below(hash_of(8)), 8)):
            keys: list[EntryKey] = []
            start: int | None = 0
            while start is not None:
                page = tier.page(lambda facts: facts.tenant == "a", 4, start, below)
                entries, start = page.result(PATIENCE_S)
                assert 0 < len(entries) <= 4
                keys += [facts.key for facts in entries]
            assert keys == sorted(key_of(name) for name in range(first, 20, 2))


def test_events_that_nobody_fetches_are_counted_as_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk, "EVENTS_MAX", 10)
    with open_tier(tmp_path) as tier:
        for name in range(25):
            assert offer(tier, name)
        assert tier.settle(PATIENCE_S)
        changes, lost = tier.drain_events()
        assert len(changes) == 10 and lost == 15
        assert changes[-1] == (Came.CAME, key_of(24))


def test_whoever_waits_for_a_closed_tier_is_told(tmp_path: Path) -> None:
    tier = DiskTier(tmp_path, BUDGET_BYTES)
    tier.start().result(PATIENCE_S)
    assert offer(tier, 1) and tier.settle(PATIENCE_S)
    places = tier.find_run([key_of(1)])
    tier.close()
    assert tier.read(places).result(PATIENCE_S) == [None]
    assert tier.find(key_of(1)) is None and not offer(tier, 2)
    with pytest.raises(RuntimeError, match="closing"):
        tier.forget([key_of(1)]).result(PATIENCE_S)


def test_readers_beside_a_writer_that_drops_segments(tmp_path: Path) -> None:
    """Three threads read what a fourth rewrites round and round: right bytes or none."""
    stopping = threading.Event()
    problems: list[object] = []
    hits = [0, 0, 0]

    def read_on(tier: DiskTier, number: int) -> None:
        rng = random.Random(number)
        while not stopping.is_set():
            names = [rng.randrange(600) for _ in range(8)]
            places = [place for name in names if (place := tier.find(key_of(name)))]
            by_key = {key_of(name): name for name in names}
            for place, loaded in zip(places, tier.read(places).result(PATIENCE_S), strict=True):
                if loaded is not None and loaded.data != data_of(by_key[place.key], 20_000):
                    problems.append(place)
                hits[number] += loaded is not None

    with open_tier(tmp_path) as tier:
        readers = [threading.Thread(target=read_on, args=(tier, number)) for number in range(3)]
        for reader in readers:
            reader.start()
        for turn in range(1500):
            assert offer(tier, turn % 600, 20_000)
            if turn % 20 == 0:
                assert tier.settle(PATIENCE_S)
        stopping.set()
        for reader in readers:
            reader.join(PATIENCE_S)
        assert problems == [] and all(hits)
        assert tier.stats()["corrupt"] == 0 and tier.stats()["segments_dropped"] > 10


WRITER = """
import sys
from pathlib import Path
from cache.builders import data_of, facts_of
from headrace_cache.disk import DiskTier

tier = DiskTier(Path(sys.argv[1]), 4 * 1024 * 1024)
print("found", tier.start().result(), flush=True)
for name in range(10**9):
    data = data_of(name % 700, 20_000)
    while not tier.offer(facts_of(name % 700, data), data):
        tier.settle(0.01)
    if name % 50 == 0 and tier.settle(60):
        print(name, flush=True)
"""


def test_kill_minus_9_of_a_writing_process(tmp_path: Path) -> None:
    """A real process, killed while it writes: all that it held is whole, its lock is gone."""
    rng = random.Random(3)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    for _ in range(2):
        process = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE, env=environment
        )
        assert process.stdout is not None
        for _ in range(rng.randint(4, 8)):
            assert process.stdout.readline()
        time.sleep(rng.uniform(0, 0.02))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        with open_tier(tmp_path) as tier:
            named = [(name, tier.find(key_of(name))) for name in range(700)]
            places = [place for _, place in named if place is not None]
            assert len(places) > 50
            for place, loaded in zip(places, tier.read(places).result(PATIENCE_S), strict=True):
                name = next(name for name, found in named if found == place)
                assert loaded is not None and loaded.data == data_of(name, 20_000)
            assert tier.stats()["corrupt"] == 0
