"""The engine from outside: cancel, refuse, offer and import KV, survive a bad step."""

from __future__ import annotations

import re
from array import array
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.clock import ManualClock
from headrace.errors import CallerError, ModelError, SettingsError
from headrace.types import BLOCK_KEY_BYTES, Band, Finish, FinishReason, JobProgress
from headrace_worker.engine import Engine, EngineConfig
from headrace_worker.executor import Executor
from headrace_worker.kv.pool import KvPool
from headrace_worker.loading import LoadedModel, memory
from headrace_worker.results import BlockPayload, JobStory
from worker.builders import (
    finish_all,
    logits_of,
    make_engine,
    make_job,
    random_tokens,
    take_export,
)


def test_a_job_gets_its_tokens_in_order(tiny: LoadedModel) -> None:
    """One delta a step, positions without a gap, the end with the last token."""
    out = finish_all(make_engine(tiny), [make_job("a", [1, 2, 3], max_tokens=5)])
    assert [delta.first for delta in out.deltas] == [0, 1, 2, 3, 4]
    assert [delta.finish is None for delta in out.deltas] == [True] * 4 + [False]
    assert out.finishes["a"].reason is FinishReason.LENGTH
    story = out.stories["a"]
    assert (story.output_tokens, story.preemptions, story.chunks[0][0]) == (5, 0, 3)


def test_stop_ids_and_end_tokens(tiny: LoadedModel) -> None:
    """The token that stops is the last one delivered; `ignore_eos` lets the end token pass."""
    free = finish_all(make_engine(tiny), [make_job("a", [5, 6], max_tokens=12)]).tokens["a"]
    at = next(i for i in range(2, 12) if free[i] not in free[:i])
    stopping = make_job("a", [5, 6], max_tokens=12, stop_token_ids=(free[at],))
    stopped = finish_all(make_engine(tiny), [stopping])
    assert stopped.tokens["a"] == free[: at + 1]
    assert stopped.finishes["a"].reason is FinishReason.STOP
    assert tiny.record.eos_token_ids == (1, 0)


def test_the_context_ends_a_job(tiny: LoadedModel) -> None:
    """Prompt and output together never exceed the context, nor the pool."""
    engine = make_engine(tiny)
    assert engine.record.context_tokens == 512
    out = finish_all(engine, [make_job("a", random_tokens(500, 1), max_tokens=100)])
    assert len(out.tokens["a"]) == 12
    assert out.finishes["a"].reason is FinishReason.LENGTH
    small = make_engine(tiny, 64)
    out = finish_all(small, [make_job("a", random_tokens(60, 1), max_tokens=100)])
    assert len(out.tokens["a"]) == 4


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"prompt": []}, "the prompt is empty"),
        ({"prompt": [1] * 512}, "the prompt has 512 tokens, this worker takes at most 511"),
        ({"prompt": [1, 300]}, "token id 300 is outside the vocabulary of 300"),
        ({"prompt": [1], "logged": [4000]}, "token id 4000 is outside"),
        ({"prompt": [1], "model": "other"}, "this worker serves 'test', not 'other'"),
        ({"prompt": [1], "max_tokens": 0}, "max_tokens = 0"),
        ({"prompt": [1], "temperature": float("nan")}, "temperature = nan"),
        ({"prompt": [1], "temperature": -0.1}, "temperature = -0.1"),
        ({"prompt": [1], "top_p": 0.0}, "top_p = 0.0"),
        ({"prompt": [1], "top_p": float("nan")}, "top_p = nan"),
        ({"prompt": [1], "top_k": -1}, "top_k = -1"),
    ],
)
def test_what_cannot_run_is_refused_with_its_reason(
    tiny: LoadedModel, changes: dict[str, Any], reason: str
) -> None:
    """`refuse` says why, and `add` does not let it in."""
    engine = make_engine(tiny)
    job = make_job("a", **changes)
    assert reason in (engine.refuse(job) or "")
    with pytest.raises(CallerError, match=re.escape(reason)):
        engine.add(job)
    assert not engine.has_work
    engine.check_integrity()


