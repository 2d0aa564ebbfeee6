"""Workers of several ranks: what they answer is what one process answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from headrace.grammars import Grammars
from headrace.types import FinishReason, Job
from headrace_worker import native
from headrace_worker.kv.pool import KvPool
from headrace_worker.loading import LoadedModel, load_model
from headrace_worker.parallel import links
from headrace_worker.parallel import ranks as ranks_module
from headrace_worker.parallel.shape import Shape
from headrace_worker.quantization import Quantization
from worker.builders import (
    Output,
    finish_all,
    make_engine,
    make_job,
    random_tokens,
    write_hf_folder,
)
from worker.ranked import settings_for, spawned, threaded
from worker.test_architectures import VOCAB, config_of, gemma3_text, qwen2, qwen3_moe, write_model
from worker.test_structured import held, run

SHAPES = [Shape(2, 1), Shape(1, 2), Shape(2, 2)]
LIMITS: dict[str, Any] = {"step_tokens_max": 64, "max_running": 8}


def names(shape: Shape) -> str:
    return f"tp{shape.tensor}pp{shape.pipeline}"


def jobs_of_all_kinds() -> list[Job]:
    """Long and short prompts, some shared, greedy and drawn, one that is scored."""
    shared = random_tokens(40, 1)
    drawn = {"temperature": 1.0, "max_tokens": 16}
    return [
        make_job("long", random_tokens(150, 2), max_tokens=12),
        make_job("first", [*shared, 5], max_tokens=20),
        make_job("second", [*shared, 9, 9], max_tokens=20),
        make_job("drawn", random_tokens(9, 3), seed=5, **drawn),
        make_job("top", random_tokens(9, 4), top_p=0.8, seed=6, **drawn),
        make_job("few", random_tokens(7, 5), top_k=5, seed=7, **drawn),
        make_job("told", random_tokens(30, 6), logprobs=2, prompt_logprobs=1, **drawn),
    ]


def assert_same(got: Output, expected: Output) -> None:
    """Tokens, ends, and log probabilities to what rounding leaves."""
    assert got.tokens == expected.tokens
    assert got.finishes == expected.finishes
    for job in expected.tokens:
        for kind in ("logprobs", "prompt_logprobs"):
            mine, theirs = (
                [t.logprob for d in out.deltas if d.job == job for t in getattr(d, kind)]
                for out in (got, expected)
            )
            np.testing.assert_allclose(mine, theirs, atol=1e-4)


def test_processes_that_share_a_model_answer_as_one(tiny: LoadedModel, tiny_folder: Path) -> None:
    """Two tensor ranks in each of two stages, each a process of its own."""
    expected = finish_all(make_engine(tiny, **LIMITS), jobs_of_all_kinds())
    with spawned(settings_for(tiny_folder, Shape(2, 2)), **LIMITS) as (engine, ranks):
        assert len(ranks.pids) == 3
        assert_same(finish_all(engine, jobs_of_all_kinds()), expected)


@pytest.mark.parametrize("shape", [*SHAPES, Shape(4, 1), Shape(1, 3)], ids=names)
def test_every_shape_answers_as_one_process(
    tiny: LoadedModel, tiny_folder: Path, shape: Shape
) -> None:
    """Also where blocks are found again, and where jobs were pushed out of a small pool."""
    expected = finish_all(make_engine(tiny, **LIMITS), jobs_of_all_kinds())
    with threaded(settings_for(tiny_folder, shape), **LIMITS) as engine:
        assert_same(finish_all(engine, jobs_of_all_kinds()), expected)
        again = finish_all(engine, jobs_of_all_kinds())
    assert again.tokens == expected.tokens
    assert again.cached["long"] == 144 and again.cached["told"] == 0
    with threaded(settings_for(tiny_folder, shape), kv_tokens=240, **LIMITS) as engine:
        squeezed = finish_all(engine, jobs_of_all_kinds())
    assert squeezed.tokens == expected.tokens
    assert sum(story.preemptions for story in squeezed.stories.values()) > 0


@pytest.mark.parametrize("family", ["qwen2", "qwen3_moe", "gemma3_text"])
def test_every_kind_of_layer_finds_its_stage(family: str, tmp_path: Path) -> None:
    """Windows, rotary tables and experts by layer, biases, a tied head on the last stage."""
    config = {"qwen2": qwen2, "qwen3_moe": qwen3_moe, "gemma3_text": gemma3_text}[family]
    write_model(tmp_path, config())
    jobs = [
        make_job("long", random_tokens(150, 2, VOCAB), max_tokens=12),
        make_job("short", random_tokens(9, 3, VOCAB), max_tokens=24),
        make_job("told", random_tokens(70, 4, VOCAB), max_tokens=8, logprobs=0, prompt_logprobs=0),
    ]
    whole = load_model(tmp_path, "test", "float32")
    expected = finish_all(make_engine(whole, **LIMITS), jobs)
    for shape in (Shape(1, 3), Shape(2, 2)):
        with threaded(settings_for(tmp_path, shape), **LIMITS) as engine:
            assert_same(finish_all(engine, jobs), expected)


@pytest.mark.parametrize("mode", ["int8", "int4"])
@pytest.mark.parametrize("shape", [Shape(2, 2), Shape(1, 3)], ids=names)
def test_quantized_ranks_answer_as_one_quantized_process(
    tmp_path: Path, shape: Shape, mode: Quantization
) -> None:
    """Ranks cut no group of columns apart, so each number is rounded as in one process."""
    write_hf_folder(tmp_path, hidden_size=128, intermediate_size=256, head_dim=32)
    whole = load_model(tmp_path, "test", "float32", mode)
    jobs = [make_job(f"j{i}", random_tokens(20 + i, i), max_tokens=12) for i in range(4)]
    expected = finish_all(make_engine(whole, **LIMITS), jobs)
    settings = settings_for(tmp_path, shape, quantization=mode)
    with threaded(settings, **LIMITS) as engine:
        assert finish_all(engine, jobs).tokens == expected.tokens


def logprobs_of(output: Output) -> dict[str, list[list[float]]]:
    """Of every job all log probabilities, those of the prompt's tokens first."""
    return {
        job: [
            [
                told.logprob
                for delta in output.deltas
                if delta.job == job
                for told in getattr(delta, kind)
            ]
            for kind in ("prompt_logprobs", "logprobs")
        ]
        for job in output.tokens
    }


