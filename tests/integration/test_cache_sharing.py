"""What one worker computed, another reads from the cache service; without it, all goes on."""

from __future__ import annotations

import asyncio
import signal

import openai

from support.fleet import eventually
from support.otlp import OtlpReceiver, ReceivedSpan
from support.stack import Stack

PROMPT = [(k * 97) % 5_000 + 100 for k in range(512)]


LONG = [(k * 89) % 5_000 + 100 for k in range(1_024)]


async def ask(client: openai.AsyncOpenAI, prompt: list[int] = PROMPT) -> tuple[str, int]:
    answer = await client.completions.create(
        model="smollm2", prompt=prompt, max_tokens=8, temperature=0
    )
    assert answer.usage is not None
    details = answer.usage.prompt_tokens_details
    return answer.choices[0].text, (details.cached_tokens or 0) if details else 0


async def test_the_second_worker_reads_what_the_first_computed() -> None:
    with (
        OtlpReceiver() as otlp,
        Stack(workers=2, env={"HEADRACE_OTLP_ENDPOINT": otlp.url}) as stack,
    ):
        client = openai.AsyncOpenAI(base_url=f"{stack.url}/v1", api_key="x")
        cold, cached = await ask(client)
        assert cached == 0
        await stack.wait_idle()
        await eventually(lambda: any(s.name == "process jobs smollm2" for s in otlp.spans))
        first = next(s for s in otlp.spans if s.name == "process jobs smollm2")
        await asyncio.to_thread(stack.kill, first.attributes["headrace.worker"], signal.SIGTERM)
        warm, cached = await ask(client)
        assert (warm, cached) == (cold, 496)

        def ended(name: str) -> list[ReceivedSpan]:
            return sorted((s for s in otlp.spans if s.name == name), key=lambda s: s.start_ns)

        await eventually(lambda: len(ended("process jobs smollm2")) == 2)
        hits = [s.attributes["headrace.cache.hit_blocks"] for s in ended("cache lookup")]
        assert hits == [0, 31]
        lookup = ended("cache lookup")[-1]
        assert lookup.attributes["headrace.cache.tier"] == "arena"
        assert lookup.attributes["headrace.cache.bytes"] % 31 == 0
        assert lookup.attributes["headrace.cache.fetch_ms"] > 0
        assert ended("process jobs smollm2")[0].attributes["headrace.cache.written_tokens"] == 512
        last = ended("process jobs smollm2")[-1]
        assert last.attributes["headrace.worker"] != first.attributes["headrace.worker"]
        assert last.attributes["headrace.cache.imported_tokens"] == 496
        await client.close()


async def test_a_prompt_survives_the_restart_of_everything() -> None:
    """Worker and cache service are new, the blocks come from the disk, the text is the same."""
    with Stack(workers=1) as stack:
        stack.kill("cache")
        stack.cache_env["HEADRACE_CACHE_DISK_PATH"] = str(stack.valkey.folder / "disk")
        stack.start_cache()
        client = openai.AsyncOpenAI(base_url=f"{stack.url}/v1", api_key="x", max_retries=0)
        await ask(client, LONG[-64:])  # the worker finds the service again
        warmed = await client.completions.create(
            model="smollm2",
            prompt=LONG,
            max_tokens=8,
            temperature=0,
            extra_body={"prompt_cache_options": {"ttl": "1h"}},
        )
        assert warmed.usage is not None
        details = warmed.usage.prompt_tokens_details
        assert details is not None
        assert details.model_dump()["cache_write_tokens"] == 1_024
        await stack.wait_idle()
        for service in ("cache", "w1"):
            await asyncio.to_thread(stack.kill, service, signal.SIGTERM)
        stack.start_cache()
        stack.start_worker()
        await asyncio.to_thread(stack.wait_ready, 1)
        assert await ask(client, LONG) == (warmed.choices[0].text, 1_008)
        await client.close()


async def test_the_cache_service_may_die_at_any_moment() -> None:
    """Killed while requests run, away for a while, and back: no request fails, no text changes."""
    with Stack(workers=1) as stack:
        client = openai.AsyncOpenAI(base_url=f"{stack.url}/v1", api_key="x", max_retries=0)
        prompts = [[(k * 31 + n) % 5_000 + 100 for k in range(150)] for n in range(6)]
        expected = [(await ask(client, p))[0] for p in prompts]

        async def keep_asking() -> list[str]:
            return [(await ask(client, p))[0] for _ in range(4) for p in prompts]

        asking = [asyncio.create_task(keep_asking()) for _ in range(2)]
        for _ in range(3):
            await asyncio.sleep(0.4)
            await asyncio.to_thread(stack.kill, "cache")
            await asyncio.sleep(0.3)
            stack.start_cache()
        for task in asking:
            assert await task == expected * 4
        await stack.wait_idle()
        await client.close()
