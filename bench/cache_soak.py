"""A cache service at its watermark, for a while: do its promises hold, second by second?

    python -m bench cache_soak [--seconds 60] [--seed 1] [--json FILE]

One service (arena and disk), three tenants with quotas and guaranteed minimums, several client
processes for each, over shared memory and over TCP. All write more than they may hold, in mixed
sizes and bands and with pins of their own, read what they and others wrote, and hold what is lent
to them for a moment. Meanwhile the service is asked for its counters, and the system for its
memory and files. Each block that is read is compared with what its key says it is.

Times are the machine's own, so a seed repeats what is asked for but not every interleaving.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import mmap
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bench._cache_world import PATIENCE_S, Child, Counts, Service
from headrace import cache_admin, logs
from headrace.arena_view import HEADER_BYTES
from headrace.cache_client import CacheClient, PutEntry
from headrace.frames import KV, EntryKey
from headrace.types import Band
from headrace_cache.disk import offer_bytes_for
from headrace_cache.room import charged_bytes

MIB = 1 << 20
CACHE_BYTES = 48 * MIB
DISK_BYTES = 96 * MIB

SHARES = {"acme": (0.50, 0.30), "bolt": (0.40, 0.25), "cora": (0.60, 0.10)}
"""Quota and guaranteed minimum of each tenant, of the budget: quotas exceed it together."""

CLIENTS = (True, True, False)
"""For each tenant: whether a client process maps the arena, or receives over the socket."""

USERS = 2
"""That share a client."""

CHAINS = 160
"""Of each tenant, that come again: some three times its quota."""

CHAIN_LENGTH_MAX = 16
SIZES = (700, 8_000, 60_000, 360_000)
SIZE_WEIGHTS = (30, 30, 25, 15)
BLOCK_BYTES_MAX = charged_bytes(max(SIZES))
HOT_SHARE, FRESH_SHARE, FOREIGN_SHARE, PIN_SHARE = 0.4, 0.2, 0.1, 0.02
PIN_MS_MAX = 2_000
HOLD_S_MAX = 0.005

PINNED_CHAINS = 2
"""Of each tenant, pinned for the whole run."""

EVERY_S = 0.2
ROW_EVERY_S = 1.0
SETTLE_S_MAX = 5.0

MEMORY_BYTES_MAX = 32 * MIB + offer_bytes_for(CACHE_BYTES)
"""What the process may grow by beside the arena: copies that wait for the disk, which may be slow,
and the rest: indexes, buffers of connections, what is being read from disk."""


class Truth:
    """What each entry is, from its name alone."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._noise = random.Random(seed).randbytes(2 * max(SIZES))

    def hashes(self, tenant: str, chain: str) -> list[bytes]:
        """Of a chain, from its first block on."""
        first = hashlib.sha256(f"{self._seed}/{tenant}/{chain}".encode()).digest()
        hashes = [first]
        while len(hashes) <= first[0] % CHAIN_LENGTH_MAX:
            hashes.append(hashlib.sha256(hashes[-1]).digest())
        return hashes

    def data(self, key_hash: bytes) -> bytes:
        """Bytes that begin with their own name and differ in every part from most others'."""
        draw = random.Random(key_hash)
        size = draw.choices(SIZES, SIZE_WEIGHTS)[0] - len(key_hash)
        start = draw.randrange(max(SIZES))
        return key_hash + self._noise[start : start + size]

    def entries(
        self, tenant: str, hashes: Sequence[bytes], first: int, band: Band, pin_ms: int = 0
    ) -> list[PutEntry]:
        """The chain from `first` on, to be written; its last block pinned for `pin_ms`."""
        return [
            PutEntry(
                hash=hashes[depth],
                data=self.data(hashes[depth]),
                parent=hashes[depth - 1] if depth else b"",
                depth=depth,
                band=band,
                tenant=tenant,
                cost_tokens=16,
                cost_ms=4.0 + depth,
                pin_ms=pin_ms if depth == len(hashes) - 1 else 0,
            )
            for depth in range(first, len(hashes))
        ]