BITS = [
    *[(f, m, "float32") for f in ("llama", "qwen2", "mixtral") for m in ("none", "int8", "int4")],
    *[(f, "int8", "bfloat16") for f in ("llama", "mixtral", "gemma3_text")],
]


@pytest.mark.parametrize(("family", "mode", "dtype"), BITS, ids=str)
def test_up_to_four_ranks_come_to_one_process_s_bits(
    family: str, mode: Quantization, dtype: str, tmp_path: Path
) -> None:
    """Columns are summed in the same order by however many: not one log probability differs."""
    if native.library() is None:
        pytest.skip(f"no native kernels: {native.state()}")
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_key_value_heads": 4}
    heads = {"num_attention_heads": 8, "head_dim": 16}
    experts = {"num_local_experts": 4} if family == "mixtral" else {}
    write_model(tmp_path, config_of(family, **sizes, **heads, **experts))
    told = {"logprobs": 0, "prompt_logprobs": 0, "max_tokens": 8}
    jobs = [make_job(f"j{i}", random_tokens(20 + i, i, VOCAB), **told) for i in range(4)]
    expected = finish_all(make_engine(load_model(tmp_path, "test", dtype, mode), **LIMITS), jobs)
    assert len(logprobs_of(expected)["j0"][0]) >= 19 and len(logprobs_of(expected)["j0"][1]) == 8
    for shape in (Shape(2, 1), Shape(4, 1), Shape(2, 2)):
        settings = settings_for(tmp_path, shape, quantization=mode, dtype=dtype)
        with threaded(settings, **LIMITS) as engine:
            found = finish_all(engine, jobs)
        assert found.tokens == expected.tokens
        assert logprobs_of(found) == logprobs_of(expected)


