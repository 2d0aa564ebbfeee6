"""The cache's eviction policies, replayed: what each would have hit, on traces and synthetic loads.

    python -m bench cache_policy [--trace FILE …] [--synthetic NAME …] [--sizes 3000,10000,30000]
        [--policies keep-score,lru,…] [--part hits|weighted|pins|index|all] [--json FILE]

`hits`: blocks found, as a share of all blocks asked for. Only the leading run of a prompt counts,
as in serving; what is missing is put in, in order, until one is turned away. `infinite`: a cache
that never loses anything. Sizes are in blocks; synthetic loads run at a tenth of them.
`weighted`: the same with a band for each conversation, drawn as 10 % interactive, 60 % standard,
30 % batch; a block counts by the weight of its request's band (the policy's WEIGHTS).
`pins`: every hundredth request pins the first blocks of its prompt for good, as far as a quarter of
the cache allows; of all later requests for pinned blocks, how many were hits.
`index`: memory and time of the index and the policy together at a million entries, in a fresh
process; the chain looked up is one of many, drawn anew each time.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from bench._prefixes import SYNTHETIC, Requests, from_trace, synthetic
from headrace.frames import KV, EntryKey
from headrace.types import Band
from headrace_cache.index import Index, Record, Tier
from headrace_cache.policy.eviction import NO_SLOT, NOT_PINNED, EvictionPolicy, Facts
from headrace_cache.policy.keep_score import WEIGHTS
from headrace_cache.policy.names import POLICIES

MIX = {Band.INTERACTIVE: 0.1, Band.STANDARD: 0.6, Band.BATCH: 0.3}
SYNTHETIC_REQUESTS = 4_000
SYNTHETIC_SHARE = 0.1
PIN_EVERY = 100
PINNED_BLOCKS = 4
PINNED_SHARE = 0.25
FOR_GOOD_MS = 1 << 60
INDEX_ENTRIES = 1_000_000
INDEX_CHAIN = 1_000


@dataclass
class Score:
    """What a replay found, of what was asked for, in blocks and weighted by band."""

    asked: int = 0
    hits: int = 0
    weighted_asked: float = 0.0
    weighted_hits: float = 0.0
    pinned_asked: int = 0
    pinned_hits: int = 0
    seconds: float = 0.0


class Replay:
    """A cache of `room` blocks, each of size 1; a block's number is its slot."""

    def __init__(self, policy: EvictionPolicy | None, room: int, requests: Requests) -> None:
        blocks = 1 + max((max(blocks) for blocks in requests if blocks), default=0)
        self.policy, self.room = policy, room
        self.score = Score()
        self._here = bytearray(blocks)
        self._used = 0
        self._names = [_name(block) for block in range(blocks)]

    def run(self, requests: Requests, bands: Sequence[Band], pin_every: int = 0) -> Score:
        began = time.process_time()
        for number, (blocks, band) in enumerate(zip(requests, bands, strict=True)):
            self._count(blocks, band, number)
            self._fill(blocks, band, number)
            if pin_every and self.policy is not None and number % pin_every == 0:
                for block in blocks[:PINNED_BLOCKS]:
                    if self._here[block]:
                        self.policy.pin(block, FOR_GOOD_MS)
        self.score.seconds = time.process_time() - began
        if self.policy is not None:
            self.policy.check_integrity()
        return self.score

    def _count(self, blocks: list[int], band: Band, now: int) -> None:
        run = next((at for at, block in enumerate(blocks) if not self._here[block]), len(blocks))
        score = self.score
        score.asked += len(blocks)
        score.hits += run
        score.weighted_asked += WEIGHTS[band] * len(blocks)
        score.weighted_hits += WEIGHTS[band] * run
        if self.policy is None:
            return
        if self.policy.pinned_bytes:
            pinned = [self.policy.pinned_until_ms(block) != NOT_PINNED for block in blocks]
            score.pinned_asked += sum(pinned)
            score.pinned_hits += sum(pinned[:run])
        for block in blocks[:run]:
            self.policy.touch(block, now, band)

    def _fill(self, blocks: list[int], band: Band, now: int) -> None:
        parent = NO_SLOT
        for depth, block in enumerate(blocks):
            if not self._here[block] and not self._admit(block, parent, depth, band, now):
                return
            parent = block

    def _admit(self, block: int, parent: int, depth: int, band: Band, now: int) -> bool:
        self._here[block] = 1
        self._used += 1
        if self.policy is not None:
            name = self._names[block]
            self.policy.admit(block, Facts(1, band, parent, depth=depth, name=name), now)
            if self._used > self.room:
                for victim in self.policy.victims(self._used - self.room, now):
                    self._here[victim.slot] = 0
                    self._used -= 1
        return bool(self._here[block])


