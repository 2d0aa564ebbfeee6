"""Which rank holds what: everything once, in order, or a refusal that shows the arithmetic."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.errors import ModelError
from headrace_worker.model.config import Experts, ModelConfig
from headrace_worker.model.rope import plain
from headrace_worker.parallel.shape import Part, Shape, part_of, refuse, run_of

CONFIG = ModelConfig(
    architecture="llama",
    vocab_size=49_152,
    hidden_size=576,
    intermediate_size=1536,
    layers=30,
    heads=9,
    kv_heads=3,
    head_dim=64,
    norm_eps=1e-5,
    context_tokens=8192,
    tied=True,
    ropes=(plain(64, 10_000.0),),
)


def config(**changes: Any) -> ModelConfig:
    return replace(CONFIG, **changes)


def stage_of(made: ModelConfig, shape: Shape, stage: int = 0) -> list[Part]:
    return [part_of(made, shape, rank) for rank in shape.stage_ranks(stage)]


def joined(runs: list[range]) -> list[int]:
    return [number for run in runs for number in run]


@settings(deadline=None, max_examples=60)
@given(
    heads=st.sampled_from([(9, 3), (8, 8), (32, 4), (64, 8), (16, 1), (12, 2)]),
    inner=st.integers(8, 4096),
    vocab=st.integers(8, 200_000),
    layers=st.integers(1, 40),
    experts=st.sampled_from([0, 8, 60, 128]),
    tensor=st.integers(1, 8),
    pipeline=st.integers(1, 6),
)
def test_all_parts_together_are_the_model(
    heads: tuple[int, int],
    inner: int,
    vocab: int,
    layers: int,
    experts: int,
    tensor: int,
    pipeline: int,
) -> None:
    """Every layer, column, token and expert is somebody's once; heads never lose their KV head."""
    made = config(
        heads=heads[0],
        kv_heads=heads[1],
        intermediate_size=inner,
        vocab_size=vocab,
        layers=layers,
        windows=tuple(range(layers)),
        layer_ropes=(0,) * layers,
        experts=Experts(tuple(range(0, layers, 2)), experts, 2, 32, True) if experts else None,
    )
    shape = Shape(tensor, pipeline)
    try:
        refuse(made, shape)
    except ModelError:
        return
    by_stage = [stage_of(made, shape, stage) for stage in range(pipeline)]
    assert joined([parts[0].layers for parts in by_stage]) == list(range(layers))
    assert joined([list(parts[0].config.windows) for parts in by_stage]) == list(range(layers))
    for parts in by_stage:
        assert joined([part.heads for part in parts]) == list(range(made.heads))
        assert joined([part.inner for part in parts]) == list(range(inner))
        assert joined([part.vocab for part in parts]) == list(range(vocab))
        assert joined([part.kv_heads for part in parts if part.owns_kv]) == list(range(heads[1]))
        for part in parts:
            uses = {head * made.kv_heads // made.heads for head in part.heads}
            assert uses == set(part.kv_heads)
            assert part.config.heads % part.config.kv_heads == 0
            assert max(map(len, (part.heads, part.inner, part.vocab))) > 0
        if experts and tensor > 1:
            assert joined([part.experts or range(0) for part in parts]) == list(range(experts))
    if made.experts is not None:
        firsts = [(parts[0].layers.start, parts[0].config.experts) for parts in by_stage]
        mixed = [i + start for start, e in firsts if e is not None for i in e.layers]
        assert mixed == list(made.experts.layers)


def test_shares_differ_by_little() -> None:
    """SmolLM2 on two ranks: 3 KV heads as 2 and 1, columns and tokens in equal halves."""
    first, second = stage_of(CONFIG, Shape(2))
    assert (first.config.heads, second.config.heads) == (6, 3)
    assert (first.config.intermediate_size, second.config.intermediate_size) == (768, 768)
    assert first.vocab == range(24_576)
    assert [len(run_of(8960, 8, i, 64)) for i in range(8)] == [1152] * 4 + [1088] * 4


def test_kv_heads_are_repeated_where_ranks_are_more() -> None:
    made = config(heads=32, kv_heads=4)
    parts = stage_of(made, Shape(8))
    assert [part.kv_heads.start for part in parts] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert [part.owns_kv for part in parts] == [True, False] * 4
    assert [len(part.heads) for part in parts] == [4] * 8


@pytest.mark.parametrize(
    ("changes", "shape", "words"),
    [
        ({}, (4, 1), "9 heads that use 3 KV heads, 3 each; as many as can: 1, 2, 3, 9"),
        ({"heads": 32, "kv_heads": 8}, (12, 1), "12 tensor ranks cannot share 32 heads"),
        ({}, (1, 31), "31 stages need a layer each, the model has 30"),
        ({"intermediate_size": 2}, (3, 1), "MLPs of 2 columns"),
        ({"vocab_size": 2}, (3, 1), "vocabulary of 2 tokens"),
        ({"experts": Experts((0,), 2, 1, 32, True)}, (3, 1), "the model has 2 experts"),
    ],
)
def test_refusals_show_the_arithmetic(
    changes: dict[str, Any], shape: tuple[int, int], words: str
) -> None:
    with pytest.raises(ModelError, match=words):
        part_of(config(**changes), Shape(*shape), 0)


@pytest.mark.parametrize("shape", [(0, 1), (1, 0), (65, 1), (9, 9)])
def test_shapes_have_limits(shape: tuple[int, int]) -> None:
    with pytest.raises(ModelError, match="ranks"):
        Shape(*shape)


def test_middle_stages_hold_no_vocabulary() -> None:
    parts = [part_of(CONFIG, Shape(1, 3), rank) for rank in range(3)]
    assert [part.config.vocab_size for part in parts] == [49_152, 0, 49_152]
    assert [part.first for part in parts] == [True, False, False]
    assert [part.last for part in parts] == [False, False, True]
