"""Seeded fault runs of the cache service: is anything wrong ever served?

    python -m bench cache_faults [--runs 1000] [--seed 1] [--only FAULT] [--json FILE]

Each run draws a fault and the traffic around it: real clients (in the arena and over the socket)
write, read and are killed; the service is killed or stopped and started again on the same disk;
writes to the disk fail half-way as on a full one; bytes of its files or of its shared memory are
overwritten; two writers bring different bytes for the same blocks. Every block that is read is
compared with what the seed says it is. Timing is the machine's own, so a seed repeats what is done
but not every interleaving.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench._cache_world import CHAINS, Child, Counts, Service, Truth, reading, writing
from headrace import logs
from headrace.arena_view import HEADER_BYTES

CHECKED_CHAINS = 10
KILL_AFTER_S_MAX = 0.05
COPIES_MAX = 20
TRAFFIC_S = 0.06
ARENA_HITS = 60


class Run:
    """One run: a fault, its traffic, and the check behind it."""

    def __init__(self, rng: random.Random, truth: Truth, service: Service, counts: Counts) -> None:
        self.rng = rng
        self.counts = counts
        self.notes: dict[str, int] = {}
        self._truth = truth
        self._service = service
        self._touched: set[int] = set()

    # who takes part

    def chains(self, count: int) -> list[int]:
        """Some chains, which the check at the end reads too."""
        drawn = self.rng.sample(range(CHAINS), count)
        self._touched |= set(drawn)
        return drawn

    def writer(self, chains: list[int], version: int = 0) -> Child:
        arena = self.rng.random() < 0.6
        url, truth = self._service.url, self._truth
        return Child(lambda filling: writing(url, truth, chains, version, filling, arena=arena))

    def reader(self, chains: list[int], seconds: float = TRAFFIC_S) -> Child:
        arena = self.rng.random() < 0.6
        url, truth = self._service.url, self._truth
        return Child(
            lambda holding: reading(url, truth, chains, holding, arena=arena, seconds=seconds)
        )

    def kill(self, child: Child) -> bool:
        """Kill a client in the middle of a copy (or a read), or shortly after; whether it was."""
        copies = self.rng.randint(1, COPIES_MAX)
        return child.kill_in_the_middle(copies, self.rng.choice([0.0, self.rng.uniform(0, 0.003)]))

    def note(self, name: str, count: int = 1) -> None:
        self.notes[name] = self.notes.get(name, 0) + count

    def done(self, *children: Child) -> None:
        for child in children:
            self.counts.add(child.result())

    def check(self) -> None:
        """Read what was touched, and some more, by both ways."""
        chains = sorted(self._touched | set(self.chains(CHECKED_CHAINS)))
        for arena in (True, False):
            counts = asyncio.run(
                reading(self._service.url, self._truth, chains, arena=arena, seconds=0)
            )
            self.counts.add(asdict(counts))

    # faults

    def writer_killed(self) -> None:
        """kill -9 in the middle of a copy; the same blocks can be written again at once."""
        chains = self.chains(3)
        reader = self.reader(chains)
        copying = self.kill(self.writer(chains))
        self.note("killed_while_copying", copying)
        again = self.writer(chains, 1).result()
        self.note("chains_to_write_again", len(chains))
        self.note("chains_written_again", again.get("puts_held", 0))
        self.counts.add(again)
        self.done(reader)

    def reader_killed(self) -> None:
        """kill -9 of a reader that holds leases, while others need its room."""
        chains = self.chains(4)
        self.done(self.writer(chains))
        victim = self.reader(chains, 1.0)
        writer = self.writer(self.chains(4))
        self.note("killed_while_reading", self.kill(victim))
        self.done(writer)

    def service_killed(self) -> None:
        """kill -9 of the service under traffic; it comes back on the same disk."""
        writer, reader = self.writer(self.chains(5)), self.reader(self.chains(5))
        time.sleep(self.rng.uniform(0, KILL_AFTER_S_MAX))
        self._service.kill()
        self._restart()
        self.done(writer, reader)

    def service_stopped(self) -> None:
        """SIGTERM: what was in memory may come back from disk, and must be right."""
        self.done(self.writer(self.chains(5)))
        self._service.kill(signal.SIGTERM)
        self._restart()

    def _restart(self) -> None:
        self._service.start(tcp=self.rng.random() < 0.5)

    def disk_full(self) -> None:
        """Writes to disk fail half-way; at times the service is killed meanwhile."""
        self._service.set_full(True)
        self.done(self.writer(self.chains(6)), self.reader(self.chains(3)))
        if self.rng.random() < 0.3:
            self._service.kill()
            self._restart()
        self.check()
        self._service.set_full(False)

    def corrupt_segment(self) -> None:
        """Bytes of the disk's files are overwritten or cut, while the service runs or is down."""
        self.done(self.writer(self.chains(4)))
        running = self.rng.random() < 0.5
        if not running:
            self._service.kill()
        for path in self._service.segments():
            if self.rng.random() < 0.3:
                self.note("segments_damaged")
                _damage(path, self.rng)
        if not running:
            self._restart()

    def corrupt_arena(self) -> None:
        """Bytes of the shared memory are overwritten behind everybody's back."""
        self.done(self.writer(self.chains(4)))
        path = self._service.arena_file()
        if path is None:
            self.note("no_arena_file")
            return
        with path.open("r+b") as file:
            size = path.stat().st_size
            for _ in range(ARENA_HITS):
                file.seek(self.rng.randrange(HEADER_BYTES, size))
                file.write(self.rng.randbytes(8))
        self.chains(CHECKED_CHAINS)

    def two_writers(self) -> None:
        """Two bring different bytes for the same blocks; at times one dies of it."""
        chains = self.chains(4)
        first, second = self.writer(chains, 0), self.writer(chains, 1)
        reader = self.reader(chains)
        if self.rng.random() < 0.5:
            self.note("killed_while_copying", self.kill(first))
            self.done(second, reader)
        else:
            self.done(first, second, reader)


