"""/v1/cache and `headrace cache`, against a real gateway and a real cache service."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from headrace.cache_client import CacheClient
from headrace.cache_entries import PutEntry
from headrace.cli.main import app
from headrace.policy.hashing import block_hashes, layout_hash, root_hash
from headrace.types import Finish, FinishReason, pack_tokens
from headrace_gateway.generation import Chunk
from headrace_gateway.tenants import salt_of
from support.api import MODEL, Running, ScriptedFleet, encode, running_gateway
from support.cache import cache_service

KEYS = "k-red:red,k-blue:blue,k-admin:ops admin=true"
FINGERPRINT = f"fingerprint-of-{MODEL}"
TEXT = "the quick brown fox jumps over the lazy dog " * 40
BLOCK_BYTES = 1_000


def chain_of(tenant: str, text: str = TEXT) -> list[bytes]:
    return block_hashes(root_hash(FINGERPRINT, salt_of(tenant)), pack_tokens(encode(text)))


@asynccontextmanager
async def administered(folder: Path) -> AsyncIterator[tuple[Running, CacheClient]]:
    """A gateway and a cache service that holds the KV of TEXT for red and for blue."""
    async with (
        cache_service(folder) as url,
        running_gateway(api_keys=KEYS, cache_url=url) as g,
    ):
        client = CacheClient(url, timeout_s=20, put_timeout_s=20)
        for tenant in ("red", "blue"):
            parent, entries = b"", []
            for depth, each in enumerate(chain_of(tenant)):
                layout = layout_hash(FINGERPRINT, "float32")
                entries.append(
                    PutEntry(each, bytes(BLOCK_BYTES), parent, depth, tenant=tenant, layout=layout)
                )
                parent = each
            assert await client.write(entries)
        yield g, client
        await client.close()


async def call(
    g: Running, key: str, method: str, path: str, body: object = None
) -> tuple[int, Any]:
    headers = {"Authorization": f"Bearer {key}"}
    async with g.http.request(method, f"/v1/cache{path}", json=body, headers=headers) as answer:
        return answer.status, await answer.json()


async def listed(g: Running, key: str, query: str = "") -> list[dict[str, Any]]:
    status, page = await call(g, key, "GET", f"/entries?limit=1000{query}")
    assert status == 200, page
    rows: list[dict[str, Any]] = page["data"]
    return rows


async def test_a_key_sees_its_own_tenant_and_an_admin_everybody(tmp_path: Path) -> None:
    async with administered(tmp_path) as (g, _):
        red, blue = chain_of("red"), chain_of("blue")
        assert {row["hash"] for row in await listed(g, "k-red")} == {each.hex() for each in red}
        everything = {row["hash"] for row in await listed(g, "k-admin")}
        assert everything == {each.hex() for each in red + blue}
        assert len(await listed(g, "k-admin", "&tenant=blue")) == len(blue)
        behind = await listed(g, "k-red", f"&prefix={red[3].hex()}")
        assert {row["hash"] for row in behind} == {each.hex() for each in red[3:]}
        first = next(row for row in behind if row["hash"] == red[3].hex())
        assert (first["parent"], first["depth"], first["tenant"]) == (red[2].hex(), 3, "red")
        assert (first["kind"], first["size_bytes"], first["band"]) == (
            "kv",
            BLOCK_BYTES,
            "standard",
        )
        assert "ram" in first["tiers"]
        status, page = await call(g, "k-red", "GET", "/entries?limit=2")
        assert status == 200
        assert len(page["data"]) == 2
        assert page["next_cursor"]
        for key, path in [("k-red", "/entries?tenant=blue"), ("k-blue", "?tenant=red")]:
            status, refused = await call(g, key, "GET", path)
            assert (status, refused["error"]["code"]) == (403, "not_an_administrator")
        status, own = await call(g, "k-red", "GET", "")
        assert status == 200
        assert set(own["by_tenant"]) == {"red"}
        status, whole = await call(g, "k-admin", "GET", "")
        assert set(whole["by_tenant"]) >= {"red", "blue"}


async def test_a_wrong_query_is_told_by_its_field(tmp_path: Path) -> None:
    async with administered(tmp_path) as (g, _):
        for query, field in (
            ("limit=banana", "limit"),
            ("limit=0", "limit"),
            ("kind=video", "kind"),
            ("prefix=xyz", "prefix"),
            ("cursor=99999999999999999999", "cursor"),
        ):
            status, refused = await call(g, "k-red", "GET", f"/entries?{query}")
            assert (status, refused["error"]["param"]) == (400, field)
            assert refused["error"]["message"].startswith(f"{field}: ")
        named = {"hashes": ["0" * 64], "ttl": "soon"}
        status, refused = await call(g, "k-red", "POST", "/pin", named)
        assert status == 400
        assert refused["error"]["message"] == "ttl: a time like 90s, 30m, 12h or 1d"


async def test_entries_are_pinned_by_hash_and_by_prompt(tmp_path: Path) -> None:
    """A prompt is named with its tenant's salt: nobody pins, or finds out about, another's."""
    async with administered(tmp_path) as (g, _):
        red = chain_of("red")
        status, done = await call(
            g, "k-red", "POST", "/pin", {"hashes": [red[0].hex()], "ttl": "30m"}
        )
        assert (status, done["entries"]) == (200, 1)
        pinned = {row["hash"]: row["pinned_ms"] for row in await listed(g, "k-red")}
        assert 29 * 60_000 < pinned[red[0].hex()] <= 30 * 60_000
        prompt = {"model": MODEL, "prompt": TEXT}
        status, done = await call(g, "k-red", "POST", "/pin", {**prompt, "ttl": "1h"})
        assert (status, done["entries"]) == (200, len(red))
        status, done = await call(g, "k-admin", "POST", "/unpin", {**prompt, "tenant": "red"})
        assert (status, done["entries"]) == (200, len(red))
        status, done = await call(g, "k-admin", "POST", "/pin", {**prompt, "ttl": "1h"})
        assert (status, done["entries"]) == (200, 0), "the admin's own tenant holds none"
        status, done = await call(
            g, "k-blue", "POST", "/pin", {"hashes": [each.hex() for each in red], "ttl": "1h"}
        )
        assert (status, done["entries"]) == (200, 0)
        assert not any(row["pinned_ms"] for row in await listed(g, "k-admin"))


async def test_what_is_purged_is_gone_and_nothing_else(tmp_path: Path) -> None:
    async with administered(tmp_path) as (g, client):
        red, blue = chain_of("red"), chain_of("blue")
        status, done = await call(g, "k-red", "POST", "/purge", {"prefix": red[4].hex()})
        assert (status, done["entries"]) == (200, len(red) - 4)
        assert done["size_bytes"] >= (len(red) - 4) * BLOCK_BYTES
        assert await client.has(red) == [True] * 4 + [False] * (len(red) - 4)
        status, refused = await call(g, "k-red", "POST", "/purge", {})
        assert (status, refused["error"]["param"]) == (400, "all")
        status, _ = await call(g, "k-red", "POST", "/purge", {"tenant": "blue"})
        assert status == 403
        status, done = await call(g, "k-red", "POST", "/purge", {"all": True})
        assert (status, done["entries"]) == (200, 4)
        assert all(await client.has(blue))
        status, _ = await call(g, "k-admin", "POST", "/purge", {"model": "other"})
        assert status == 404
        status, done = await call(g, "k-admin", "POST", "/purge", {"model": MODEL})
        assert (status, done["entries"]) == (200, len(blue))
        assert await listed(g, "k-admin") == []


async def test_quotas_are_an_administrators(tmp_path: Path) -> None:
    async with administered(tmp_path) as (g, _):
        body = {"tenant": "red", "max_bytes": 5_000_000, "min_bytes": 1_000_000}
        assert (await call(g, "k-red", "PUT", "/quota", body))[0] == 403
        assert (await call(g, "k-admin", "PUT", "/quota", body))[0] == 200
        status, refused = await call(g, "k-admin", "PUT", "/quota", body | {"min_bytes": 6_000_000})
        assert (status, refused["error"]["param"]) == (400, "min_bytes")


async def test_without_a_cache_service_it_says_so(tmp_path: Path) -> None:
    async with running_gateway(api_keys=KEYS) as g:
        status, refused = await call(g, "k-red", "GET", "")
        assert (status, refused["error"]["code"]) == (503, "no_cache_service")
    async with running_gateway(api_keys=KEYS, cache_url=f"unix://{tmp_path}/none") as g:
        status, refused = await call(g, "k-red", "GET", "/entries")
        assert (status, refused["error"]["code"]) == (503, "unavailable")
        assert (await call(g, "wrong", "GET", ""))[0] == 401


BODIES: dict[str, dict[str, Any]] = {
    "/pin": {"hashes": ["a" * 64], "ttl": "30m"},
    "/unpin": {"model": MODEL, "prompt": TEXT},
    "/purge": {"prefix": "a" * 64},
    "/quota": {"tenant": "red", "max_bytes": 10, "min_bytes": 1},
}
STRANGE = st.recursive(
    st.sampled_from(
        [None, True, 0, -1, 1.5, 2**60, "", "x", "a" * 64, "A" * 64, "30m", "0m", "red", MODEL,
         "kv", TEXT, "\u0000"]
    ),
    lambda inner: (
        st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=4), inner, max_size=2)
    ),
    max_leaves=5,
)  # fmt: skip
FIELDS = ["hashes", "ttl", "model", "prompt", "messages", "tenant", "kind", "prefix", "all",
          "max_bytes", "min_bytes"]  # fmt: skip


def test_any_body_is_answered_without_a_bug(tmp_path: Path) -> None:
    """200 or 4xx, whoever asks; and nobody but the administrator touches blue's entries."""
    with asyncio.Runner() as runner:
        stack = AsyncExitStack()
        g, client = runner.run(stack.enter_async_context(administered(tmp_path)))
        changes = st.dictionaries(st.sampled_from(FIELDS), STRANGE, max_size=3)

        @given(st.sampled_from(sorted(BODIES)), changes)
        @settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
        def attack(path: str, changed: dict[str, Any]) -> None:
            method = "PUT" if path == "/quota" else "POST"
            status, answer = runner.run(call(g, "k-red", method, path, BODIES[path] | changed))
            assert status == 200 or 400 <= status < 500, answer
            if status != 200:
                assert set(answer["error"]) == {"message", "type", "param", "code"}

        attack()
        assert all(runner.run(client.has(chain_of("blue"))))
        runner.run(stack.aclose())


