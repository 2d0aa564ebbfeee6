"""Sums, gathers and broadcasts: right, bit-identical on all ranks, counted, and never for ever."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from headrace_worker import native
from headrace_worker.native.sums import StepSums
from headrace_worker.parallel.collective import (
    ONE_TURN_BYTES_MAX,
    PeerError,
    SharedGroup,
    minimal_bytes,
)
from worker.ranks import together

SLOT_BYTES = 1 << 18


def numbers(rank: int, count: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(rank)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [2, 3, 4])
def test_all_ranks_get_the_same_bits(size: int, dtype: torch.dtype) -> None:
    """Few numbers in one turn, many in two, more than a slot in pieces; one after another."""
    counts = [1, 5, 700, ONE_TURN_BYTES_MAX // 4 + 3, SLOT_BYTES + 17]

    def work(group: SharedGroup) -> list[torch.Tensor]:
        found = [group.all_reduce(numbers(group.rank, count, dtype)) for count in counts]
        group.check_integrity()
        return found

    results = together(size, work, SLOT_BYTES)
    for i, count in enumerate(counts):
        wide = sum(numbers(rank, count, dtype).double() for rank in range(size))
        torch.testing.assert_close(
            results[0][i].double(), wide, rtol=0, atol=1e-5 if dtype is torch.float32 else 0.05
        )
        assert all(torch.equal(found[i], results[0][i]) for found in results)


def test_sums_are_in_place_and_counted() -> None:
    """Of small sums everybody reads everything; large ones come near the least that is possible."""

    def work(group: SharedGroup) -> list[tuple[int, int]]:
        noted = []
        for count in (100, 60_000):
            group.counts.messages = group.counts.bytes = 0
            x = torch.ones(count // 10, 10)
            assert group.all_reduce(x) is x and bool((x == group.size).all())
            noted.append((group.counts.messages, group.counts.bytes))
        return noted

    for noted in together(4, work, SLOT_BYTES):
        assert noted == [(1, 3 * 400), (2, minimal_bytes(4, 240_000))]


def test_gather_and_broadcast_mix_with_sums() -> None:
    """Ranks run ahead of each other by a turn at most, whatever comes after what."""

    def work(group: SharedGroup) -> int:
        for turn in range(60):
            mine = torch.full((turn * 40 + 1,), float(group.rank + turn))
            gathered = group.gather(mine.clone(), to=turn % 3)
            if gathered is None:
                assert turn % 3 != group.rank
            else:
                assert [float(part[-1]) for part in gathered] == [turn, turn + 1.0, turn + 2.0]
            told = group.broadcast(mine.clone(), source=(turn + 1) % 3)
            assert bool((told == turn + (turn + 1) % 3).all())
            assert float(group.all_reduce(mine)[0]) == 3 * turn + 3
            group.check_integrity()
        return group.counts.messages

    assert len(set(together(3, work, 1 << 10))) <= 3


@pytest.mark.parametrize("size", [2, 3, 4])
def test_sums_in_the_kernels_and_in_python_follow_each_other(size: int) -> None:
    """The same bits and the same counts from either, in one turn, by shares, in several runs."""
    library = native.library()
    if library is None:
        pytest.skip(f"no native kernels: {native.state()}")
    counts = [1, 7, 5_000, 40_000, 70_001]  # a slot holds 65,536 numbers, 16,384 are one turn

    def work(group: SharedGroup) -> tuple[list[torch.Tensor], tuple[int, int, int]]:
        sums, found = StepSums(group), []
        for number, count in enumerate(counts * 2):
            source = torch.Generator().manual_seed(number % len(counts) * 10 + group.rank)
            x = torch.randn(count, generator=source)
            if number >= len(counts):
                found.append(group.all_reduce(x))
                continue
            with sums.lent() as lent:
                library.add_up(lent, x)
            found.append(x)
            if number == 1:
                own = (group.counts.messages, group.counts.bytes, group.turn)
                assert torch.equal(group.all_reduce(torch.ones(3)), torch.full((3,), float(size)))
                assert group.turn == own[2] + 1
        group.check_integrity()
        return found, (group.counts.messages, group.counts.bytes, group.turn)

    ranks = together(size, work, 1 << 18)
    for found, told in ranks:
        assert told[0] == ranks[0][1][0]
        for mine, first in zip(found, ranks[0][0], strict=True):
            assert torch.equal(mine, first)
        for native_sum, python_sum in zip(found[: len(counts)], found[len(counts) :], strict=True):
            assert torch.equal(native_sum, python_sum)


def test_a_rank_that_is_missing_in_a_step_is_named() -> None:
    library = native.library()
    if library is None:
        pytest.skip(f"no native kernels: {native.state()}")
    memory = np.zeros(SharedGroup.bytes_needed(2, 1024), np.uint8)
    sums = StepSums(SharedGroup(memory, 0, 2, patience_s=0.05))
    with pytest.raises(PeerError, match="rank 1 did not come"), sums.lent() as lent:
        library.add_up(lent, torch.ones(3))


def test_who_does_not_come_ends_the_wait() -> None:
    memory = np.zeros(SharedGroup.bytes_needed(2, 1024), np.uint8)
    group = SharedGroup(memory, 0, 2, patience_s=0.05)
    with pytest.raises(PeerError, match="rank 1 did not come"):
        group.all_reduce(torch.ones(3))


PROGRAM = """
import sys, torch, torch.distributed as dist
from headrace_worker import native
from headrace_worker.native.sums import SumsApart
from headrace_worker.parallel.collective import TorchGroup
from worker.test_parallel_collective import SOCKET_COUNTS, numbers
rank, folder = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=4)
pair, library = dist.new_group([0, 1]), native.library()
for made in [pair, dist.group.WORLD][rank > 1:]:
    group, found, counted = TorchGroup(made), [], []
    for count in SOCKET_COUNTS:
        for dtype in (torch.float32, torch.bfloat16):
            group.counts.bytes = group.counts.messages = 0
            found.append(group.all_reduce(numbers(rank, count, dtype)))
            counted.append((group.counts.messages, group.counts.bytes))
        if library is not None:
            x = numbers(rank, count, torch.float32)
            with SumsApart(group).lent() as lent:
                library.add_up(lent, x)
            assert torch.equal(x, found[-2]), "what native steps do within"
    parts = group.gather(torch.full((4,), float(rank)))
    assert (parts is None) == (rank > 0)
    assert parts is None or [float(p[0]) for p in parts] == list(range(group.size))
    assert int(group.broadcast(torch.tensor([rank + 7]))[0]) == 7
    torch.save((found, counted), f"{folder}/{rank} of {group.size}")