@pytest.mark.parametrize("shape", SHAPES, ids=names)
def test_guesses_and_grammars_work_over_ranks(
    tiny: LoadedModel, tiny_folder: Path, shape: Shape
) -> None:
    """What is guessed and what is forced changes no text; both happen."""
    compiler = Grammars(tiny.record)
    loop = make_job("loop", [7, 8, 9] * 8, max_tokens=60)
    plain = finish_all(make_engine(tiny, speculation=False), [loop])
    texts = run(make_engine(tiny), compiler, [held("h", seed=3)])
    with threaded(settings_for(tiny_folder, shape), **LIMITS) as engine:
        guessed = finish_all(engine, [loop])
        held_text = run(engine, compiler, [held("h", seed=3)])
    assert guessed.tokens == plain.tokens
    assert guessed.stories["loop"].guessed > 0
    assert held_text.tokens == texts.tokens
    assert held_text.stories["h"].forced > 0


@pytest.mark.parametrize("shape", SHAPES, ids=names)
def test_blocks_pass_between_any_two_splits(
    tiny: LoadedModel, tiny_folder: Path, shape: Shape
) -> None:
    """What a split worker offers one process takes, the other way round, and int8 KV too."""
    prompt = random_tokens(100, 8)
    for kv_dtype in ("auto", "int8"):
        single = make_engine(tiny, kv_dtype=kv_dtype)
        first = finish_all(single, [make_job("a", prompt, max_tokens=4)])
        settings = settings_for(tiny_folder, shape, kv_dtype=kv_dtype)
        with threaded(settings, **LIMITS) as engine:
            assert engine.layout == single.layout and engine.block_bytes == single.block_bytes
            engine.add(make_job("b", prompt, max_tokens=4), first.blocks.values())
            taken = finish_all(engine)
            assert taken.cached["b"] == 96
        with threaded(settings, **LIMITS) as engine:
            made = finish_all(engine, [make_job("c", prompt, max_tokens=4)])
        other = make_engine(tiny, kv_dtype=kv_dtype)
        other.add(make_job("d", prompt, max_tokens=4), made.blocks.values())
        back = finish_all(other)
        assert back.cached["d"] == 96
        assert taken.tokens["b"] == made.tokens["c"] == back.tokens["d"] == first.tokens["a"]