def _name(block: int) -> int:
    return int.from_bytes(sha256(block.to_bytes(8)).digest()[:8])


def bands_of(requests: Requests, seed: int) -> list[Band]:
    """One for each conversation, known by its second block: the first is often everybody's."""
    drawn: dict[int, Band] = {}
    bands = []
    for blocks in requests:
        who = blocks[min(1, len(blocks) - 1)] if blocks else -1
        if who not in drawn:
            rng = random.Random(f"{seed}/{who}")
            drawn[who] = rng.choices(list(MIX), weights=list(MIX.values()))[0]
        bands.append(drawn[who])
    return bands


def hits(requests: Requests, names: list[str], sizes: list[int]) -> dict[str, list[float]]:
    """Hit ratios by policy, one a size; infinite has one for all."""
    same = [Band.STANDARD] * len(requests)
    rows = {}
    for name in names:
        scores = [
            Replay(POLICIES[name](None), room, requests).run(requests, same) for room in sizes
        ]
        rows[name] = [score.hits / score.asked for score in scores]
        spent = 1e6 * sum(score.seconds for score in scores) / sum(score.asked for score in scores)
        cells = "".join(f"{ratio:9.4f}" for ratio in rows[name])
        print(f"  {name:12}{cells}   {spent:5.1f} us a block", flush=True)
    everything = Replay(None, 0, requests).run(requests, same)
    rows["infinite"] = [everything.hits / everything.asked] * len(sizes)
    print(f"  {'infinite':12}" + "".join(f"{ratio:9.4f}" for ratio in rows["infinite"]))
    return rows


def weighted(requests: Requests, sizes: list[int], seed: int) -> dict[str, list[float]]:
    """Weighted hit ratios of LRU and keep-score, their quotient, and what no cache exceeds."""
    bands = bands_of(requests, seed)
    rows: dict[str, list[float]] = {}
    for name in ("lru", "keep-score"):
        scores = [
            Replay(POLICIES[name](None), room, requests).run(requests, bands) for room in sizes
        ]
        rows[name] = [score.weighted_hits / score.weighted_asked for score in scores]
    best = Replay(None, 0, requests).run(requests, bands)
    rows["infinite"] = [best.weighted_hits / best.weighted_asked] * len(sizes)
    for name in ("keep-score", "infinite"):
        pairs = zip(rows[name], rows["lru"], strict=True)
        rows[f"{name} / lru"] = [one / other if other else 0.0 for one, other in pairs]
    for name, cells in rows.items():
        print(f"  {name:18}" + "".join(f"{cell:9.4f}" for cell in cells))
    return rows


def pins(requests: Requests, names: list[str], sizes: list[int]) -> dict[str, list[float]]:
    """Hits among requests for pinned blocks, by policy, one a size."""
    same = [Band.STANDARD] * len(requests)
    rows = {}
    for name in names:
        scores = [
            Replay(POLICIES[name](int(PINNED_SHARE * room)), room, requests).run(
                requests, same, PIN_EVERY
            )
            for room in sizes
        ]
        rows[name] = [score.pinned_hits / max(1, score.pinned_asked) for score in scores]
        asked = ", ".join(str(score.pinned_asked) for score in scores)
        print(f"  {name:12}" + "".join(f"{r:9.4f}" for r in rows[name]) + f"   of {asked}")
    return rows


def _rss_bytes() -> int:
    fields = Path("/proc/self/statm").read_text().split()
    return int(fields[1]) * 4096