def test_cancel_frees_the_blocks_at_once(tiny: LoadedModel) -> None:
    """A cancelled job's room is back before the next step, which says that it ended."""
    engine = make_engine(tiny, 512)
    engine.add(make_job("a", random_tokens(100, 1), max_tokens=50))
    engine.add(make_job("b", [7, 8], max_tokens=3))
    engine.step()
    assert engine.counts() == (2, 0, 512 - 112 - 16)
    assert engine.cancel("a") and not engine.cancel("a") and not engine.cancel("nobody")
    assert engine.counts() == (1, 0, 512 - 16)
    engine.check_integrity()
    out = finish_all(engine)
    assert out.finishes["a"].reason is FinishReason.CANCELLED
    assert out.deltas[0].first == 1 and out.deltas[0].tokens == ()
    assert len(out.tokens["b"]) == 2
    assert engine.counts() == (0, 0, 512)


def test_a_waiting_job_can_be_cancelled(tiny: LoadedModel) -> None:
    """It never ran: its story says so."""
    engine = make_engine(tiny, 512, max_running=1)
    engine.add(make_job("a", [1], max_tokens=4))
    engine.add(make_job("b", [2], max_tokens=4))
    engine.step()
    engine.cancel("b")
    out = finish_all(engine)
    assert out.finishes["b"].reason is FinishReason.CANCELLED
    assert (out.stories["b"].scheduled_ns, out.stories["b"].chunks) == (0, ())
    assert len(out.tokens["a"]) == 3


def test_abort_all_drops_everything_silently(tiny: LoadedModel) -> None:
    """After a lost lease there is nothing to say, and the cache is still of use."""
    engine = make_engine(tiny)
    prompt = random_tokens(40, 1)
    engine.add(make_job("a", prompt))
    engine.step()
    engine.cancel("a")
    engine.add(make_job("b", prompt))
    engine.step()
    engine.add(make_job("c", prompt))
    engine.abort_all()
    assert not engine.has_work and engine.counts()[:2] == (0, 0)
    engine.check_integrity()
    assert engine.step().deltas == []
    assert finish_all(engine, [make_job("a", prompt)]).cached["a"] == 32


def test_a_lost_end_is_made_up_for(tiny: LoadedModel) -> None:
    """A job whose log is complete already ends without a token."""
    full = make_job("a", [1, 2], max_tokens=3, logged=[4, 5, 6], attempt=3)
    stopped = make_job("b", [1, 2], logged=[4, 1], ignore_eos=False)
    out = finish_all(make_engine(tiny), [full, stopped])
    assert [(d.job, d.first, d.tokens, d.attempt) for d in out.deltas] == [
        ("a", 3, (), 3),
        ("b", 2, (), 1),
    ]
    assert out.finishes["a"].reason is FinishReason.LENGTH
    assert out.finishes["b"].reason is FinishReason.STOP


def test_tenants_do_not_share_blocks(tiny: LoadedModel) -> None:
    """The same prompt under another salt computes everything itself."""
    engine = make_engine(tiny)
    prompt = random_tokens(50, 1)
    finish_all(engine, [make_job("a", prompt, salt=b"one")])
    out = finish_all(
        engine, [make_job("b", prompt, salt=b"two"), make_job("c", prompt, salt=b"one")]
    )
    assert out.cached["b"] == 0
    assert out.cached["c"] == 48