FAULTS: dict[str, Callable[[Run], None]] = {
    "writer_killed": Run.writer_killed,
    "reader_killed": Run.reader_killed,
    "service_killed": Run.service_killed,
    "service_stopped": Run.service_stopped,
    "disk_full": Run.disk_full,
    "corrupt_segment": Run.corrupt_segment,
    "corrupt_arena": Run.corrupt_arena,
    "two_writers": Run.two_writers,
}


def _damage(path: Path, rng: random.Random) -> None:
    with path.open("r+b") as file:
        size = os.fstat(file.fileno()).st_size
        if not size:
            return
        for _ in range(rng.choice([1, 10, 100])):
            file.seek(rng.randrange(size))
            file.write(rng.randbytes(rng.choice([1, 8, 512])))
        if rng.random() < 0.1:
            file.truncate(rng.randrange(size))


def run_all(runs: int, seed: int, only: str, directory: Path) -> dict[str, Any]:
    """All runs; what they came to."""
    truth, counts = Truth(seed), Counts()
    service = Service(directory)
    by_fault = dict.fromkeys(FAULTS, 0)
    notes: dict[str, int] = {}
    began = time.monotonic()
    service.start(tcp=False)
    try:
        for number in range(runs):
            rng = random.Random(f"{seed}/{number}")
            fault = only or rng.choice(list(FAULTS))
            by_fault[fault] += 1
            run = Run(rng, truth, service, counts)
            FAULTS[fault](run)
            run.check()
            asyncio.run(service.look())
            for name, count in run.notes.items():
                notes[name] = notes.get(name, 0) + count
            if number % 50 == 49:
                print(f"{number + 1} runs, {counts.hits} hits, {counts.wrong} wrong",
                      file=sys.stderr)  # fmt: skip
    finally:
        service.set_full(False)
        service.kill()
    return {
        "runs": runs,
        "seed": seed,
        "seconds": round(time.monotonic() - began, 1),
        **asdict(counts),
        "by_fault": by_fault,
        **notes,
        "service_starts": service.starts,
        "service_deaths": service.deaths,
        "service_tracebacks": service.log().count("Traceback"),
        "disk": service.disk_counts(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", choices=sorted(FAULTS), default="")
    parser.add_argument("--json", type=Path, help="also write the result there")
    parser.add_argument("--keep-log", type=Path, help="copy the service's log there")
    args = parser.parse_args()
    logs.setup("bench", level="error", json=False)
    with tempfile.TemporaryDirectory() as directory:
        result = run_all(args.runs, args.seed, args.only, Path(directory))
        if args.keep_log is not None:
            args.keep_log.write_bytes((Path(directory) / "log").read_bytes())
    text = json.dumps(result, indent=2)
    print(text)
    if args.json is not None:
        args.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
