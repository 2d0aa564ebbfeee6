"""Several cache services as one: the client of each, and who keeps what (policy/cache_nodes.py).

Invariants: the promises of `CacheClient` hold: no exception, no wait beyond the limits, and what is
returned has its CRC, whichever node dies when. The run ends at the first block that is not there,
so nothing is ever returned with a gap before it. A node that is away costs what it had.
Rejected: asking all nodes for everything, which makes each a bottleneck of all; a proxy in front,
which would copy every byte once more and could not lend its memory.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any, Protocol, TypeVar

import structlog

from headrace import cache_admin
from headrace.cache_client import GET_TIMEOUT_S, PUT_TIMEOUT_S, CacheClient
from headrace.cache_entries import Entry, WriteEntry
from headrace.cache_lane import ClientCounts
from headrace.cache_merging import merged_answers, merged_traces, node_of, summed
from headrace.cache_reads import ReadRun
from headrace.clock import Clock, SystemClock
from headrace.frames import KV
from headrace.policy.cache_nodes import Chooser, Node, Part
from headrace.policy.hashing import group_of
from headrace.types import BLOCK_TOKENS, Band

FOLLOW_EVERY_S = 1.0
COPYING_MAX = 2
"""Hot groups that one client copies to their second node at a time; others wait for a next read."""

log = structlog.get_logger(__name__)

T = TypeVar("T")


class Source(Protocol):
    """Says which nodes there are."""

    async def nodes(self) -> Sequence[Node] | None:
        """All of them; None where that cannot be told now. Never raises."""
        ...

    async def close(self) -> None: ...


class CacheCluster:
    """Reads and writes entries on the nodes of `set_nodes`. Belongs to one event loop."""

    def __init__(
        self,
        nodes: Iterable[Node] = (),
        *,
        timeout_s: float = GET_TIMEOUT_S,
        put_timeout_s: float = PUT_TIMEOUT_S,
        clock: Clock | None = None,
        arena: bool = True,
        source: Source | None = None,
    ) -> None:
        """As CacheClient's. Raises SettingsError for a node whose name is no address.

        `source` says from time to time which nodes there are; `nodes` is where that begins.
        """
        self._clock = clock or SystemClock()
        self._timeout_s = timeout_s
        self._retire_s = timeout_s + put_timeout_s
        self._source = source
        self._following: asyncio.Task[None] | None = None
        self._told = asyncio.Event()
        self._connect: Callable[[str], CacheClient] = partial(
            CacheClient,
            timeout_s=timeout_s,
            put_timeout_s=put_timeout_s,
            clock=self._clock,
            arena=arena,
        )
        self._chooser = Chooser()
        self._clients: dict[str, CacheClient] = {}
        self._copying: dict[bytes, asyncio.Task[None]] = {}
        self._closing: set[asyncio.Task[None]] = set()
        self._retired: list[CacheClient] = []
        self._gone = ClientCounts()
        """What the closed clients of nodes that left had counted."""
        self.set_nodes(nodes)

    def set_nodes(self, nodes: Iterable[Node]) -> bool:
        """The nodes there are from now on; whether that changes anything.

        A client of a node that left is closed; whoever reads from it keeps what was lent.
        """
        if not self._chooser.set_nodes(nodes):
            return False
        names, before = self._chooser.names, self._clients
        # a new map: calls under way go on with the clients they began with
        self._clients = {name: before.get(name) or self._connect(name) for name in names}
        for name in before:
            if name not in self._clients:
                task = asyncio.get_running_loop().create_task(self._retire(before[name]))
                self._closing.add(task)
                task.add_done_callback(self._closing.discard)
        log.info("cache nodes", nodes=list(names))
        return True

    async def _retire(self, client: CacheClient) -> None:
        """Close `client` when the calls that may have it have ended."""
        self._retired.append(client)
        try:
            await asyncio.sleep(self._retire_s)
        finally:
            self._retired.remove(client)
            self._gone = _added([self._gone, client.counts])
            await client.close()

    async def _known(self) -> None:
        """Wait until the nodes were told for the first time, if that is not long."""
        if self._source is None:
            return
        if self._following is None:
            self._following = asyncio.get_running_loop().create_task(self._follow(self._source))
        if not self._told.is_set():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._timeout_s):
                    await self._told.wait()

    async def _follow(self, source: Source) -> None:
        try:
            while True:
                nodes = await source.nodes()
                if nodes is not None:
                    self.set_nodes(nodes)
                self._told.set()
                await asyncio.sleep(FOLLOW_EVERY_S)
        finally:
            await source.close()

    @property
    def nodes(self) -> tuple[str, ...]:
        return self._chooser.names

    @property
    def counts(self) -> ClientCounts:
        """What became of the calls, over all nodes."""
        clients = [*self._clients.values(), *self._retired]
        return _added([self._gone, *(client.counts for client in clients)])

    @property
    def resting(self) -> bool:
        """Whether no node can be asked just now."""
        return all(client.resting for client in self._clients.values())

    def _can_ask(self, name: str) -> bool:
        return not self._clients[name].resting

    # reading

    @contextlib.asynccontextmanager
    async def read(
        self,
        hashes: Sequence[bytes],
        *,
        band: Band | None = None,
        tenant: str = "",
        layout: bytes = b"",
        trace: Mapping[str, str] | None = None,
        kind: str = KV,
        timeout_s: float | None = None,
    ) -> AsyncIterator[ReadRun]:
        """The leading run of `hashes` that the nodes hold; as CacheClient's."""
        options: dict[str, Any] = {
            "band": band, "tenant": tenant, "layout": layout, "trace": trace, "kind": kind
        }  # fmt: skip
        now_s = asyncio.get_running_loop().time
        began_s = now_s()
        end_s = began_s + (self._timeout_s if timeout_s is None else timeout_s)
        await self._known()
        async with contextlib.AsyncExitStack() as stack:
            reading = partial(self._read, stack, hashes, end_s, options)
            run, parts = await reading()
            end = _part_at(parts, len(run.blocks))
            if end is not None and end.copy:
                # the second node lacks what its first one may have
                self._chooser.note_lost(end.group)
                await stack.aclose()
                run, parts = await reading()
            self._note_read(parts, hashes, len(run.blocks), options)
            run.took_ms = 1000 * (now_s() - began_s)
            yield run

    async def _read(
        self,
        stack: contextlib.AsyncExitStack,
        hashes: Sequence[bytes],
        end_s: float,
        options: dict[str, Any],
    ) -> tuple[ReadRun, list[Part]]:
        """What is found now, held by `stack`, and where it was looked for."""
        clients = self._clients
        parts = self._chooser.read_parts(hashes, self._can_ask)
        if len({part.node for part in parts}) > 1:
            # what stands behind a gap is not to be sent for nothing
            left_s = max(0.0, end_s - asyncio.get_running_loop().time())
            flags = await self._flags(parts, hashes, left_s, options["kind"])
            length = flags.index(False) if False in flags else len(flags)
        else:
            length = len(hashes)
        wanted = _by_node(parts, hashes, length)
        runs = await self._all(
            self._open(stack, clients[name], keys, end_s, options) for name, keys in wanted.items()
        )
        return _merged(parts, dict(zip(wanted, runs, strict=True))), parts

    async def _flags(
        self, parts: Sequence[Part], hashes: Sequence[bytes], timeout_s: float | None, kind: str
    ) -> list[bool]:
        """Which of the blocks in `parts` their nodes have, in order."""
        wanted = _by_node(parts, hashes, len(hashes))
        answers = await self._all(
            self._clients[name].has(keys, kind=kind, timeout_s=timeout_s)
            for name, keys in wanted.items()
        )
        flags = {name: iter(each) for name, each in zip(wanted, answers, strict=True)}
        return [next(flags[part.node]) for part in parts for _ in range(part.first, part.last)]

    async def _open(
        self,
        stack: contextlib.AsyncExitStack,
        client: CacheClient,
        keys: Sequence[bytes],
        end_s: float,
        options: dict[str, Any],
    ) -> ReadRun:
        left_s = max(0.0, end_s - asyncio.get_running_loop().time())
        reading = client.read(keys, timeout_s=left_s, **options)
        return await stack.enter_async_context(reading)

    def _note_read(
        self, parts: Sequence[Part], hashes: Sequence[bytes], found: int, options: dict[str, Any]
    ) -> None:
        """Count a use of each group that was found; a hot one is copied to its second node."""
        now_ms = self._clock.now_ms()
        for part in parts:
            if found < part.last:
                return
            hot = self._chooser.heat.note(part.group, now_ms)
            if hot and not self._chooser.is_copied(part.group) and options["kind"] == KV:
                self._copy_soon(part.group, hashes[part.first : part.last], options)

    def _copy_soon(self, group: bytes, hashes: Sequence[bytes], options: dict[str, Any]) -> None:
        homes = self._chooser.homes(group, self._can_ask)
        if len(homes) < 2 or group in self._copying or len(self._copying) >= COPYING_MAX:
            return
        pair = (self._clients[homes[0]], self._clients[homes[1]])
        copying = self._copy(group, list(hashes), pair, options)
        task = asyncio.get_running_loop().create_task(copying)
        self._copying[group] = task
        task.add_done_callback(lambda _: self._copying.pop(group, None))

    async def _copy(
        self,
        group: bytes,
        hashes: list[bytes],
        pair: tuple[CacheClient, CacheClient],
        options: dict[str, Any],
    ) -> None:
        """Have the second node hold what the first holds of `group`, from memory to memory.

        Who computed it is not known here, so it counts as what it takes at least.
        """
        source, target = pair
        there = await target.has(hashes)
        copied = all(there)
        if not copied:
            async with source.read(hashes, layout=options["layout"]) as run:
                entries = [
                    WriteEntry(
                        hash=each,
                        size_bytes=len(block),
                        fill=partial(_copy_into, block),
                        parent=run.hashes[place - 1] if place else b"",
                        depth=place,
                        band=options["band"] or Band.STANDARD,
                        tenant=options["tenant"],
                        cost_tokens=BLOCK_TOKENS,
                        layout=options["layout"],
                    )
                    for place, (each, block) in enumerate(zip(run.hashes, run.blocks, strict=True))
                ]
                copied = len(entries) == len(hashes) and await target.write(entries)
        homes = self._chooser.homes(group, self._can_ask)
        if copied and tuple(self._clients[name] for name in homes) == pair:
            self._chooser.note_copied(group)

    async def get_run(
        self,
        hashes: Sequence[bytes],
        trace: Mapping[str, str] | None = None,
        *,
        kind: str = KV,
        band: Band | None = None,
        layout: bytes = b"",
        tenant: str = "",
    ) -> list[tuple[bytes, memoryview]]:
        """What `read` reads, copied: each memoryview is the caller's own, and writable."""
        options: dict[str, Any] = {"band": band, "layout": layout, "tenant": tenant, "kind": kind}
        async with self.read(hashes, trace=trace, **options) as run:
            copies = [memoryview(bytearray(block)) for block in run.blocks]
        return list(zip(run.hashes, copies, strict=True))

    async def has(
        self, hashes: Sequence[bytes], *, kind: str = KV, timeout_s: float | None = None
    ) -> list[bool]:
        """Which of `hashes` the nodes hold that they would be read from."""
        await self._known()
        parts = self._chooser.read_parts(hashes, self._can_ask)
        found = await self._flags(parts, hashes, timeout_s, kind)
        return found + [False] * (len(hashes) - len(found))

    async def verify(self, hashes: Sequence[bytes], *, kind: str = KV) -> int:
        """Have every node check the CRC of what it has of `hashes`; how many were dropped."""
        dropped = await self._all(
            client.verify(hashes, kind=kind) for client in self._clients.values()
        )
        return sum(dropped)

    # writing

    async def write(self, entries: Sequence[Entry], trace: Mapping[str, str] | None = None) -> bool:
        """Store `entries` now, parents first; whether the nodes hold all of them then.

        Each entry's `fill` is called once for each node that it is written to.
        """
        return await self._spread(entries, lambda client, part: client.write(part, trace))

    async def put(self, entries: Sequence[Entry], trace: Mapping[str, str] | None = None) -> bool:
        """Store `entries`; whether the nodes hold all of them now. See `offer`."""
        return await self._spread(entries, lambda client, part: client.put(part, trace))

    async def _spread(
        self,
        entries: Sequence[Entry],
        send: Callable[[CacheClient, Sequence[Entry]], Awaitable[bool]],
    ) -> bool:
        await self._known()
        by_node, everything = self._by_home(entries)
        held = await self._all(send(self._clients[n], part) for n, part in by_node.items())
        return everything and all(held)

    def offer(self, entries: Sequence[Entry], trace: Mapping[str, str] | None = None) -> bool:
        """Queue `entries` to be stored; False when a node's queue has no room, or no node is."""
        by_node, everything = self._by_home(entries)
        taken = [self._clients[name].offer(part, trace) for name, part in by_node.items()]
        return everything and all(taken)

    def _by_home(self, entries: Sequence[Entry]) -> tuple[dict[str, list[Entry]], bool]:
        """`entries` by the nodes they go to, in their order; whether all have one."""
        now_ms = self._clock.now_ms()
        by_node: dict[str, list[Entry]] = {}
        homes: dict[bytes, tuple[str, ...]] = {}
        for entry in entries:
            group = group_of(entry.hash)
            if group not in homes:
                homes[group] = self._chooser.write_nodes(group, self._can_ask, now_ms)
            for name in homes[group]:
                by_node.setdefault(name, []).append(entry)
        return by_node, all(homes.values())

    async def flush(self, timeout_s: float) -> bool:
        """Wait until what was offered is sent or given up; whether that was so in time."""
        done = await self._all(client.flush(timeout_s) for client in self._clients.values())
        return all(done)

    # the rest

    async def stats(self) -> dict[str, Any] | None:
        """The nodes' counters added up, and how many answered as `nodes`; None if none did."""
        await self._known()
        answers = await self._all(client.stats() for client in self._clients.values())
        found = [answer for answer in answers if answer is not None]
        return summed(found) | {"nodes": len(found)} if found else None

    async def manage(self, values: dict[str, Any]) -> dict[str, Any] | None:
        """What all nodes answer, as one; None if any did not, as it may not have done its part.

        By prefix, all nodes are asked first how their chains go on from group to group.
        """
        await self._known()
        names = list(self._clients)
        if values.get("prefix") and len(names) > 1:
            groups = await self._groups_below(values["prefix"])
            if not isinstance(groups, bytes):
                return groups
            values = values | {"groups": groups}
        asked = node_of(values, names)
        answers = await self._all(
            self._clients[name].manage(request) for name, request in asked.items()
        )
        if not answers or None in answers:
            return None
        return merged_answers([a for a in answers if a is not None], list(asked), names)

    async def _groups_below(self, prefix: bytes) -> bytes | dict[str, Any] | None:
        """The groups that come after `prefix` on any node; else what to answer instead."""
        asked = cache_admin.encode(cache_admin.Trace(prefix))
        answers = await self._all(client.manage(asked) for client in self._clients.values())
        return merged_traces(prefix, answers)

    async def ping(self) -> bool:
        """Whether any node answers."""
        await self._known()
        return any(await self._all(client.ping() for client in self._clients.values()))

    async def close(self) -> None:
        """Give up what is queued or being copied, hang up."""
        tasks = [*self._copying.values(), *self._closing]
        if self._following is not None:
            tasks.append(self._following)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._all(client.close() for client in self._clients.values())

    async def _all(self, calls: Iterable[Awaitable[T]]) -> list[T]:
        """All answers, after all have come; the first exception, which is a bug, if there is."""
        answers = await asyncio.gather(*calls, return_exceptions=True)
        found: list[T] = []
        for answer in answers:
            if isinstance(answer, BaseException):
                raise answer
            found.append(answer)
        return found

    def check_integrity(self) -> None:
        assert set(self._clients) == set(self._chooser.names), "each node has its client"
        assert len(self._copying) <= COPYING_MAX, "copies are bounded"
        self._chooser.check_integrity()
        for client in self._clients.values():
            client.check_integrity()


