"""What a tenant learns of another one's prompts by asking for them: nothing, not by time either.

No clock is looked at: what takes time on the way of a request is counted, and a prompt that
somebody else has cached must make the service do precisely what an unknown one does.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache.builders import client_of, data_of, make_store
from cache.test_tiers import PATIENCE_S, SIZE_BYTES, with_disk
from headrace.cache_client import CacheClient, PutEntry
from headrace.cache_entries import keys_of
from headrace.frames import KV, RAM, parse_address
from headrace.policy.hashing import block_hashes, group_of, root_hash
from headrace.types import BLOCK_KEY_BYTES, BLOCK_TOKENS, BlockNews, pack_tokens
from headrace_cache.grants import Loan
from headrace_cache.index import Index
from headrace_cache.server import CacheServer
from headrace_cache.tiers import Wanted
from headrace_gateway.policy.shared_index import SharedIndex
from headrace_gateway.tenants import salt_of

BLOCKS = 6
PROMPT = pack_tokens(range(BLOCKS * BLOCK_TOKENS))
UNKNOWN = pack_tokens(range(1_000, 1_000 + BLOCKS * BLOCK_TOKENS))


def names_of(tenant: str, tokens: Any = PROMPT, group: str = "") -> list[bytes]:
    return block_hashes(root_hash("model", salt_of(tenant, group)), tokens)


def chain_of(tenant: str, tokens: Any = PROMPT) -> list[PutEntry]:
    names = names_of(tenant, tokens)
    parents = [b"", *names]
    return [
        PutEntry(name, data_of(name, SIZE_BYTES), parents[depth], depth, tenant=tenant)
        for depth, name in enumerate(names)
    ]


@given(st.lists(st.integers(0, 50_000), min_size=BLOCK_TOKENS, max_size=80))
def test_no_name_of_a_prompt_is_the_same_for_two_tenants(tokens: list[int]) -> None:
    """Nor the 8 bytes that routing goes by, nor its groups' names; within a group all are."""
    ours, theirs = (names_of(tenant, pack_tokens(tokens)) for tenant in ("red", "blue"))
    for cut in (slice(None), slice(BLOCK_KEY_BYTES)):
        assert not {name[cut] for name in ours} & {name[cut] for name in theirs}
    assert not set(map(group_of, ours)) & set(map(group_of, theirs))
    shared = [names_of(tenant, pack_tokens(tokens), "family") for tenant in ("red", "blue")]
    assert shared[0] == shared[1] != ours


class CountingIndex(Index):
    """Says how many entries it looked at for each run that was asked for."""

    steps: list[int]

    def find_run(self, kind: str, hashes: Any, tiers: int = RAM) -> list[int]:
        found = super().find_run(kind, hashes, tiers)
        self.steps.append(len(found))
        return found


@asynccontextmanager
async def red_is_cached(folder: Path) -> AsyncIterator[tuple[CacheServer, CacheClient]]:
    """Half of red's prompt in RAM, all of it on disk."""
    async with with_disk(folder), client_of(f"unix://{folder / 'cache.sock'}") as client:
        assert await client.put(chain_of("red"))
    async with with_disk(folder) as server, client_of(f"unix://{folder / 'cache.sock'}") as client:
        async with client.read(names_of("red")[: BLOCKS // 2]) as run:
            assert len(run.blocks) == BLOCKS // 2
        yield server, client


async def cost_of(server: CacheServer, client: CacheClient, names: list[bytes]) -> dict[str, Any]:
    """All that the service does and says when `names` are asked for."""
    before = server.snapshot()
    index = server.store.index
    index.__class__ = CountingIndex
    assert isinstance(index, CountingIndex)
    index.steps = []
    has = await client.has(names)
    async with client.read(names) as run:
        found = (len(run.blocks), run.bytes, run.tier)
    loan = server.tiers.lend(99, Wanted(keys_of(names, KV), 1 << 20))
    at_once = isinstance(loan, Loan)
    loan = loan if isinstance(loan, Loan) else await loan
    server.store.end(99, loan.lease)
    after = server.snapshot()
    return {
        "has": has,
        "found": found,
        "steps": index.steps,
        "at once": at_once,
        "kv": moved(before["by_kind"]["kv"], after["by_kind"]["kv"]),
        "disk": moved(before["disk"], after["disk"]),
    }


def moved(before: dict[str, Any], after: dict[str, Any]) -> dict[str, float]:
    return {
        name: value - before[name]
        for name, value in after.items()
        if isinstance(value, int | float) and value != before[name]
    }


async def test_a_foreign_prefix_is_a_miss_in_every_respect(tmp_path: Path) -> None:
    """Same answers, same look-ups, no byte sent, nothing read from disk; its owner has it all."""
    async with red_is_cached(tmp_path) as (server, client):
        foreign = await cost_of(server, client, names_of("blue"))
        unknown = await cost_of(server, client, names_of("blue", UNKNOWN))
        assert foreign == unknown
        assert foreign["has"] == [False] * BLOCKS and foreign["at once"]
        assert foreign["found"] == (0, 0, "none") and not any(foreign["steps"])
        assert not foreign["disk"]
        owner = await cost_of(server, client, names_of("red"))
        assert owner["has"] == [True] * BLOCKS
        assert owner["found"][0] == BLOCKS and owner["disk"]["read"] > 0
        assert owner != foreign, "what is compared would show a difference"


async def test_a_foreign_prefix_is_written_like_a_new_one(tmp_path: Path) -> None:
    """A writer is not told that the same text is there, and nothing is kept once for two."""
    server = CacheServer(make_store())
    await server.start(parse_address(f"unix://{tmp_path / 'cache.sock'}"))
    async with client_of(f"unix://{tmp_path / 'cache.sock'}") as client:
        for tenant, kept in (("red", BLOCKS), ("blue", 2 * BLOCKS)):
            assert await client.put(chain_of(tenant))
            tally = server.store.tallies.by_kind[KV]
            assert (tally.kept, tally.present) == (kept, 0)
        assert await client.put(chain_of("red"))
        assert server.store.tallies.by_kind[KV].present == BLOCKS
    async with asyncio.timeout(PATIENCE_S):
        await server.stop()
    server.store.arena.close()


@pytest.mark.parametrize(("tenant", "run"), [("red", BLOCKS), ("blue", 0)])
def test_routing_and_admission_know_of_ones_own_blocks_alone(tenant: str, run: int) -> None:
    index = SharedIndex()
    told = b"".join(name[:BLOCK_KEY_BYTES] for name in names_of("red"))
    masked = b"".join(
        bytes([told[at] & 0xF0]) + told[at + 1 : at + BLOCK_KEY_BYTES]
        for at in range(0, len(told), BLOCK_KEY_BYTES)
    )
    index.note(BlockNews("a", "1", 1, masked))
    asked = b"".join(name[:BLOCK_KEY_BYTES] for name in names_of(tenant))
    assert index.run_after(asked, 0) == run
