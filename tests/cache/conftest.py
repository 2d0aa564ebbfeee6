"""The asynchronous cache tests run on both event loops: they differ where bytes are moved."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping

import pytest

ONE_LOOP = ("test_kill.py", "test_cache_cluster.py", "test_fleet_link.py")
"""What they test is who asks whom, or a process with a loop of its own."""


@pytest.hookimpl(optionalhook=True)  # older pytest-asyncio: the standard loop only
def pytest_asyncio_loop_factories(
    item: pytest.Item,
) -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    factories: dict[str, Callable[[], asyncio.AbstractEventLoop]] = {
        "asyncio": asyncio.new_event_loop
    }
    if item.path.name in ONE_LOOP:
        return factories
    try:
        import uvloop
    except ImportError:
        return factories
    return factories | {"uvloop": uvloop.new_event_loop}