def test_stages_are_kept_busy(tiny: LoadedModel, tiny_folder: Path) -> None:
    """Streams are dealt to as many plans as there are stages; a prompt's chunks follow closely."""
    with threaded(settings_for(tiny_folder, Shape(1, 3)), **LIMITS) as engine:
        streams = [make_job(f"s{i}", random_tokens(8, i), max_tokens=40) for i in range(6)]
        under_way: list[int] = []
        sizes: list[int] = []

        def look(out: Output) -> None:
            under_way.append(len(engine._flights))
            sizes.extend(len(f.plan.items) for f in engine._flights._flights)

        many = finish_all(engine, streams, after_step=look)
        assert under_way.count(2) > len(under_way) * 0.8, "two more while one is taken in"
        assert sorted(sizes)[len(sizes) // 2] == 2, "six streams over three plans"
        under_way.clear()
        finish_all(engine, [make_job("p", random_tokens(480, 9), max_tokens=1)], after_step=look)
        assert max(under_way) == 2, "chunks of one prompt are under way one behind the other"
    expected = finish_all(make_engine(tiny), streams)
    assert many.tokens == expected.tokens


def test_small_rings_hold_nobody_up_for_good(
    tiny: LoadedModel, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole rows of logits and activations that are larger than the ways that they come by."""
    jobs = [
        make_job(f"t{i}", random_tokens(90 + i, i), max_tokens=6, prompt_logprobs=1, logprobs=1)
        for i in range(5)
    ]
    expected = finish_all(make_engine(tiny, **LIMITS), jobs)
    for name in ("ANSWER_RING_BYTES", "ACTIVATION_RING_BYTES", "COMMAND_RING_BYTES"):
        monkeypatch.setattr(links, name, 4096)
    monkeypatch.setattr(ranks_module, "ANSWER_RING_BYTES", 4096)
    with threaded(settings_for(tiny_folder, Shape(1, 3)), **LIMITS) as engine:
        assert_same(finish_all(engine, jobs), expected)


def test_a_cancel_waits_for_what_is_under_way(tiny: LoadedModel, tiny_folder: Path) -> None:
    """Blocks that a later stage writes to are not free before it has; then they are, at once."""
    with threaded(settings_for(tiny_folder, Shape(1, 2)), **LIMITS) as engine:
        engine.add(make_job("a", random_tokens(400, 1), max_tokens=5))
        engine.add(make_job("b", random_tokens(20, 2), max_tokens=30))
        for _ in range(3):
            engine.step()
        assert "a" in engine._flights.under_way()
        assert engine.cancel("a") and engine.cancel("a")
        [sequence] = [s for s in engine._scheduler.running if s.id == "a"]
        assert sequence.blocks, "it keeps its blocks"
        out = finish_all(engine)
        assert out.finishes["a"].reason is FinishReason.CANCELLED
        assert len(out.tokens["b"]) <= 30
        assert engine.counts() == (0, 0, 8192)
        engine.add(make_job("c", random_tokens(400, 1), max_tokens=5))
        engine.step()
        engine.abort_all()
        assert not engine.has_work and engine.counts()[0] == 0
        engine.check_integrity()
        rest = finish_all(engine, [make_job("d", random_tokens(20, 2), max_tokens=30)])
    expected = finish_all(make_engine(tiny), [make_job("d", random_tokens(20, 2), max_tokens=30)])
    assert rest.tokens == expected.tokens


def test_numbers_that_are_not_finite_cost_one_job_on_every_rank(
    tiny: LoadedModel, tiny_folder: Path
) -> None:
    """Its blocks are zeroed wherever they lie, and nobody else reads them."""
    good = make_job("good", random_tokens(30, 1), max_tokens=8)
    expected = finish_all(make_engine(tiny), [good])
    with threaded(settings_for(tiny_folder, Shape(2, 2)), **LIMITS) as engine:
        engine.add(make_job("bad", random_tokens(40, 2), max_tokens=8))
        engine.add(good)
        while not any(s.output_tokens for s in engine._scheduler.running if s.id == "bad"):
            engine.step()
        pools: list[KvPool] = engine._kv._pools  # type: ignore[attr-defined]
        bad = next(s for s in engine._scheduler.running if s.id == "bad")
        for pool in pools[2:]:
            pool.tensor[bad.blocks[0]] = float("nan")
        out = finish_all(engine)
        assert out.finishes["bad"].reason is FinishReason.ERROR
        assert "not a finite number" in out.finishes["bad"].error
        assert out.finishes["good"].reason is FinishReason.LENGTH
        for pool in pools:
            assert bool(pool.tensor.isfinite().all())
        again = finish_all(engine, [make_job("e", random_tokens(30, 1), max_tokens=8)])
    assert again.tokens["e"] == expected.tokens["good"]


def test_a_model_that_cannot_be_split_is_refused(tmp_path: Path) -> None:
    """Before anything is read, with the arithmetic, by every rank alike."""
    from headrace.errors import ModelError
    from headrace_worker.parallel.stages import parts_of

    write_hf_folder(tmp_path)
    config = load_model(tmp_path, "test", "float32").config
    with pytest.raises(ModelError, match="4 stages need a layer each, the model has 3 layers"):
        parts_of(config, Shape(1, 4))
    with pytest.raises(ModelError, match="3 tensor ranks cannot share 4 heads"):
        parts_of(config, Shape(3, 1))