def cli(g: Running, key: str, *arguments: str) -> str:
    """What `headrace cache …` prints."""
    found = CliRunner().invoke(
        app, ["cache", *arguments], env={"HEADRACE_URL": g.url, "HEADRACE_API_KEY": key}
    )
    assert found.exit_code == 0, (found.output, found.exception)
    return found.output


async def test_the_command_line_does_the_same(tmp_path: Path) -> None:
    (tmp_path / "prompt.txt").write_text(TEXT)
    async with administered(tmp_path) as (g, _):
        red = chain_of("red")

        async def run(key: str, *arguments: str) -> str:
            return await asyncio.to_thread(cli, g, key, *arguments)

        prompt = ("--prompt", str(tmp_path / "prompt.txt"))
        assert red[0].hex() in await run("k-red", "list")
        assert len(json.loads(await run("k-admin", "list", "--json", "--limit", "3"))) == 3
        assert f"{len(red)} entries pinned" in await run("k-red", "pin", *prompt, "--ttl", "2h")
        assert "pinned 7" in await run("k-red", "list"), "about 7200 s"
        assert "1 entries unpinned" in await run("k-red", "unpin", red[0].hex())
        assert "at most 1048576 bytes" in await run("k-admin", "quota", "blue", "--max", "1M")
        assert "by_tenant" in json.loads(await run("k-red", "stats"))
        assert f"{len(red) - 2} entries dropped" in await run(
            "k-red", "purge", "--prefix", red[2].hex()
        )