if rank == 0 and library is not None:
    dist.recv(torch.empty(1), 1)  # rank 1 comes to no sum any more
    try:
        with SumsApart(group).lent() as lent:
            library.add_up(lent, torch.ones(3))
            library.add_up(lent, torch.ones(3))  # asks nobody again
    except Exception as error:
        assert type(error).__name__ == "PeerError", error
    else:
        raise AssertionError("a sum without its ranks")
elif rank == 1 and library is not None:
    dist.send(torch.ones(1), 0)
del group, made, pair  # their threads end here: at the interpreter's end they abort at times
dist.destroy_process_group()
"""

SOCKET_COUNTS = [5, 700, ONE_TURN_BYTES_MAX // 2 + 3]
"""The last one goes by shares, in either dtype, among more than two ranks."""


def test_over_sockets_sums_have_the_bits_of_common_memory(tmp_path: Path) -> None:
    """torch.distributed's gloo between processes; in the kernels too, which say who is gone.

    Large sums cost what is the least that is possible, but for shares that differ by a number.
    """
    argv = [sys.executable, "-c", PROGRAM]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": ":".join(sys.path)}
    ranks = [subprocess.Popen([*argv, str(rank), str(tmp_path)], env=env) for rank in range(4)]
    assert [rank.wait(150) for rank in ranks] == [0] * 4
    cases = [(n, dtype) for n in SOCKET_COUNTS for dtype in (torch.float32, torch.bfloat16)]

    def work(group: SharedGroup) -> list[torch.Tensor]:
        return [group.all_reduce(numbers(group.rank, count, dtype)) for count, dtype in cases]

    for size in (2, 4):
        expected = together(size, work, SLOT_BYTES)[0]
        for rank in range(size):
            found, counted = torch.load(tmp_path / f"{rank} of {size}")
            for case, mine, theirs, noted in zip(cases, found, expected, counted, strict=True):
                assert torch.equal(mine, theirs)
                size_bytes = case[0] * case[1].itemsize
                least = minimal_bytes(size, size_bytes)
                if size > 2 and case[0] == SOCKET_COUNTS[-1]:
                    assert noted[0] == 2 and abs(noted[1] - least) <= 8 * size
                else:
                    assert noted == (1, (size - 1) * size_bytes)