def index_figures() -> dict[str, float]:
    """Fills an index and a policy with chains; bytes an entry, and times of operations."""
    gc.collect()
    gc.freeze()
    before = _rss_bytes()
    index, policy = Index(), POLICIES["keep-score"](None)
    chains = INDEX_ENTRIES // INDEX_CHAIN
    began = time.perf_counter()
    for chain in range(chains):
        parent = b""
        for depth in range(INDEX_CHAIN):
            key = EntryKey(KV, _hash(chain, depth))
            facts = Record(parent, depth, 1 << 18, 0, Band.STANDARD, 0, 1000)
            slot = index.enter(key, facts, Tier.RAM, depth)
            policy.admit(slot, index.facts(slot, 1 << 18), chain)
            parent = key.hash
    filled = time.perf_counter() - began
    size_bytes = _rss_bytes() - before
    rng = random.Random(1)
    lookups, touches, evictions = [], [], []
    for _ in range(50):
        chain = rng.randrange(chains)
        hashes = [_hash(chain, depth) for depth in range(INDEX_CHAIN)]
        began = time.perf_counter()
        run = index.find_run(KV, hashes)
        lookups.append(time.perf_counter() - began)
        assert len(run) == INDEX_CHAIN, "every chain is as long"
        began = time.perf_counter()
        for slot in run:
            policy.touch(slot, chains)
        touches.append((time.perf_counter() - began) / INDEX_CHAIN)
    for _ in range(200):
        began = time.perf_counter()
        (victim,) = policy.victims(1, chains)
        evictions.append(time.perf_counter() - began)
        index.leave(victim.slot, Tier.RAM)
    return {
        "entries": INDEX_ENTRIES,
        "bytes_an_entry": size_bytes / INDEX_ENTRIES,
        "enter_us": 1e6 * filled / INDEX_ENTRIES,
        "chain_lookup_ms_median": 1e3 * sorted(lookups)[len(lookups) // 2],
        "chain_lookup_ms_max": 1e3 * max(lookups),
        "touch_us_median": 1e6 * sorted(touches)[len(touches) // 2],
        "evict_us_median": 1e6 * sorted(evictions)[len(evictions) // 2],
        "evict_us_max": 1e6 * max(evictions),
    }


def _hash(chain: int, depth: int) -> bytes:
    return sha256(b"%d/%d" % (chain, depth)).digest()


def measure_index() -> dict[str, float]:
    """`index_figures` of a process that did nothing before."""
    code = "import json, bench.cache_policy as b; print(json.dumps(b.index_figures()))"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    figures: dict[str, float] = json.loads(done.stdout)
    for name, value in figures.items():
        print(f"  {name:24}{value:12.3f}")
    return figures


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trace", type=Path, nargs="*", default=[])
    parser.add_argument("--synthetic", nargs="*", choices=list(SYNTHETIC), default=list(SYNTHETIC))
    parser.add_argument("--sizes", type=_numbers, default=[3_000, 10_000, 30_000])
    parser.add_argument("--policies", type=lambda text: text.split(","), default=list(POLICIES))
    parser.add_argument(
        "--part", choices=["hits", "weighted", "pins", "index", "all"], default="all"
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    parts = ("hits", "weighted", "pins", "index") if args.part == "all" else (args.part,)
    loads = {path.stem: (from_trace(path, args.seed), args.sizes) for path in args.trace}
    small = [int(SYNTHETIC_SHARE * size) for size in args.sizes]
    for name in args.synthetic:
        loads[name] = (synthetic(name, SYNTHETIC_REQUESTS, args.seed), small)
    results: dict[str, Any] = {"weights": {band.label: WEIGHTS[band] for band in Band}}
    for name, (requests, sizes) in loads.items():
        blocks = sum(map(len, requests))
        for part in parts:
            if part == "index":
                continue
            print(f"{name}, {part}: {len(requests)} requests, {blocks} blocks; sizes {sizes}")
            if part == "hits":
                rows = hits(requests, args.policies, sizes)
            elif part == "weighted":
                rows = weighted(requests, sizes, args.seed)
            else:
                rows = pins(requests, args.policies, sizes)
            results.setdefault(name, {"sizes": sizes})[part] = rows
    if "index" in parts:
        print(f"index and policy, {INDEX_ENTRIES} entries")
        results["index"] = measure_index()
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