class User:
    """Asks for chains and writes what is missing of them, as a worker does."""

    def __init__(self, client: CacheClient, truth: Truth, tenant: str, name: str) -> None:
        self.counts = Counts()
        self._client = client
        self._truth = truth
        self._tenant = tenant
        self._rng = random.Random(name)
        self._name = name
        self._fresh = 0

    async def use(self, end_s: float) -> Counts:
        while time.monotonic() < end_s:
            await self._turn()
            await asyncio.sleep(0)
        return self.counts

    def _draw(self) -> tuple[str, str]:
        """A tenant, nearly always our own, and a chain of it."""
        rng = self._rng
        tenant = rng.choice(list(SHARES)) if rng.random() < FOREIGN_SHARE else self._tenant
        drawn = rng.random()
        if drawn < FRESH_SHARE and tenant == self._tenant:
            self._fresh += 1
            return tenant, f"{self._name} {self._fresh}"
        hot = drawn < FRESH_SHARE + HOT_SHARE
        return tenant, str(rng.randrange(CHAINS // 10 if hot else CHAINS))

    async def _turn(self) -> None:
        rng = self._rng
        tenant, chain = self._draw()
        hashes = self._truth.hashes(tenant, chain)
        band = rng.choices(list(Band), (10, 60, 30))[0]
        async with self._client.read(hashes, band=band, tenant=tenant) as run:
            self._check(tenant, chain, hashes, run.hashes, run.blocks, run.tier)
            if run.blocks and rng.random() < 0.2:
                await asyncio.sleep(rng.uniform(0, HOLD_S_MAX))
                self._check(tenant, chain, hashes, run.hashes, run.blocks, run.tier)
            found = len(run.blocks)
        self.counts.reads += len(hashes)
        if tenant == self._tenant and found < len(hashes):
            pin_ms = rng.randrange(1, PIN_MS_MAX) if rng.random() < PIN_SHARE else 0
            self.counts.puts += 1
            entries = self._truth.entries(tenant, hashes, found, band, pin_ms)
            self.counts.puts_held += await self._client.write(entries)

    def _check(
        self,
        tenant: str,
        chain: str,
        hashes: Sequence[bytes],
        found: Sequence[bytes],
        blocks: Sequence[memoryview],
        tier: str,
    ) -> None:
        counts = self.counts
        counts.disk_runs += tier == "disk"
        counts.arena_runs += tier == "arena"
        counts.remote_runs += tier == "remote"
        for depth, block in enumerate(blocks):
            counts.hits += 1
            if found[depth] != hashes[depth] or bytes(block) != self._truth.data(hashes[depth]):
                counts.wrong += 1
                counts.wrong_names.append(f"{tenant} {chain}/{depth} {tier}")


async def using(
    url: str, truth: Truth, tenant: str, name: str, end_s: float, *, arena: bool
) -> Counts:
    """One client process: some users on one client."""
    client = CacheClient(url, timeout_s=PATIENCE_S, put_timeout_s=PATIENCE_S, arena=arena)
    users = [User(client, truth, tenant, f"{name}.{number}") for number in range(USERS)]
    total = Counts()
    for counts in await asyncio.gather(*(user.use(end_s) for user in users)):
        total.add(asdict(counts))
    total.corrupt_refused = client.counts.corrupt
    total.errors = client.counts.puts_failed
    await client.close()
    return total


@dataclass(slots=True)
class Worst:
    """The worst that was seen; of what is bounded, with the bound beside it."""

    looks: int = 0
    quota_over_bytes: int = 0
    minimum_under_bytes: int = 0
    """Below a guaranteed minimum, since it was reached for the first time."""
    one_block_bytes: int = BLOCK_BYTES_MAX
    used_bytes: int = 0
    budget_bytes: int = CACHE_BYTES
    pinned_missing: int = 0
    """Pinned blocks that were not in memory, over all looks."""
    pinned_wrong: int = 0
    """Pinned blocks that were not read right, from memory, at the end."""
    memory_growth_bytes: int = 0
    """Anonymous memory of the process, above what it had at the start."""
    memory_growth_bytes_max: int = MEMORY_BYTES_MAX
    rss_bytes: int = 0
    rss_bytes_max: int = 0
    arena_bytes: int = 0
    arena_bytes_max: int = -(-(HEADER_BYTES + CACHE_BYTES) // mmap.PAGESIZE) * mmap.PAGESIZE
    disk_bytes: int = 0
    disk_bytes_max: int = DISK_BYTES
    reserved_bytes: int = 0
    leases: int = 0
    stats_ms: float = 0.0
    """How long the counters took to come, busy clients before them."""
    minimum_reached_s: dict[str, float] = field(default_factory=dict)
    memory_by_quarter: list[int] = field(default_factory=list)
    """Anonymous memory at the end of each quarter of the run: does it go on growing?"""


async def prepare(url: str, truth: Truth) -> dict[str, list[bytes]]:
    """Grant the quotas and pin some chains of each tenant; the pinned hashes."""
    client = CacheClient(url, timeout_s=PATIENCE_S, put_timeout_s=PATIENCE_S)
    pinned: dict[str, list[bytes]] = {}
    for tenant, (most, least) in SHARES.items():
        most_bytes, least_bytes = int(CACHE_BYTES * most), int(CACHE_BYTES * least)
        await ask(client, cache_admin.SetQuota(tenant, most_bytes, least_bytes))
        pinned[tenant] = []
        for number in range(PINNED_CHAINS):
            hashes = truth.hashes(tenant, f"pinned {number}")
            held = await client.write(truth.entries(tenant, hashes, 0, Band.BATCH))
            assert held, "there is room at the start"
            pin = cache_admin.Pin((EntryKey(KV, hashes[-1]),), 3_600_000, tenant)
            assert await ask(client, pin) == cache_admin.Changed(1), "and for pins"
            pinned[tenant] += hashes
    await client.close()
    return pinned


async def ask(client: CacheClient, request: cache_admin.Request) -> cache_admin.Answer:
    answer = cache_admin.decode_answer(await client.manage(cache_admin.encode(request)))
    if isinstance(answer, cache_admin.Refused):
        raise SystemExit(answer.message)
    return answer


class Watch:
    """Looks at the service from outside."""

    def __init__(self, service: Service, truth: Truth, pinned: dict[str, list[bytes]]) -> None:
        self.worst = Worst()
        self._service = service
        self._truth = truth
        self._pinned = pinned
        self._client = CacheClient(service.url, timeout_s=PATIENCE_S, put_timeout_s=PATIENCE_S)
        self._began_s = time.monotonic()
        memory = memory_of(service.pid)
        self._start_bytes = memory["RssAnon"]
        room_bytes = self.worst.arena_bytes_max + MEMORY_BYTES_MAX
        self.worst.rss_bytes_max = memory["VmRSS"] - memory["RssShmem"] + room_bytes

    async def watch(self, end_s: float) -> None:
        """Look every EVERY_S until `end_s`; a row a second."""
        print(HEAD, file=sys.stderr)
        next_row_s = self._began_s
        quarter_s = (end_s - self._began_s) / 4
        while (now_s := time.monotonic()) < end_s:
            row = await self._look(now_s - self._began_s)
            if now_s >= next_row_s:
                next_row_s += ROW_EVERY_S
                print(row, file=sys.stderr, flush=True)
            if now_s - self._began_s >= quarter_s * (1 + len(self.worst.memory_by_quarter)):
                self.worst.memory_by_quarter.append(self._growth_bytes())
            await asyncio.sleep(EVERY_S)
        self.worst.memory_by_quarter.append(self._growth_bytes())

    async def _look(self, now_s: float) -> str:
        worst, began_s = self.worst, time.monotonic()
        stats = await self._client.stats()
        if stats is None:
            raise SystemExit(f"the service does not answer: {self._service.log()[-2000:]}")
        worst.looks += 1
        worst.stats_ms = max(worst.stats_ms, round(1000 * (time.monotonic() - began_s), 1))
        self._look_at_shares(stats["quotas"], now_s)
        rss, growth = memory_of(self._service.pid)["VmRSS"], self._growth_bytes()
        arena, disk = self._arena_bytes(), folder_bytes(self._service.disk)
        seen = {name: stats[name] for name in ("used_bytes", "reserved_bytes", "leases")}
        seen |= {"rss_bytes": rss, "memory_growth_bytes": growth}
        for name, value in (seen | {"arena_bytes": arena, "disk_bytes": disk}).items():
            setattr(worst, name, max(getattr(worst, name), value))
        worst.pinned_missing += await self._missing_pinned()
        shares = [share["used_bytes"] for share in stats["quotas"].values()]
        sizes = [*shares, stats["used_bytes"], stats["pinned_bytes"], growth, arena, disk]
        row = "".join(f"{size / MIB:>9.2f}" for size in sizes)
        return f"{now_s:5.1f}{row}{stats['entries']:>9}{stats['leases']:>7}"

    def _look_at_shares(self, shares: dict[str, dict[str, int]], now_s: float) -> None:
        worst = self.worst
        for tenant, share in shares.items():
            used = share["used_bytes"]
            worst.quota_over_bytes = max(worst.quota_over_bytes, used - share["max_bytes"])
            under = share["min_bytes"] - used
            if under <= 0:
                worst.minimum_reached_s.setdefault(tenant, round(now_s, 1))
            if tenant in worst.minimum_reached_s:
                worst.minimum_under_bytes = max(worst.minimum_under_bytes, under)

    async def _missing_pinned(self) -> int:
        """Pinned blocks that are not in memory now. Listing them counts as no use of them."""
        missing = 0
        for tenant, hashes in self._pinned.items():
            there: set[bytes] = set()
            cursor = 0
            while True:
                wish = cache_admin.ListEntries(tenant, limit=1_000, cursor=cursor)
                listed = await ask(self._client, wish)
                assert isinstance(listed, cache_admin.Listed), "a list was asked for"
                there |= {e.key.hash for e in listed.entries if e.tiers & cache_admin.IN_RAM}
                cursor = listed.cursor
                if not cursor:
                    break
            missing += sum(each not in there for each in hashes)
        return missing

    def _growth_bytes(self) -> int:
        return memory_of(self._service.pid)["RssAnon"] - self._start_bytes

    def _arena_bytes(self) -> int:
        file = self._service.arena_file()
        return 512 * file.stat().st_blocks if file is not None else 0

    async def end(self) -> dict[str, Any]:
        """What the service says once all clients are gone; the pinned blocks are read then."""
        end_s = time.monotonic() + SETTLE_S_MAX
        while True:
            stats = await self._client.stats() or {}
            held = stats.get("leases", 1) or stats.get("reserved_bytes", 1)
            if not held or time.monotonic() > end_s:
                break
            await asyncio.sleep(EVERY_S)
        for hashes in self._pinned.values():
            for key_hash in hashes:
                async with self._client.read([key_hash]) as run:
                    right = [bytes(block) for block in run.blocks] == [self._truth.data(key_hash)]
                    self.worst.pinned_wrong += not right or run.tier == "disk"
        await self._client.close()
        return stats


HEAD = (
    "    s"
    + "".join(f"{name:>9}" for name in (*SHARES, "used", "pinned", "memory", "arena", "disk"))
    + f"{'entries':>9}{'leases':>7}   MiB; memory: grown by, beside the arena"
)


def memory_of(pid: int) -> dict[str, int]:
    """Bytes of a process's memory, as the system counts them."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    pairs = [line.split() for line in lines if line.endswith(" kB")]
    return {name.rstrip(":"): 1024 * int(kilobytes) for name, kilobytes, _ in pairs}


def folder_bytes(folder: Path) -> int:
    size_bytes = 0
    for path in folder.glob("*.segment"):
        try:
            size_bytes += path.stat().st_size
        except FileNotFoundError:
            continue  # dropped since it was listed
    return size_bytes


def run_all(seconds: float, seed: int, directory: Path) -> dict[str, Any]:
    """The whole run; what it came to."""
    truth = Truth(seed)
    service = Service(directory, cache_bytes=CACHE_BYTES, disk_bytes=DISK_BYTES)
    service.start(tcp=True)
    try:
        pinned = asyncio.run(prepare(service.url, truth))
        end_s = time.monotonic() + seconds
        # forked before this process has an event loop that runs
        children = [
            client_process(service.url, truth, tenant, f"{seed} {tenant} {number}", end_s, arena)
            for tenant in SHARES
            for number, arena in enumerate(CLIENTS)
        ]
        return asyncio.run(run_with(children, service, truth, pinned, end_s)) | {"seed": seed}
    finally:
        service.kill()


def client_process(
    url: str, truth: Truth, tenant: str, name: str, end_s: float, arena: bool
) -> Child:
    return Child(lambda _: using(url, truth, tenant, name, end_s, arena=arena))


async def run_with(
    children: Sequence[Child],
    service: Service,
    truth: Truth,
    pinned: dict[str, list[bytes]],
    end_s: float,
) -> dict[str, Any]:
    watch, total = Watch(service, truth, pinned), Counts()
    began_s = time.monotonic()
    await watch.watch(end_s)
    for child in children:
        total.add(await asyncio.to_thread(child.result))
    seconds = time.monotonic() - began_s
    stats = await watch.end()
    by_tenant = stats["by_tenant"].values()
    return {
        "seconds": round(seconds, 1),
        "clients": len(children),
        **asdict(total),
        "hit_bytes": sum(tally["hit_bytes"] for tally in by_tenant),
        "evictions": sum(tally["evictions"] for tally in by_tenant),
        "kept": sum(tally["kept"] for tally in by_tenant),
        "refused": sum(tally["refused"] for tally in by_tenant),
        "worst": asdict(watch.worst),
        "held_at_the_end": stats["leases"] + stats["reserved_bytes"],
        "disk": stats["disk"],
        "tracebacks": service.log().count("Traceback"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path, help="also write the result there")
    parser.add_argument("--keep-log", type=Path, help="copy the service's log there")
    args = parser.parse_args()
    logs.setup("bench", level="error", json=False)
    with tempfile.TemporaryDirectory() as directory:
        result = run_all(args.seconds, args.seed, Path(directory))
        if args.keep_log is not None:
            args.keep_log.write_bytes((Path(directory) / "log").read_bytes())
    text = json.dumps(result, indent=2)
    print(text)
    if args.json is not None:
        args.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