@pytest.mark.parametrize(
    ("name", "content", "path"),
    [
        ("rules.txt", TEXT, "completions"),
        ("rules.json", json.dumps({"messages": [{"role": "user", "content": TEXT}]}), "chat"),
        (
            "rules.jsonl",
            f"{json.dumps({'input': TEXT})}\n\n{json.dumps({'prompt': TEXT})}\n",
            "both",
        ),
    ],
)
async def test_prompts_are_prewarmed_from_files(
    tmp_path: Path, name: str, content: str, path: str
) -> None:
    (tmp_path / name).write_text(content)
    fleet = ScriptedFleet(script=lambda job: [Chunk((70,), Finish(FinishReason.LENGTH), 32)])
    async with running_gateway(fleet) as g:
        said = await asyncio.to_thread(cli, g, "", "prewarm", str(tmp_path / name), "--ttl", "1h")
        assert len(fleet.jobs) == (2 if path == "both" else 1)
        for job in fleet.jobs:
            assert job.cache_until_tokens == len(job.prompt)
            assert job.cache_ttl_ms == 3_600_000
            assert f"{len(job.prompt)} tokens, 32 of them were there already" in said


@pytest.mark.parametrize(
    "arguments",
    [
        ("pin",),
        ("pin", "a" * 64, "--prompt", "x"),
        ("purge",),
        ("prewarm", "/no/such/file"),
        ("pin", "nonsense"),
        ("list", "--kind", "x"),
        ("quota", "red", "--max", "much"),
    ],
)
async def test_what_cannot_be_done_is_one_line(arguments: tuple[str, ...]) -> None:
    async with running_gateway() as g:
        env = {"HEADRACE_URL": g.url}
        found = await asyncio.to_thread(CliRunner().invoke, app, ["cache", *arguments], env=env)
        assert found.exit_code == 1
        assert found.stderr.count("\n") == 1
        assert found.stderr.startswith("headrace: ")
