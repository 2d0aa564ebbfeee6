"""One real stack for all integration tests that do not break it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import openai
import pytest

from support.otlp import OtlpReceiver
from support.stack import Stack


@pytest.fixture(scope="session")
def otlp() -> Iterator[OtlpReceiver]:
    with OtlpReceiver() as receiver:
        yield receiver


@pytest.fixture(scope="session")
def stack(otlp: OtlpReceiver) -> Iterator[Stack]:
    """Two workers in float32 behind one gateway, traced."""
    with Stack(workers=2, env={"HEADRACE_OTLP_ENDPOINT": otlp.url}) as running:
        yield running


@pytest.fixture
async def client(stack: Stack) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(
        base_url=f"{stack.url}/v1", api_key="none", max_retries=0
    ) as client:
        yield client
