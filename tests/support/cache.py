"""A cache service of a test's own: the real program, as a process beside the test."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from headrace.cache_client import CacheClient

START_S_MAX = 30.0


@asynccontextmanager
async def cache_service(folder: Path, **variables: str) -> AsyncIterator[str]:
    """Its address, once it answers. `variables` are settings of it, by their full names."""
    url = f"unix://{folder}/cache"
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HEADRACE_")}
    process = subprocess.Popen(  # noqa: ASYNC220  # one spawn, before anything runs
        [sys.executable, "-m", "headrace_cache"],
        env=environment | {"HEADRACE_CACHE_LISTEN": url} | variables,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    try:
        await _wait_ready(url)
        yield url
    finally:
        process.kill()
        process.communicate()


async def _wait_ready(url: str) -> None:
    async with asyncio.timeout(START_S_MAX):
        while True:
            client = CacheClient(url, arena=False)
            try:
                if await client.ping():
                    return
            finally:
                await client.close()
            await asyncio.sleep(0.02)
