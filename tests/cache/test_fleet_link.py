"""What a cache service tells the fleet: news of its blocks, snapshots, that it lives."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

from redis.asyncio import Redis

from cache.builders import PATIENCE_S, chain, client_of, hash_of, make_store, reap, spawn
from headrace import keys
from headrace.cache_client import PutEntry
from headrace.cache_directory import Directory
from headrace.cache_entries import facts_of
from headrace.checksum import checksum
from headrace.clock import ManualClock, SystemClock
from headrace.frames import PROMPT
from headrace.policy.hashing import layout_hash, model_tag
from headrace.streams import REDIS_DOWN
from headrace.types import BLOCK_KEY_BYTES, BlockNews
from headrace_cache.disk import DiskTier
from headrace_cache.disk_log import BUDGET_SEGMENTS_MIN, SEGMENT_BYTES_MIN
from headrace_cache.feed import TOUCHED_MAX, Feed, key_of
from headrace_cache.fleet_link import SNAPSHOT_MS, FleetLink
from headrace_cache.store import Store
from headrace_cache.tiers import Tiers
from headrace_gateway.policy.shared_index import SharedIndex
from headrace_gateway.shared_watch import SharedWatch
from support.valkey import Valkey

ONE, OTHER = layout_hash("model one", "kv"), layout_hash("model two", "kv")


def put(store: Store, entries: Sequence[PutEntry]) -> None:
    for entry in entries:
        facts = facts_of(entry)
        store.put(facts, bytes(entry.data), 0)


def names(*groups: Sequence[PutEntry]) -> set[bytes]:
    return {key_of(entry.hash) for entries in groups for entry in entries}


def split(told: bytes) -> set[bytes]:
    size = BLOCK_KEY_BYTES
    return {told[at : at + size] for at in range(0, len(told), size)}


def feed_of(store: Store, disk: DiskTier | None = None) -> Feed:
    return Feed(Tiers(store, disk, SystemClock()))


def take(feed: Feed) -> dict[bytes, BlockNews]:
    taken = dict(feed.take("a", "1"))
    feed.check_integrity()
    return taken


def test_each_model_is_told_of_its_own_blocks() -> None:
    """Prompts and blocks without a layout are nobody's business; removals are everybody's."""
    store = make_store()
    feed = feed_of(store)
    one, other = chain("one", 3, layout=ONE), chain("other", 2, layout=OTHER)
    put(store, [*one, *other, *chain("none", 2), *chain("prompt", 1, kind=PROMPT, layout=ONE)])
    told = take(feed)
    assert set(told) == {model_tag("model one"), model_tag("model two")}
    assert split(told[model_tag("model one")].stored) == names(one)
    assert split(told[model_tag("model two")].stored) == names(other)
    assert {news.sequence for news in told.values()} == {1}
    assert take(feed) == {}
    store.drop(store.index.find(facts_of(one[2]).key))
    told = take(feed)
    assert all(split(news.removed) == names(one[2:]) for news in told.values())
    assert {news.sequence for news in told.values()} == {2}


def test_what_comes_and_goes_is_told_on_balance() -> None:
    """A block that was evicted and put again is there; one that came and went was never told."""
    store = make_store()
    feed = feed_of(store)
    one = chain("one", 2, layout=ONE)
    put(store, one)
    take(feed)
    slot = store.index.find(facts_of(one[1]).key)
    store.drop(slot)
    put(store, one[1:])
    passing = chain("passing", 1, layout=ONE)
    put(store, passing)
    store.drop(store.index.find(facts_of(passing[0]).key))
    told = take(feed)[model_tag("model one")]
    assert split(told.stored) == names(one[1:]) and split(told.removed) == names(passing)


def test_evictions_are_told() -> None:
    """A store that is full loses blocks for new ones; those told of are those it holds."""
    store = make_store(200_000)
    feed = feed_of(store)
    known: set[bytes] = set()
    for number in range(30):
        put(store, chain(f"chain {number}", 5, 4_000, layout=ONE))
        for news in take(feed).values():
            known = (known - split(news.removed)) | split(news.stored)
    held = {key_of(store.index.key(slot).hash) for slot in store.index.entries()}
    assert known == held and 0 < len(held) < 150


def test_too_much_news_leaves_a_gap_and_the_snapshot_has_all() -> None:
    store = make_store()
    feed = feed_of(store)
    many = [PutEntry(hash_of(number), b"x" * 8, layout=ONE) for number in range(TOUCHED_MAX + 10)]
    put(store, many)
    assert take(feed) == {}
    more = chain("more", 1, layout=ONE)
    put(store, more)
    model = model_tag("model one")
    assert take(feed)[model].sequence == 2
    assert split(b"".join(feed.snapshot(model))) == names(many, more)


def test_blocks_on_disk_are_told_of_after_a_restart(tmp_path: Path) -> None:
    """The memory is empty, the disk is not: news and snapshot name its blocks by 60 bits."""
    budget_bytes = BUDGET_SEGMENTS_MIN * SEGMENT_BYTES_MIN
    one, other = chain("one", 5, layout=ONE), chain("other", 3, layout=OTHER)
    disk = DiskTier(tmp_path, budget_bytes)
    assert disk.start().result(PATIENCE_S) == 0
    for entry in [*one, *other]:
        assert disk.offer(facts_of(entry, checksum(entry.data)), entry.data)
    assert disk.settle(PATIENCE_S)
    disk.close()
    disk = DiskTier(tmp_path, budget_bytes)
    feed = feed_of(make_store(), disk)
    try:
        assert disk.start().result(PATIENCE_S) == 8
        told = take(feed)
        model = model_tag("model one")
        assert split(told[model].stored) == names(one)
        assert split(b"".join(feed.snapshot(model))) == names(one)
        assert disk.forget([facts_of(one[4]).key]).result(PATIENCE_S) == 1
        assert split(take(feed)[model].removed) == names(one[4:])
    finally:
        disk.close()


@asynccontextmanager
async def watching(valkey: Valkey, redis: Redis) -> AsyncIterator[SharedIndex]:
    """A dispatcher's index of model one's blocks, kept by its watch."""
    await redis.hset(keys.MODELS, "one", "model one")
    index = SharedIndex()
    task = asyncio.ensure_future(SharedWatch(valkey.url, redis, "one", index).run())
    try:
        yield index
        assert not task.done()
        index.check_integrity()
    finally:
        task.cancel()
        await asyncio.wait({task})


async def until(index: SharedIndex, entries: Sequence[PutEntry], blocks: int) -> None:
    """Wait until the index has exactly so many leading blocks of a chain."""
    prompt = b"".join(entry.hash[:BLOCK_KEY_BYTES] for entry in entries)
    async with asyncio.timeout(PATIENCE_S):
        while index.run_after(prompt, 0) != blocks:
            await asyncio.sleep(0.02)


async def test_the_dispatcher_follows_a_service(valkey: Valkey, redis: Redis) -> None:
    """It begins with the snapshot, goes on with the news, and forgets a service that leaves."""
    store, clock = make_store(), ManualClock()
    link = FleetLink(valkey.url, "tcp://127.0.0.1:1", Tiers(store, None, clock), clock)
    before, after = chain("before", 5, layout=ONE), chain("after", 4, layout=ONE)
    put(store, before)
    await link.tell()
    async with watching(valkey, redis) as index:
        await until(index, before, 5)
        put(store, after)
        await link.tell()
        await until(index, after, 4)
        store.drop(store.index.find(facts_of(after[3]).key))
        await link.tell()
        await until(index, after, 3)
        await link.close()
        await until(index, before, 0)


async def test_lost_news_are_made_up_for(valkey: Valkey, redis: Redis) -> None:
    """News that never came leave a gap; the next ones show it, the next snapshot fills it."""
    store, clock = make_store(), ManualClock()
    link = FleetLink(valkey.url, "tcp://127.0.0.1:1", Tiers(store, None, clock), clock)
    lost, seen = chain("lost", 5, layout=ONE), chain("seen", 4, layout=ONE)
    async with watching(valkey, redis) as index:
        put(store, chain("first", 1, layout=ONE))
        await link.tell()
        await until(index, chain("first", 1), 1)
        put(store, lost)
        link.feed.take("lost", "on the way")
        put(store, seen)
        clock.advance(SNAPSHOT_MS)
        await link.tell()
        await until(index, seen, 4)
        await until(index, lost, 5)
    await link.close()


async def test_without_redis_a_service_serves_and_tells_later(
    valkey: Valkey, redis: Redis, tmp_path: Path
) -> None:
    """A process: it answers while Redis is away, and is known as soon as Redis is back."""
    url = f"unix://{tmp_path}/cache"
    valkey.kill()
    process = spawn(url, HEADRACE_REDIS_URL=valkey.url)
    try:
        async with asyncio.timeout(2 * PATIENCE_S), client_of(url) as client:
            while not await client.put(chain("a", 2, layout=ONE)):
                await asyncio.sleep(0.05)
            valkey.start()
            directory = Directory(redis)
            while not (nodes := await known(directory)):
                await asyncio.sleep(0.05)
            assert nodes == [url]
            async with watching(valkey, redis) as index:
                await until(index, chain("a", 2), 2)
                process.terminate()
                await until(index, chain("a", 2), 0)
    finally:
        reap(process)


async def known(directory: Directory) -> list[str]:
    try:
        return [node.address for node in await directory.nodes()]
    except REDIS_DOWN:
        return []
