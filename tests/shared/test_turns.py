"""Turns that a thread asks for."""

from __future__ import annotations

import os
import platform
import threading

import pytest

from headrace import turns


def in_a_thread(work: object) -> list[object]:
    """What `work` returns in a thread of its own, whose turns end with it."""
    found: list[object] = []
    thread = threading.Thread(target=lambda: found.append(work()))  # type: ignore[operator]
    thread.start()
    thread.join()
    return found


def kernel() -> tuple[int, ...]:
    return tuple(int(part) for part in platform.release().split("-")[0].split(".")[:2])


def test_a_thread_has_short_turns_where_the_kernel_knows_them() -> None:
    granted = in_a_thread(lambda: turns.ask(turns.SHORT_NS))
    if kernel() >= (6, 12) and platform.machine() in ("x86_64", "aarch64"):
        assert granted == [True]
    assert in_a_thread(lambda: turns.ask(turns.USUAL_NS)) == [
        platform.machine() in ("x86_64", "aarch64")
    ]


def test_niceness_stays_as_it_is() -> None:
    def work() -> tuple[int, int]:
        own = threading.get_native_id()
        os.setpriority(os.PRIO_PROCESS, own, os.getpriority(os.PRIO_PROCESS, own) + 1)
        before = os.getpriority(os.PRIO_PROCESS, own)
        turns.ask(turns.SHORT_NS)
        return before, os.getpriority(os.PRIO_PROCESS, own)

    ((before, after),) = in_a_thread(work)  # type: ignore[misc]
    assert before == after


def test_a_processor_whose_calls_we_do_not_know_is_left_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    assert turns.ask(turns.SHORT_NS) is False