def test_a_step_that_raises_costs_its_own_jobs_only(
    tiny: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who was in the plan ends with an error that names it; who waited is served as ever."""
    engine = make_engine(tiny, max_running=2)
    prompt = random_tokens(40, 1)
    calm = finish_all(make_engine(tiny), [make_job("c", prompt)]).tokens["c"]
    engine.add(make_job("a", prompt))
    engine.add(make_job("b", random_tokens(40, 2)))
    engine.add(make_job("c", prompt, band=Band.BATCH))
    with monkeypatch.context() as patch:

        def fail(self: Executor, *_: Any) -> Any:
            raise RuntimeError("out of luck")

        patch.setattr(Executor, "submit", fail)
        result = engine.step()
    assert {delta.job for delta in result.deltas} == {"a", "b"}
    for delta in result.deltas:
        assert delta.finish is not None and delta.finish.reason is FinishReason.ERROR
        assert "out of luck" in delta.finish.error
    engine.check_integrity()
    out = finish_all(engine)
    assert out.tokens == {"c": calm}
    assert out.cached["c"] == 0, "nothing of the failed step is in the cache"


def test_numbers_that_are_not_finite_cost_one_job(tiny: LoadedModel) -> None:
    """A job whose KV went bad ends with an error; its blocks are cleaned and found by nobody."""
    engine = make_engine(tiny)
    prompt, other = random_tokens(40, 1), random_tokens(40, 2)
    calm = finish_all(make_engine(tiny), [make_job("b", other)]).tokens["b"]
    engine.add(make_job("a", prompt))
    engine.step()
    engine._kv.tensor[engine._scheduler.running[0].blocks[0]] = torch.nan
    engine.add(make_job("b", other))
    out = finish_all(engine)
    assert out.finishes["a"].reason is FinishReason.ERROR
    assert "finite" in out.finishes["a"].error
    assert out.tokens["b"] == calm
    assert torch.isfinite(engine._kv.tensor).all()
    assert finish_all(engine, [make_job("a", prompt)]).cached["a"] == 0


def test_sampling_survives_batch_preemption_and_resumption(tiny: LoadedModel) -> None:
    """A seeded job gives the same text alone, among others in a tiny pool, and resumed."""

    def seeded(**changes: Any) -> Any:
        facts = {"max_tokens": 40, "temperature": 1.0, "top_p": 0.95, "seed": 11} | changes
        return make_job("a", random_tokens(30, 4), **facts)

    alone = finish_all(make_engine(tiny), [seeded()]).tokens["a"]
    others = [
        make_job(f"o{i}", random_tokens(20 + i, i), max_tokens=30, temperature=0.7, seed=i)
        for i in range(6)
    ]
    crowd = finish_all(make_engine(tiny, 112), [*others[:3], seeded(), *others[3:]])
    assert crowd.tokens["a"] == alone
    assert sum(story.preemptions for story in crowd.stories.values()) > 0
    resumed = finish_all(make_engine(tiny), [seeded(logged=alone[:17])])
    assert resumed.tokens["a"] == alone[17:]
    assert finish_all(make_engine(tiny), [seeded(seed=12)]).tokens["a"] != alone


def test_blocks_are_offered_once(tiny: LoadedModel) -> None:
    """As they are computed, heads first; again only after they were gone."""
    engine = make_engine(tiny, 128)
    prompt = random_tokens(64, 1)
    first = finish_all(engine, [make_job("a", prompt, max_tokens=2)])
    assert len(first.offers) == 4
    assert [offer.depth for offer in first.offers] == [0, 1, 2, 3]
    assert finish_all(engine, [make_job("a", prompt, max_tokens=2)]).offers == []
    finish_all(engine, [make_job("b", random_tokens(120, 2), max_tokens=2)])
    assert finish_all(engine, [make_job("a", prompt, max_tokens=2)]).offers[0] == first.offers[0]
    quiet = make_engine(tiny, offer_blocks=False)
    assert finish_all(quiet, [make_job("a", prompt)]).offers == []


def test_evicted_blocks_are_offered_with_what_they_held(tiny: LoadedModel) -> None:
    """What nobody took in time, and what a job left behind, goes as it was when it gives way."""
    engine = make_engine(tiny, 128)
    prompt = random_tokens(64, 1)
    whole = make_job("a", prompt, max_tokens=40)
    wanted = finish_all(make_engine(tiny), [whole]).blocks
    engine.add(whole)
    offered = engine.step().blocks
    assert [export.facts.depth for export in offered] == [0, 1, 2, 3], "the prompt, at once"
    while engine._scheduler.running[0].registered < 6:
        assert engine.step().blocks == [], "its output comes later"
    engine.cancel("a")
    later = finish_all(engine, [make_job("b", random_tokens(120, 2), max_tokens=2)])
    for export in offered:
        assert take_export(export) == wanted[export.facts.hash]
    output = [offer.hash for offer in later.offers if offer.hash in wanted]
    assert len(output) == 2
    assert all(later.blocks[block_hash] == wanted[block_hash] for block_hash in output)


def test_imports_that_do_not_fit_are_left_out(tiny: LoadedModel) -> None:
    """Foreign hashes, wrong sizes and infinities are ignored, and the answer is the same."""
    prompt = random_tokens(80, 1)
    job = make_job("a", prompt)
    source = finish_all(make_engine(tiny), [job])
    good = [
        source.blocks[block_hash] for block_hash in make_engine(tiny).missing_blocks(job).hashes
    ]
    bad = np.frombuffer(good[1].data, np.float32).copy()
    bad[3] = np.inf
    for payloads, imported in [
        ([], 0),
        (good, 64),
        (good[::-1], 64),
        (good[1:], 0),
        ([good[0], good[2]], 16),
        ([good[0], BlockPayload(good[1].hash, good[1].parent, 1, bad.tobytes())], 16),
        ([BlockPayload(good[0].hash, good[0].parent, 0, b"short")], 0),
        ([BlockPayload(b"x" * 32, good[0].parent, 0, good[0].data), *good], 64),
        ([*good[:2], BlockPayload(good[2].hash, b"", 2, memoryview(good[2].data))], 48),
    ]:
        engine = make_engine(tiny)
        engine.add(job, payloads)
        out = finish_all(engine)
        assert out.tokens == source.tokens
        assert out.stories["a"].cached_imported == imported


def test_imports_never_push_out_their_own_prefix(tiny: LoadedModel) -> None:
    """In a pool that is nearly full, what was found stays and the rest is computed."""
    prompt = random_tokens(100, 1)
    job = make_job("a", prompt, max_tokens=2)
    source = finish_all(make_engine(tiny), [job])
    engine = make_engine(tiny, 112)
    finish_all(engine, [make_job("head", prompt[:33], max_tokens=1)])
    engine.add(make_job("busy", random_tokens(40, 5), max_tokens=2))
    engine.step()
    engine.add(job, source.blocks.values())
    engine.check_integrity()
    out = finish_all(engine)
    assert out.tokens["a"] == source.tokens["a"]
    story = out.stories["a"]
    assert story.cached_local == 32 and story.cached_imported >= 16


def test_a_pool_gives_back_what_it_was_given(tiny: LoadedModel) -> None:
    """A block's payload is as long as announced, survives the trip and is checked on the way in."""
    pool = KvPool(tiny.config, 3, torch.bfloat16)
    pool.tensor.copy_(torch.randn(pool.tensor.shape))
    data = pool.export_block(1)
    assert len(data) == KvPool.block_bytes(tiny.config, torch.bfloat16)
    pool.import_block(2, data)
    assert torch.equal(pool.tensor[1], pool.tensor[2])
    with pytest.raises(ValueError, match="finite"):
        pool.import_block(2, data[:-2])
    with pytest.raises(ValueError, match="finite"):
        pool.import_block(2, b"\xff" * len(data))


def test_a_pool_that_does_not_fit_is_refused(
    tiny: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The message has both sizes and the setting to change."""
    monkeypatch.setattr(memory, "available_bytes", lambda: 1 << 20)
    with pytest.raises(
        ModelError, match=r"needs \d+ MiB .* 1 MiB are available: lower HEADRACE_KV"
    ):
        Engine(tiny, EngineConfig(kv_tokens=100_000), ManualClock())


@pytest.mark.parametrize("limits", [{"kv_tokens": 16}, {"kv_tokens": 64, "max_running": 0}])
def test_settings_that_cannot_work_are_refused(limits: dict[str, int]) -> None:
    """They stop start-up instead of the first request."""
    with pytest.raises(SettingsError):
        EngineConfig(**limits)
    with pytest.raises(SettingsError, match="max_running = 9"):
        EngineConfig(kv_tokens=64, max_running=9, step_tokens_max=8)


TRAFFIC = st.lists(
    st.tuples(
        st.integers(0, 6),  # steps before it comes
        st.integers(1, 70),  # prompt
        st.integers(0, 3),  # shared blocks
        st.integers(1, 12),  # output
        st.none() | st.integers(0, 6),  # cancelled after so many steps
    ),
    min_size=1,
    max_size=8,
)


@given(traffic=TRAFFIC, kv_tokens=st.sampled_from([144, 208, 400]), budget=st.integers(8, 64))
@settings(max_examples=25, deadline=None)
def test_random_traffic_never_changes_an_answer(
    tiny: LoadedModel, traffic: list[tuple[int, int, int, int, int | None]], kv_tokens, budget
) -> None:
    """Arrivals, cancels, tiny pools and small budgets: each text is a prefix of the calm one."""
    engine = make_engine(tiny, kv_tokens, max_running=8, step_tokens_max=budget)
    jobs, cancels, tokens, ended = [], {}, {}, set()
    for i, (delay, length, shared, output, cancel) in enumerate(traffic):
        prompt = random_tokens(16 * shared, 77) + random_tokens(length, i)
        jobs.append((delay, make_job(f"j{i}", prompt, max_tokens=output)))
        if cancel is not None:
            cancels[f"j{i}"] = delay + cancel
    now = 0
    while len(ended) < len(traffic):
        assert now < 2000
        for _, job in [pair for pair in jobs if pair[0] == now]:
            engine.add(job)
        for id in [id for id, at in cancels.items() if at == now]:
            engine.cancel(id)
        for delta in engine.step().deltas:
            tokens.setdefault(delta.job, []).extend(delta.tokens)
            if delta.finish is not None:
                ended.add(delta.job)
        engine.check_integrity()
        now += 1
    for _, job in jobs:
        calm = finish_all(make_engine(tiny), [job]).tokens[job.id]
        got = tokens.get(job.id, [])
        assert got == (calm[: len(got)] if job.id in cancels else calm)


def test_missing_blocks_counts_earlier_output(tiny: LoadedModel) -> None:
    """A job that moves here with a log asks for the blocks of prompt and log together."""
    job = make_job("a", random_tokens(30, 1), max_tokens=40, logged=random_tokens(20, 2))
    assert len(make_engine(tiny).missing_blocks(job).hashes) == 3
    assert isinstance(job.prompt, array)


def test_logprobs_are_those_of_the_model(tiny: LoadedModel) -> None:
    """One for each token, whatever the temperature; in a batch, resumed, with guesses."""
    prompt = random_tokens(4, 6, 9) * 6
    asking = {"max_tokens": 24, "logprobs": 3}
    calm = finish_all(make_engine(tiny), [make_job("a", prompt, **asking)])
    tokens = calm.tokens["a"]
    with torch.inference_mode():
        logits = logits_of(tiny, prompt + tokens)[len(prompt) - 1 : -1]
    expected = torch.log_softmax(logits.double(), -1)
    got = [item for delta in calm.deltas for item in delta.logprobs]
    assert len(got) == len(tokens)
    for row, token, item in zip(expected, tokens, got, strict=True):
        assert item.logprob == pytest.approx(float(row[token]), abs=1e-4)
        assert [t for t, _ in item.top] == row.topk(3).indices.tolist()
    warm = make_job("a", prompt, temperature=2.0, seed=3, **asking)
    crowd = [make_job(f"o{i}", random_tokens(20, i), temperature=1.0) for i in range(3)]
    alone = finish_all(make_engine(tiny), [warm])
    among = finish_all(make_engine(tiny), [*crowd, warm])
    said = {
        name: [i.logprob for d in out.deltas if d.job == "a" for i in d.logprobs]
        for name, out in (("alone", alone), ("among", among))
    }
    assert said["among"] == pytest.approx(said["alone"], abs=1e-4)
    cut = make_job("a", prompt, logged=tokens[:9], **asking)
    resumed = finish_all(make_engine(tiny), [cut])
    again = [item.logprob for delta in resumed.deltas for item in delta.logprobs]
    assert again == pytest.approx([item.logprob for item in got[9:]], abs=1e-4)


@pytest.mark.parametrize("limits", [{}, {"step_tokens_max": 16, "max_running": 4}])
def test_a_prompt_is_scored(tiny: LoadedModel, limits: dict[str, int]) -> None:
    """Whole or in chunks, cold or cached, with output or without: the model's own logprobs."""
    prompt = random_tokens(50, 8)
    engine = make_engine(tiny, **limits)
    finish_all(engine, [make_job("warm", prompt, max_tokens=2)])
    out = finish_all(
        engine,
        [
            make_job("only", prompt, max_tokens=0, prompt_logprobs=0),
            make_job("more", prompt, max_tokens=3, prompt_logprobs=2),
            make_job("not", prompt, max_tokens=3),
        ],
    )
    with torch.inference_mode():
        expected = torch.log_softmax(logits_of(tiny, prompt).double(), -1)
    wanted = [float(expected[at, token]) for at, token in enumerate(prompt[1:])]
    told = {d.job: d for d in out.deltas if d.prompt_logprobs}
    assert told.keys() == {"only", "more"}
    for delta in told.values():
        assert delta.first == 0
        assert [i.logprob for i in delta.prompt_logprobs] == pytest.approx(wanted, abs=1e-4)
    assert told["only"].tokens == () and told["only"].finish is not None
    assert told["only"].finish.reason is FinishReason.LENGTH
    tops = [[t for t, _ in i.top] for i in told["more"].prompt_logprobs]
    assert tops == [row.topk(2).indices.tolist() for row in expected[:-1]]
    assert out.tokens["more"] == out.tokens["not"] and len(out.tokens["more"]) == 3


def test_a_scored_prompt_survives_preemption(tiny: LoadedModel) -> None:
    """Each position is told once, whatever had to be computed again."""
    prompt = random_tokens(60, 8)
    engine = make_engine(tiny, 112, step_tokens_max=16, max_running=4)
    scored = make_job("s", prompt, max_tokens=4, prompt_logprobs=0, band=Band.BATCH)
    out = finish_all(
        engine,
        [scored],
        after_step=lambda out: (
            engine.add(make_job("vip", random_tokens(80, 3), band=Band.INTERACTIVE))
            if out.steps == 2
            else None
        ),
    )
    assert out.stories["s"].preemptions > 0
    calm = finish_all(make_engine(tiny), [scored])
    told, expected = (
        [i.logprob for d in o.deltas if d.job == "s" for i in d.prompt_logprobs]
        for o in (out, calm)
    )
    assert len(told) == 59 and told == pytest.approx(expected, abs=1e-4)
    assert out.tokens["s"] == calm.tokens["s"]


def test_a_deadline_for_the_first_token_saves_the_prefill(tiny: LoadedModel) -> None:
    """What is late before its first token ends at once, mid-prompt or while it waits."""
    clock = ManualClock()
    limits = {"max_running": 1, "step_tokens_max": 16}
    engine = Engine(tiny, EngineConfig(kv_tokens=512, **limits), clock)
    by = clock.wall_ms() + 100
    engine.add(make_job("slow", random_tokens(100, 1), ttft_by_ms=by))
    engine.add(make_job("waits", random_tokens(100, 2), ttft_by_ms=by))
    engine.step()
    clock.advance(99)
    assert engine.step().deltas == []
    clock.advance(1)
    result = engine.step()
    assert [(d.job, d.tokens, d.finish) for d in result.deltas] == [
        (name, (), Finish(FinishReason.DEADLINE)) for name in ("slow", "waits")
    ]
    assert [story.progress for story in result.stories] == [
        JobProgress("slow", 32, 0, 0),
        JobProgress("waits", 0, 0, 0),
    ]
    assert result.work.busy_ns == 0 and not engine.has_work
    engine.check_integrity()


def test_a_deadline_for_the_whole_ends_a_stream_within_a_step(tiny: LoadedModel) -> None:
    """With the tokens so far; the other deadline counts no more once there is a first token."""
    clock = ManualClock()
    engine = Engine(tiny, EngineConfig(kv_tokens=512), clock)
    wall = clock.wall_ms()
    engine.add(make_job("a", [1, 2, 3], max_tokens=99, ttft_by_ms=wall + 5, done_by_ms=wall + 50))
    engine.add(make_job("b", [1, 2, 4], max_tokens=99, logged=[7], ttft_by_ms=wall + 1))
    told: list[int] = []
    for _ in range(5):
        told += next(d for d in engine.step().deltas if d.job == "a").tokens
        clock.advance(10)
    result = engine.step()
    [end] = [delta for delta in result.deltas if delta.job == "a"]
    assert end.finish == Finish(FinishReason.DEADLINE)
    assert (end.first, end.tokens) == (5, ()) and len(told) == 5
    assert result.stories[0].progress == JobProgress("a", 3, 0, 5)
    assert engine.cancel("b"), "it goes on"


def test_a_step_says_what_it_did(tiny: LoadedModel) -> None:
    """Computed and cached prompt tokens add up to the prompt, whatever preemption repeated."""
    engine = make_engine(tiny, 160, step_tokens_max=32, max_running=4)
    prompt = random_tokens(48, 1)
    finish_all(engine, [make_job("warm", prompt, max_tokens=1)])
    jobs = [
        make_job("bulk", [*prompt, *random_tokens(30, 2)], max_tokens=20, band=Band.BATCH),
        make_job("vip", random_tokens(90, 3), max_tokens=8, band=Band.INTERACTIVE),
    ]
    engine.add(jobs[0])
    moved: dict[str, list[JobProgress]] = {"bulk": [], "vip": []}
    ends: dict[str, JobStory] = {}
    prefilled, told, keys = 0, 0, set[bytes]()
    for number in range(200):
        if number == 4:
            engine.add(jobs[1])
        result = engine.step()
        for progress in result.work.moved:
            moved[progress.job].append(progress)
        ends |= {story.job: story for story in result.stories}
        prefilled += result.work.prefill_tokens
        told += result.work.output_tokens
        keys = (keys - result.work.news.keys()) | {
            k for k, came in result.work.news.items() if came
        }
        if len(ends) == 2:
            break
    assert ends["bulk"].preemptions > 0
    assert ends["bulk"].progress == JobProgress("bulk", 30, 48, 20)
    assert ends["vip"].progress == JobProgress("vip", 90, 0, 8)
    for steps in moved.values():
        assert [p.computed for p in steps] == sorted(p.computed for p in steps)
        assert [p.output for p in steps] == sorted(p.output for p in steps)
    assert told == 28 and prefilled > 30 + 90, "what was computed again was work"
    assert keys <= {block_hash[:BLOCK_KEY_BYTES] for block_hash in engine._pool._by_hash}


def test_offered_blocks_name_their_owner(tiny: LoadedModel) -> None:
    """Band and tenant of the job, for what the cache service keeps for whom."""
    job = make_job("a", random_tokens(40, 1), band=Band.INTERACTIVE, tenant="mill")
    out = finish_all(make_engine(tiny), [job])
    assert {(offer.band, offer.tenant) for offer in out.offers} == {(Band.INTERACTIVE, "mill")}
