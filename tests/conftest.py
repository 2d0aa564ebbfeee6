"""What many tests start from: a real Valkey of their own, and a client of it."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from redis.asyncio import Redis

from headrace import models
from headrace.errors import ModelError
from headrace.streams import connect
from support.valkey import Valkey

# other tests compute on the same cores: a fleet that steps back for them would miss its time limits
os.environ.setdefault("HEADRACE_NICE", "0")


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """The real model's file; the tests that need it are skipped where it has not been pulled."""
    try:
        return models.resolve("smollm2")
    except ModelError:
        pytest.skip("SmolLM2 is not here: `headrace pull smollm2` fetches it")


@pytest.fixture
def valkey() -> Iterator[Valkey]:
    """With its append-only file on, so that a test may kill it and start it again."""
    server = Valkey(aof=True)
    server.start()
    yield server
    server.close()


@pytest.fixture
async def redis(valkey: Valkey) -> AsyncIterator[Redis]:
    client = connect(valkey.url)
    yield client
    await client.aclose()
