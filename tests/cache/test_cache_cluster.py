"""Several cache services as one, over real sockets: spread, lost nodes, new ones, hot groups."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path

from redis.asyncio import Redis

from cache.builders import PATIENCE_S, data_of, reap, serving, spawn, wait_ready
from headrace import keys
from headrace.cache_admin import Changed, Listed, ListEntries, Purge, SetQuota, decode_answer
from headrace.cache_admin import encode as encode_admin
from headrace.cache_client import CacheClient, PutEntry
from headrace.cache_cluster import CacheCluster
from headrace.cache_directory import Directory, Followed, open_cache
from headrace.cache_merging import summed
from headrace.frames import KV
from headrace.policy.cache_nodes import HOT_READS, Node
from headrace.policy.hashing import GROUP_BLOCKS, block_hashes, group_of, next_hash, root_hash
from headrace.types import BLOCK_TOKENS, CacheNode
from headrace_cache.server import CacheServer
from support.valkey import Valkey


def long_chain(seed: int, blocks: int, size_bytes: int = 500) -> list[PutEntry]:
    """A chain as workers make them, whose groups are GROUP_BLOCKS long."""
    rng = random.Random(seed)
    tokens = [rng.randrange(1 << 16) for _ in range(blocks * BLOCK_TOKENS)]
    entries, parent = [], b""
    for depth, each in enumerate(block_hashes(root_hash("model", b""), tokens)):
        entries.append(PutEntry(each, data_of(each, size_bytes), parent, depth))
        parent = each
    return entries


def hashes_of(entries: Sequence[PutEntry]) -> list[bytes]:
    return [entry.hash for entry in entries]


@asynccontextmanager
async def cluster_of(urls: Sequence[str], **options: object) -> AsyncIterator[CacheCluster]:
    arguments = {"timeout_s": PATIENCE_S, "put_timeout_s": PATIENCE_S} | options
    cluster = CacheCluster(map(Node, urls), **arguments)  # type: ignore[arg-type]
    try:
        yield cluster
        cluster.check_integrity()
    finally:
        await cluster.close()


@asynccontextmanager
async def nodes(count: int, folder: Path) -> AsyncIterator[dict[str, CacheServer]]:
    """Servers in this event loop, by address: odd ones on TCP, even ones with an arena to map."""
    (folder / "arena").mkdir(exist_ok=True)
    async with AsyncExitStack() as stack:
        servers = {}
        for number in range(count):
            url = f"unix://{folder}/arena/{number}" if number % 2 else "tcp://127.0.0.1:0"
            server, address = await stack.enter_async_context(serving(url))
            servers[address] = server
        yield servers


async def read(cluster: CacheCluster, entries: Sequence[PutEntry]) -> int:
    """How much of a chain is read; all of it is right."""
    async with cluster.read(hashes_of(entries)) as run:
        assert run.hashes == hashes_of(entries)[: len(run.blocks)]
        assert run.bytes == sum(map(len, run.blocks))
        for block, entry in zip(run.blocks, entries, strict=False):
            assert bytes(block) == entry.data
        return len(run.blocks)


async def test_a_long_chain_spreads_and_is_read_as_one(tmp_path: Path) -> None:
    """Ten groups on three nodes: each group whole on one of them, the run whole for its reader."""
    chain = long_chain(1, 10 * GROUP_BLOCKS)
    async with nodes(3, tmp_path) as servers, cluster_of([*servers]) as cluster:
        assert await cluster.write(chain)
        held = {url: len(server.store) for url, server in servers.items()}
        assert sum(held.values()) == len(chain) and all(held.values())
        assert all(count % GROUP_BLOCKS == 0 for count in held.values())
        assert await read(cluster, chain) == len(chain)
        assert all(await cluster.has(hashes_of(chain)))
        assert await read(cluster, chain[100:300]) == 200, "a run may begin anywhere"
        stats = await cluster.stats()
        assert stats is not None and stats["entries"] == len(chain) and stats["nodes"] == 3
        assert cluster.counts.hits >= len(chain) and cluster.counts.corrupt == 0


async def test_the_run_ends_at_the_first_gap(tmp_path: Path) -> None:
    """A block that one node lost ends the run, though another has what follows; it sends none."""
    chain = long_chain(2, 10 * GROUP_BLOCKS)
    gap = 3 * GROUP_BLOCKS + 5
    async with nodes(2, tmp_path) as servers, cluster_of([*servers]) as cluster:
        assert await cluster.write(chain[:gap]) and await cluster.write(chain[gap + 1 :])
        assert await read(cluster, chain) == gap == sent(servers)
        flags = await cluster.has(hashes_of(chain))
        assert flags.index(False) == gap and flags.count(False) == 1
        assert await read(cluster, long_chain(99, 80)) == 0
        assert await read(cluster, []) == 0


def sent(servers: dict[str, CacheServer]) -> int:
    """Entries that the servers gave away."""
    return sum(server.store.tallies.kind(KV).hits for server in servers.values())


async def test_a_new_node_takes_its_share_and_costs_no_more(tmp_path: Path) -> None:
    """Of 60 chains about a quarter of the groups is asked of the fourth node, and is a miss once.

    The others are read as before.
    """
    chains = [long_chain(seed, 20, 50) for seed in range(60)]
    async with nodes(4, tmp_path) as servers:
        *three, fourth = [*servers]
        async with cluster_of(three) as cluster:
            for chain in chains:
                assert await cluster.write(chain)
            cluster.set_nodes(map(Node, servers))
            lengths = [await read(cluster, chain) for chain in chains]
            assert set(lengths) == {0, 20}
            assert 5 <= lengths.count(0) <= 27, "about a quarter of 60"
            for chain, length in zip(chains, lengths, strict=True):
                assert length or await cluster.write(chain)
            assert len(servers[fourth].store) == 20 * lengths.count(0)
            assert [await read(cluster, chain) for chain in chains] == [20] * 60
            cluster.set_nodes(map(Node, three))
            assert [await read(cluster, chain) for chain in chains] == [20] * 60, "as before"


async def test_a_killed_node_costs_what_it_had_and_nothing_else(
    tmp_path: Path, unused_tcp_port_factory: Callable[[], int]
) -> None:
    """Processes, one killed under traffic: no error, no wrong byte; its groups move to the next.

    When it is back, empty, its groups go home again.
    """
    urls = [f"tcp://127.0.0.1:{unused_tcp_port_factory()}", f"unix://{tmp_path}/second"]
    processes = [spawn(url) for url in urls]
    chains = [long_chain(seed, 2 * GROUP_BLOCKS, 2_000) for seed in range(12)]
    try:
        await asyncio.gather(*map(wait_ready, urls))
        async with cluster_of(urls, timeout_s=1.0, put_timeout_s=1.0) as cluster:
            for chain in chains:
                assert await cluster.write(chain)
            stopping = asyncio.Event()
            users = [asyncio.ensure_future(use(cluster, chains, n, stopping)) for n in range(3)]
            await asyncio.sleep(0.1)
            reap(processes[0])
            async with asyncio.timeout(PATIENCE_S):
                while not all([await read(cluster, chain) == len(chain) for chain in chains]):
                    await asyncio.sleep(0.05)
            stopping.set()
            assert all(await asyncio.gather(*users))
            processes[0] = spawn(urls[0])
            await wait_ready(urls[0])
            async with asyncio.timeout(PATIENCE_S), CacheCloser(urls[0]) as back:
                while not (await back.stats() or {}).get("entries"):
                    for chain in chains:
                        await cluster.write(chain)
                    await asyncio.sleep(0.05)
            assert cluster.counts.corrupt == 0 < cluster.counts.failures
    finally:
        for process in processes:
            reap(process)


class CacheCloser:
    """A client of one service, closed at the end."""

    def __init__(self, url: str) -> None:
        self._client = CacheClient(url, timeout_s=PATIENCE_S)

    async def __aenter__(self) -> CacheClient:
        return self._client

    async def __aexit__(self, *_: object) -> None:
        await self._client.close()


async def use(
    cluster: CacheCluster, chains: list[list[PutEntry]], number: int, stopping: asyncio.Event
) -> int:
    """Read chains and write what is missing until told to stop; blocks that were found."""
    rng = random.Random(number)
    found = 0
    while not stopping.is_set():
        chain = rng.choice(chains)
        length = await read(cluster, chain)
        found += length
        if length < len(chain):
            await cluster.write(chain[length:])
        await asyncio.sleep(0.002)
    return found


async def test_with_no_node_left_everything_is_a_miss(tmp_path: Path) -> None:
    async with cluster_of([f"unix://{tmp_path}/a", f"unix://{tmp_path}/b"]) as cluster:
        chain = long_chain(1, 100)
        for _ in range(3):
            assert await read(cluster, chain) == 0
            assert not await cluster.write(chain)
        assert cluster.resting and not await cluster.ping()
        assert await cluster.stats() is None and not cluster.offer(chain)
        assert await cluster.manage(encode_admin(Purge())) is None


async def test_what_many_read_lies_on_two_nodes(tmp_path: Path) -> None:
    """A hot group is copied once, read from both, and survives the loss of either."""
    chain, cold = long_chain(1, 40), long_chain(2, 40)
    async with nodes(3, tmp_path) as servers, cluster_of([*servers]) as cluster:
        assert await cluster.write(chain) and await cluster.write(cold)
        assert total(servers) == 80
        for _ in range(int(HOT_READS) + 4):
            assert await read(cluster, chain) == 40
        async with asyncio.timeout(PATIENCE_S):
            while total(servers) < 120:
                await asyncio.sleep(0.01)
        before = cluster.counts.hits
        for _ in range(10):
            assert await read(cluster, chain) == 40
        assert cluster.counts.hits - before == 400, "no copy is made a second time"
        assert total(servers) == 120
        homes = cluster._chooser.homes(group_of(chain[0].hash), lambda _: True)
        for gone in homes:
            cluster.set_nodes(Node(url) for url in servers if url != gone)
            assert await read(cluster, chain) == 40


def total(servers: dict[str, CacheServer]) -> int:
    return sum(len(server.store) for server in servers.values())


async def test_a_copy_that_is_gone_is_read_where_it_was_first(tmp_path: Path) -> None:
    """The second node forgot the group: the reader gets it all the same, in the same call."""
    chain = long_chain(1, 40)
    async with nodes(2, tmp_path) as servers, cluster_of([*servers]) as cluster:
        assert await cluster.write(chain)
        cluster._chooser.note_copied(group_of(chain[0].hash))
        for _ in range(3):
            assert await read(cluster, chain) == 40


async def test_administrators_see_one_cache(tmp_path: Path) -> None:
    """Lists go on from node to node, purges and quotas reach all of them."""
    chain = long_chain(1, 6 * GROUP_BLOCKS)
    async with nodes(3, tmp_path) as servers, cluster_of([*servers]) as cluster:
        assert await cluster.write(chain)
        seen, cursor = [], 0
        for _ in range(100):
            values = await cluster.manage(encode_admin(ListEntries(limit=50, cursor=cursor)))
            answer = decode_answer(values)
            assert isinstance(answer, Listed)
            seen += [info.key.hash for info in answer.entries]
            cursor = answer.cursor
            if not cursor:
                break
        assert sorted(seen) == sorted(hashes_of(chain))
        quota = await cluster.manage(encode_admin(SetQuota("t", 3_000_000, 0)))
        assert decode_answer(quota) == Changed(0)
        purged = decode_answer(await cluster.manage(encode_admin(Purge())))
        assert isinstance(purged, Changed) and purged.entries == len(chain)
        assert total(servers) == 0


async def test_a_prefix_is_purged_on_all_nodes(tmp_path: Path) -> None:
    """Its groups lie on three nodes, each linked by blocks on another; what branches off before
    stays, in the same group too."""
    chain = long_chain(1, 6 * GROUP_BLOCKS)
    fork = GROUP_BLOCKS + 5
    branch = branch_of(chain, fork - 3, 2 * GROUP_BLOCKS)
    async with nodes(3, tmp_path) as servers, cluster_of([*servers]) as cluster:
        assert await cluster.write(chain) and await cluster.write(branch)
        asked = ListEntries(prefix=chain[fork].hash, limit=1_000)
        seen, cursor = [], 0
        while True:
            page = decode_answer(await cluster.manage(encode_admin(replace(asked, cursor=cursor))))
            assert isinstance(page, Listed)
            seen += [info.key.hash for info in page.entries]
            cursor = page.cursor
            if not cursor:
                break
        assert sorted(seen) == sorted(hashes_of(chain[fork:]))
        purge = encode_admin(Purge(prefix=chain[fork].hash))
        purged = decode_answer(await cluster.manage(purge))
        assert isinstance(purged, Changed) and purged.entries == len(chain) - fork
        left = hashes_of([*chain[:fork], *branch])
        assert all(await cluster.has(left)) and total(servers) == len(left)
        assert not any(await cluster.has(hashes_of(chain[fork:])))
        purge = encode_admin(Purge(prefix=chain[0].hash))
        purged = decode_answer(await cluster.manage(purge))
        assert isinstance(purged, Changed) and purged.entries == len(left)
        assert total(servers) == 0


def branch_of(chain: Sequence[PutEntry], at: int, length: int) -> list[PutEntry]:
    """`length` other entries behind the one at `at`."""
    made: list[PutEntry] = []
    parent = chain[at].hash
    for number in range(length):
        hash_ = next_hash(parent, [number] * BLOCK_TOKENS)
        made.append(PutEntry(hash_, hash_ * 4, parent, at + 1 + number))
        parent = hash_
    return made


def test_numbers_are_added_through_nested_maps() -> None:
    one = {"a": 1, "by": {"x": {"n": 2}}, "name": "p"}
    assert summed([one, {"a": 2.5, "by": {"x": {"n": 3}, "y": 1}, "name": "q"}]) == {
        "a": 3.5,
        "by": {"x": {"n": 5}, "y": 1},
        "name": "p",
    }


async def test_nodes_are_found_in_redis(tmp_path: Path, valkey: Valkey, redis: Redis) -> None:
    """`auto`: whoever announces itself is used; the dead are swept, the malformed are ignored."""
    directory = Directory(redis)
    async with nodes(2, tmp_path) as servers:
        cards = [CacheNode(url, f"boot {n}", 1 << 20, 0) for n, url in enumerate(servers)]
        for card in cards:
            await directory.announce(card)
        await redis.sadd(keys.CACHE_NODES, "tcp://127.0.0.1:1", "rubbish")
        await redis.set(keys.cache_node("rubbish"), b"\xc1")
        assert await directory.nodes() == sorted(cards, key=lambda card: card.address)
        await directory.sweep()
        assert await redis.scard(keys.CACHE_NODES) == 2
        cluster = open_cache("auto", valkey.url, timeout_s=PATIENCE_S)
        assert isinstance(cluster, CacheCluster)
        try:
            chain = long_chain(1, 6 * GROUP_BLOCKS)
            assert await cluster.write(chain), "the first call waits until nodes are known"
            assert set(cluster.nodes) == set(servers) and total(servers) == len(chain)
        finally:
            await cluster.close()
        await directory.withdraw(CacheNode(cards[0].address, "another boot", 1, 0))
        assert len(await directory.nodes()) == 2, "only the incarnation that has it gives it up"
        await directory.withdraw(cards[0])
        assert await directory.nodes() == cards[1:]


async def test_without_redis_the_nodes_known_last_count_on(valkey: Valkey, redis: Redis) -> None:
    """Redis dies, comes back empty, and everybody is still known until they can have said so."""
    card = CacheNode("tcp://127.0.0.1:9", "boot", 5, 0)
    await Directory(redis).announce(card)
    source = Followed(valkey.url)
    assert await source.nodes() == [Node(card.address, 5.0)]
    await redis.flushall()
    assert await source.nodes() == [Node(card.address, 5.0)]
    valkey.kill()
    assert await source.nodes() is None
    await source.close()