Cache = CacheClient | CacheCluster


def _copy_into(block: memoryview, view: memoryview) -> None:
    view[:] = block


def _by_node(parts: Sequence[Part], hashes: Sequence[bytes], length: int) -> dict[str, list[bytes]]:
    """The first `length` hashes by the node that each is read from, in their order."""
    wanted: dict[str, list[bytes]] = {}
    for part in parts:
        keys = hashes[part.first : min(part.last, length)]
        if keys:
            wanted.setdefault(part.node, []).extend(keys)
    return wanted


def _part_at(parts: Sequence[Part], place: int) -> Part | None:
    return next((part for part in parts if part.first <= place < part.last), None)


def _merged(parts: Sequence[Part], runs: Mapping[str, ReadRun]) -> ReadRun:
    """The leading run of what was found on each node. It holds nothing itself: `runs` do."""
    merged = ReadRun()
    used = dict.fromkeys(runs, 0)
    for part in parts:
        run = runs.get(part.node)
        if run is None:
            break
        first = used[part.node]
        blocks = run.blocks[first : first + part.last - part.first]
        merged.hashes += run.hashes[first : first + len(blocks)]
        merged.blocks += blocks
        merged.bytes += sum(map(len, blocks))
        used[part.node] += len(blocks)
        if blocks:
            merged.tier = _slower(merged.tier, run.tier)
        if len(blocks) < part.last - part.first:
            break
    return merged


_TIERS = ("none", "arena", "remote", "disk")


def _slower(one: str, other: str) -> str:
    return max(one, other, key=_TIERS.index)


def _added(counts: Iterable[ClientCounts]) -> ClientCounts:
    return ClientCounts(**summed([asdict(each) for each in counts]))
