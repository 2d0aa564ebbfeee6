"""The arena's extents, its file, and what becomes of both when a process dies."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.arena_view import HEADER_BYTES, ArenaView
from headrace.errors import WireError
from headrace.frames import Welcome
from headrace_cache import arena as arena_module
from headrace_cache.arena import GRANULE_BYTES, NOBODY, Arena

KB = 1024


def welcome_of(arena: Arena, seat: int = 1, **changes: object) -> Welcome:
    fields = {
        "id": 1,
        "path": arena.path,
        "nonce": arena.nonce,
        "size_bytes": arena.mapped_bytes,
        "seat": seat,
    }
    return Welcome(**(fields | changes))  # type: ignore[arg-type]


def take(arena: Arena, size_bytes: int, owner: int = 1) -> int:
    place = arena.take(size_bytes, owner)
    assert place is not None, "there is room"
    return place


# ----- extents


def test_the_smallest_free_extent_that_fits_is_taken() -> None:
    """Holes of 3 and 1 KB: what takes 1 KB goes into the small one, and leaves the large one."""
    arena = Arena(10 * KB)
    places = [take(arena, size * KB) for size in (3, 1, 1, 5)]
    arena.free(places[0])
    arena.free(places[2])
    assert take(arena, KB) == places[2]
    assert take(arena, 3 * KB) == places[0]
    assert arena.take(1, 1) is None
    arena.check_integrity()


def test_free_neighbours_become_one() -> None:
    arena = Arena(4 * KB)
    places = [take(arena, KB) for _ in range(4)]
    for place in (places[0], places[2], places[1]):
        arena.free(place)
        arena.check_integrity()
    assert take(arena, 3 * KB) == places[0]


def test_memory_is_had_from_the_system_as_it_is_needed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(arena_module, "GROWTH_BYTES", 64 * KB)
    arena = Arena(1 << 20, tmp_path)

    def allocated() -> int:
        return Path(arena.path).stat().st_blocks * 512

    assert allocated() < 64 * KB
    take(arena, 1)
    assert 64 * KB <= allocated() < 128 * KB
    take(arena, 600 * KB)
    assert 600 * KB <= allocated() < 1 << 20
    arena.check_integrity()
    arena.close()


@pytest.mark.parametrize(
    ("said", "given"),
    [
        ("always within_size [advise] never deny force", True),
        ("always within_size advise [never] deny force", False),
        ("always within_size advise never [deny] force", False),
        (None, False),
    ],
)
def test_huge_pages_are_asked_for_and_done_without(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, said: str | None, given: bool
) -> None:
    """What the kernel says is told; memory is there either way, and no more than was grown."""
    if said is not None:
        (tmp_path / "shmem_enabled").write_text(said)
    monkeypatch.setattr(arena_module, "HUGE_PAGES", tmp_path)
    monkeypatch.setattr(arena_module, "GROWTH_BYTES", 64 * KB)
    arena = Arena(32 << 20, tmp_path)
    assert arena.huge_pages is given
    places = [take(arena, 5000 * KB) for _ in range(6)]
    for number, place in enumerate(places):
        arena.view(place, 5000 * KB)[:] = bytes([number]) * (5000 * KB)
    for number, place in enumerate(places):
        assert arena.view(place, 5000 * KB) == bytes([number]) * (5000 * KB)
    arena.check_integrity()
    arena.close()


def test_a_kernel_that_makes_no_pages_ahead_makes_them_when_they_are_ensured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "shmem_enabled").write_text("[always]")
    monkeypatch.setattr(arena_module, "HUGE_PAGES", tmp_path)
    monkeypatch.setattr(arena_module, "MADV_POPULATE_WRITE", 9999)
    arena = Arena(32 << 20, tmp_path)
    arena.view(take(arena, 100 * KB), 100 * KB)[:] = b"x" * (100 * KB)
    assert Path(arena.path).stat().st_blocks * 512 >= arena_module.GROWTH_BYTES
    arena.close()


def test_a_full_file_system_is_an_answer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What there is can be used on; nothing is promised that has no memory behind it."""
    monkeypatch.setattr(arena_module, "GROWTH_BYTES", 64 * KB)
    arena = Arena(1 << 20, tmp_path)
    place = take(arena, 60 * KB)

    def full(*_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    assert arena.take(60 * KB, 1) is None
    assert arena.free_bytes == 4 * KB
    take(arena, 4 * KB)
    arena.free(place)
    take(arena, 30 * KB)
    arena.check_integrity()
    arena.close()


def test_without_a_file_system_memory_is_private(tmp_path: Path) -> None:
    arena = Arena(KB, tmp_path / "missing")
    assert arena.path == ""
    arena.view(take(arena, KB), KB)[:] = b"x" * KB
    assert not arena.is_mapped_by(1)


def test_too_small_a_file_system_is_not_begun_with(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As a container's /dev/shm of 64 MB: better all entries in private memory than few shared."""
    there = os.statvfs(tmp_path)
    few = os.statvfs_result([*there[:4], 10, *there[5:10]])
    monkeypatch.setattr(os, "statvfs", lambda _: few)
    assert Arena(10 * there.f_frsize, tmp_path).path == ""
    assert Arena(KB, tmp_path).path != ""


STEPS = st.lists(
    st.tuples(st.sampled_from(["take", "take", "free", "pin", "compact"]), st.integers(1, 9_000)),
    max_size=80,
)


@given(steps=STEPS)
def test_any_program_keeps_extents_apart_and_their_bytes(steps: list[tuple[str, int]]) -> None:
    """Extents of all sizes come, go and are slid together, some of which may not be moved.

    Whenever enough is free in sum and nothing is in the way, there is room.
    """
    arena = Arena(32 * KB)
    places: dict[int, tuple[int, bytes]] = {}  # by owner
    fixed: set[int] = set()
    for owner, (what, number) in enumerate(steps):
        if what == "take":
            place = arena.take(number, owner)
            if place is not None:
                data = owner.to_bytes(2) * (number // 2 + 1)
                places[owner] = (place, data[:number])
                arena.view(place, number)[:] = data[:number]
        elif what in ("free", "pin") and places:
            chosen = sorted(places)[number % len(places)]
            if what == "pin":
                fixed.add(chosen)
                continue
            arena.free(places.pop(chosen)[0])
            fixed.discard(chosen)
        elif what == "compact":

            def moved(owner: int, place: int) -> None:
                assert owner not in fixed
                places[owner] = (place, places[owner][1])

            done = arena.compact(number, lambda place: arena.owner(place) not in fixed, moved)
            enough = arena.free_bytes >= -(-number // GRANULE_BYTES) * GRANULE_BYTES
            assert enough or not done
            if enough and not fixed and not arena.free_bytes % GRANULE_BYTES and done:
                arena.free(take(arena, number))
        arena.check_integrity()
        for each, (place, data) in places.items():
            assert arena.owner(place) == each
            assert arena.view(place, len(data)) == data


def test_pieces_are_slid_together_and_the_least_is_moved() -> None:
    """Holes of 1, 1 and 2 KB with 5 and 1 KB between them: 3 KB are had by moving 1 KB."""
    arena = Arena(12 * KB)
    sizes = [1, 5, 1, 1, 2, 2]
    places = [take(arena, size * KB, owner) for owner, size in enumerate(sizes)]
    for index in (0, 2, 4):
        arena.free(places[index])
    arena.view(places[3], KB)[:] = b"m" * KB
    moves: list[tuple[int, int]] = []
    assert arena.take(3 * KB, 9) is None
    assert arena.compact(3 * KB, lambda _: True, lambda *move: moves.append(move))
    assert moves == [(3, places[2])]
    assert arena.view(places[2], KB) == b"m" * KB
    take(arena, 3 * KB)
    arena.check_integrity()


def test_what_may_not_move_is_in_the_way() -> None:
    arena = Arena(3 * KB)
    places = [take(arena, KB, owner) for owner in range(3)]
    arena.free(places[0])
    arena.free(places[2])
    assert not arena.compact(2 * KB, lambda _: False, lambda *_: None)
    arena.disown(places[1])
    assert arena.owner(places[1]) == NOBODY
    assert arena.compact(2 * KB, lambda _: True, lambda *_: None)


# ----- the file, seen by a client


def test_a_client_reads_and_writes_in_place(tmp_path: Path) -> None:
    arena = Arena(1 << 20, tmp_path)
    place = take(arena, 5_000)
    view = ArenaView.open(welcome_of(arena))
    assert view is not None
    view.view(place, 5_000)[:] = b"c" * 5_000
    assert arena.view(place, 5_000) == b"c" * 5_000
    for wrong in ((0, 10), (HEADER_BYTES - 1, 10), (arena.mapped_bytes - 5, 10), (1 << 40, 1)):
        with pytest.raises(WireError):
            view.view(*wrong)
    arena.close()
    assert not list(tmp_path.iterdir()), "the file goes with the service"
    assert view.view(place, 1) == b"c", "who has it mapped keeps the memory"


@pytest.mark.parametrize(
    "change",
    [{"path": ""}, {"path": "/nonexistent"}, {"nonce": b"another service!"}, {"size_bytes": 4096}],
)
def test_what_is_not_the_services_arena_is_not_used(tmp_path: Path, change: object) -> None:
    arena = Arena(1 << 20, tmp_path)
    assert ArenaView.open(welcome_of(arena, **change)) is None  # type: ignore[arg-type]
    (tmp_path / "link").symlink_to(arena.path)
    assert ArenaView.open(welcome_of(arena, path=str(tmp_path / "link"))) is None
    arena.close()


def test_the_service_knows_who_has_the_arena_mapped(tmp_path: Path) -> None:
    """As long as a view of it is anywhere, even if all else is forgotten."""
    arena = Arena(1 << 20, tmp_path)
    view = ArenaView.open(welcome_of(arena, seat=7))
    assert view is not None
    assert [arena.is_mapped_by(seat) for seat in (6, 7)] == [False, True]
    assert ArenaView.open(welcome_of(arena, seat=7)) is None, "a seat is one client's"
    part = view.view(take(arena, 10), 10)
    del view
    assert arena.is_mapped_by(7)
    del part
    assert not arena.is_mapped_by(7)
    arena.close()


CLIENT = """
import sys, time
from headrace.arena_view import ArenaView
from headrace.frames import Welcome
path, nonce, size = sys.argv[1:]
view = ArenaView.open(Welcome(1, path, bytes.fromhex(nonce), int(size), 3))
print("mapped" if view else "not mapped", flush=True)
time.sleep(60)
"""


def test_the_lock_of_a_killed_client_is_gone(tmp_path: Path) -> None:
    arena = Arena(1 << 20, tmp_path)
    arguments = [arena.path, arena.nonce.hex(), str(arena.mapped_bytes)]
    client = subprocess.Popen(
        [sys.executable, "-c", CLIENT, *arguments], stdout=subprocess.PIPE, text=True
    )
    try:
        assert client.stdout is not None
        assert client.stdout.readline() == "mapped\n"
        assert arena.is_mapped_by(3)
    finally:
        client.send_signal(signal.SIGKILL)
        client.communicate()
    assert not arena.is_mapped_by(3)
    arena.close()


def test_what_a_killed_service_left_is_removed_by_the_next(tmp_path: Path) -> None:
    """But not what belongs to a service that runs, nor what is none of ours."""
    script = (
        "import os, sys; from pathlib import Path; from headrace_cache.arena import Arena;"
        "Arena(1 << 20, Path(sys.argv[1])); os._exit(9)"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=False)
    (left,) = tmp_path.iterdir()
    (tmp_path / "notes").write_text("mine")
    first = Arena(1 << 20, tmp_path)
    assert not left.exists()
    second = Arena(1 << 20, tmp_path)
    assert Path(first.path).exists()
    assert (tmp_path / "notes").exists()
    first.close()
    second.close()
