"""What is offered to the cache service: which blocks, when, and with which bytes."""

from __future__ import annotations

import threading
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from headrace import copying
from headrace.checksum import checksum
from headrace.types import BLOCK_TOKENS, CacheMode
from headrace_worker.kv import traffic
from headrace_worker.kv.export import Export, ExportFacts, State, WithdrawnError
from headrace_worker.kv.pool import KvPool
from headrace_worker.loading import LoadedModel
from headrace_worker.policy.keeping import When, keeping
from worker.builders import finish_all, make_engine, make_job, random_tokens, take_export

FACTS = ExportFacts(b"h" * 32, b"", 0)


def export_of(payload: np.ndarray[Any, Any], accepts: Any = lambda _: True) -> Export:
    return Export(FACTS, len(payload), lambda target: np.copyto(target, payload), accepts)


def test_an_export_is_taken_once_and_as_it_was() -> None:
    """Kept before its block is overwritten, it still has the bytes that its hash names."""
    payload = np.arange(64, dtype=np.uint8)
    export, late = export_of(payload), export_of(payload)
    export.keep()
    payload[:] = 0
    assert take_export(export).data == bytes(range(64))
    assert export.state is State.TAKEN
    late.drop()
    for gone in (export, late):
        with pytest.raises(WithdrawnError):
            take_export(gone)
    assert export.state is State.TAKEN and late.state is State.DROPPED


def test_a_block_waits_for_the_copy_that_is_made_of_it() -> None:
    """Its bytes go before it is handed out, not while."""
    payload = np.ones(64, np.uint8)
    copying, go_on = threading.Event(), threading.Event()

    def slowly(_: memoryview) -> bool:
        copying.set()
        return go_on.wait(10)

    export = export_of(payload, slowly)
    taken: list[bytes] = []
    taker = threading.Thread(target=lambda: taken.append(bytes(take_export(export).data)))
    taker.start()
    assert copying.wait(10)
    keeper = threading.Thread(target=export.keep)
    keeper.start()
    keeper.join(0.05)
    assert keeper.is_alive()
    go_on.set()
    for thread in (taker, keeper):
        thread.join(10)
    assert taken == [b"\x01" * 64]


def test_numbers_that_are_not_finite_are_never_written(tiny: LoadedModel) -> None:
    engine = make_engine(tiny)
    engine.add(make_job("a", random_tokens(40, 1), max_tokens=20))
    [first, second] = engine.step().blocks
    engine._kv.tensor[engine._scheduler.running[0].blocks[1], 0, 0, 0] = torch.inf
    assert len(take_export(first).data) == engine.block_bytes
    with pytest.raises(WithdrawnError):
        take_export(second)
    assert second.state is State.DROPPED


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("wrong", [None, torch.nan, torch.inf, -torch.inf])
def test_a_block_is_summed_and_looked_through_by_the_way(
    tiny: LoadedModel, dtype: torch.dtype, wrong: float | None
) -> None:
    """Where the arena has it, at a line's start; elsewhere by those who wait for it."""
    copying.prepare()
    pool = KvPool(tiny.config, 4, dtype)
    pool.tensor[2] = torch.randn(pool.tensor.shape[1:])
    if wrong is not None:
        pool.tensor[2, -1, -1, -1] = wrong
    memory = np.zeros(pool.payload_bytes + 64, np.uint8)
    start = -memory.ctypes.data % 64
    for offset in (start, start + 1):
        place = memory[offset : offset + pool.payload_bytes]
        export = Export(FACTS, len(place), partial(pool.copy_block, 2), pool.accepts)
        if wrong is not None:
            with pytest.raises(WithdrawnError):
                export.fill(memoryview(place))
            assert export.state is State.DROPPED
            continue
        crc = export.fill(memoryview(place))
        assert place.tobytes() == pool.export_block(2)
        assert crc in (None, checksum(place.tobytes()))
        if copying.state() == "native":
            assert (crc is None) == (offset != start)


def test_a_job_that_fails_withdraws_what_it_offered(tiny: LoadedModel) -> None:
    engine = make_engine(tiny)
    engine.add(make_job("a", random_tokens(40, 1), max_tokens=20))
    exports = engine.step().blocks
    engine._kv.tensor[engine._scheduler.running[0].blocks[0]] = torch.nan
    finish_all(engine)
    assert [export.state for export in exports] == [State.DROPPED] * 2


def test_what_could_not_be_written_is_offered_again_when_it_gives_way(tiny: LoadedModel) -> None:
    """The queue was full, say: the pool holds it meanwhile, and it is not lost."""
    engine = make_engine(tiny, 128)
    engine.add(make_job("a", random_tokens(40, 1), max_tokens=1))
    exports = engine.step().blocks
    wanted = [bytes(engine._kv.payload(b)) for b in range(8) if engine._pool.cached(b)]
    for export in exports:
        export.drop()
    later = finish_all(engine, [make_job("b", random_tokens(120, 2), max_tokens=2)])
    for export in exports:
        assert later.blocks[export.facts.hash].data in wanted


def test_copies_of_what_gave_way_are_bounded(
    tiny: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the service is far behind, blocks are dropped instead of filling memory."""
    engine = make_engine(tiny, 128)
    monkeypatch.setattr(traffic, "COPIES_BYTES_MAX", 2 * engine.block_bytes)
    engine.add(make_job("a", random_tokens(64, 1), max_tokens=1))
    exports = engine.step().blocks
    assert len(exports) == 4
    finish_all(engine, [make_job("b", random_tokens(120, 2), max_tokens=2)])
    states = [export.state for export in exports]
    assert states.count(State.OFFERED) == 2 and states.count(State.DROPPED) == 2


def test_a_prompt_is_offered_chunk_by_chunk(tiny: LoadedModel) -> None:
    """Others find its head while its tail is computed."""
    engine = make_engine(tiny, step_tokens_max=64)
    engine.add(make_job("a", random_tokens(160, 1), max_tokens=3))
    depths = [[e.facts.depth for e in engine.step().blocks] for _ in range(3)]
    assert depths == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert finish_all(engine).offers == []


def test_the_price_of_a_block_is_what_it_took_here(tiny: LoadedModel) -> None:
    engine = make_engine(tiny)
    engine._pace.note(100, 0, 300.0)
    out = finish_all(engine, [make_job("a", random_tokens(40, 1), max_tokens=1)])
    assert all(offer.cost_ms > 0 for offer in out.offers)
    assert {offer.job for offer in out.offers} == {"a"}


def test_an_explicit_job_has_written_what_it_names(tiny: LoadedModel) -> None:
    """Nothing else of it, not even when it gives way; what it names is kept for its time."""
    engine = make_engine(tiny, 192)
    job = make_job(
        "a",
        random_tokens(64, 1),
        max_tokens=40,
        cache_mode=CacheMode.EXPLICIT,
        cache_until_tokens=40,
        cache_ttl_ms=60_000,
    )
    first = finish_all(engine, [job])
    assert [(offer.depth, offer.pin_ms) for offer in first.offers] == [(0, 60_000), (1, 60_000)]
    assert finish_all(engine, [make_job("b", random_tokens(170, 2), max_tokens=2)]).offers
    again = finish_all(engine, [job])
    assert [offer.depth for offer in again.offers if offer.pin_ms] == [0, 1]


def test_what_is_named_again_is_offered_again(tiny: LoadedModel) -> None:
    """It lies in this worker's pool and in the service; its time there begins anew."""
    engine = make_engine(tiny)
    prompt = random_tokens(64, 1)
    finish_all(engine, [make_job("a", prompt, max_tokens=2)])
    named = make_job("b", prompt, max_tokens=2, cache_until_tokens=64, cache_ttl_ms=5_000)
    out = finish_all(engine, [named])
    assert [(offer.depth, offer.pin_ms) for offer in out.offers] == [(n, 5_000) for n in range(4)]
    assert out.cached["b"] == 48


@given(st.integers(1, 200), st.integers(0, 300), st.sampled_from(CacheMode), st.booleans())
def test_keeping_follows_the_job(prompt: int, until: int, mode: CacheMode, ended: bool) -> None:
    job = make_job("a", [1] * prompt, cache_until_tokens=until, cache_ttl_ms=7, cache_mode=mode)
    for index in range(20):
        keep, end = keeping(job, index, ended=ended), (index + 1) * BLOCK_TOKENS
        named = end <= min(until, prompt)
        assert (keep.pin_ms == 7) == named
        assert (keep.when is When.NEVER) == (mode is CacheMode.EXPLICIT and not named)
        if mode is CacheMode.IMPLICIT:
            assert (keep.when is When.LATER) == (end > prompt and not ended)


@pytest.mark.parametrize("kind", ["auto", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_is_finite_is_told_by_its_bits(tiny: LoadedModel, kind: Any, dtype: Any) -> None:
    """As torch would say, for each dtype; the layout's name differs with all that matters."""
    pool = KvPool(tiny.config, 2, dtype, kind)
    row = pool.payload(0)
    at = -2 * dtype.itemsize  # in int8 blocks, the last chunk's scales
    for value, good in [(0.0, True), (-1.5, True), (torch.inf, False), (torch.nan, False)]:
        number = torch.tensor([value], dtype=dtype).view(torch.uint8).numpy()
        row[at : at + dtype.itemsize] = number
        assert pool.accepts(row.tobytes()) is good
    others = {
        KvPool(tiny.config, 2, d, k).layout
        for d in (torch.float32, torch.bfloat16, torch.float16)
        for k in ("auto", "int8")
    }
    assert len(others) == 6 and pool.layout in others
    assert pool.layout == KvPool(tiny.config, 9, dtype, kind).layout
