"""The roofline: what a step has to do is counted right, and what is measured is told as it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from headrace.errors import SettingsError
from headrace.policy.model_shape import ModelShape
from headrace_worker import roofline
from headrace_worker.describe import shape_of
from headrace_worker.loading import LoadedModel, load_model
from headrace_worker.policy.roofs import Kept, Phase, ceiling, work_of
from headrace_worker.settings import WorkerSettings

KEPT = Kept(layers_bytes=1_000, head_bytes=200, kv_layer_bytes=8.0)


def shape(**changes: Any) -> ModelShape:
    """Two layers of four heads on two, 8 wide each."""
    fields: dict[str, Any] = {
        "architecture": "llama",
        "vocab_size": 100,
        "hidden_size": 32,
        "intermediate_size": 64,
        "layers": 2,
        "heads": 4,
        "kv_heads": 2,
        "head_dim": 8,
        "context_tokens": 512,
        "tied": True,
    }
    return ModelShape(**{**fields, **changes})


def test_a_decode_step_reads_weights_once_and_each_row_its_past() -> None:
    """3 rows after 10 tokens: 11 keys each, their own included; weights once for all of them."""
    work = work_of(shape(), KEPT, Phase("d", rows=3, held=10))
    assert work.weight_bytes == 1_200
    assert work.kv_bytes == 2 * 3 * 11 * 8
    matrices = 32 * 32 + 2 * 16 * 32 + 32 * 32 + 3 * 32 * 64 + 2 * 32
    attention = 4 * 4 * 8 * (2 * 3 * 11)
    assert work.flops == 2 * 3 * 2 * matrices + 2 * 3 * 100 * 32 + attention


@given(st.integers(1, 40), st.sampled_from([0, 1, 7, 16, 64]))
def test_a_prompt_attends_to_what_is_before_it(chunk: int, window: int) -> None:
    """Counted query by query; of the head, only the last row's product is needed."""
    made = shape(windows=(window, 0) if window else ())
    work = work_of(made, KEPT, Phase("p", chunk=chunk))
    pairs = sum(
        min(query + 1, seen or chunk) for seen in (window, 0) for query in range(chunk)
    )  # fmt: skip
    active = sum(made.layer_active(layer) for layer in range(2))
    assert work.flops == 2 * chunk * active + 2 * 100 * 32 + 4 * 4 * 8 * pairs
    assert work.kv_bytes == 2 * chunk * 8


def test_few_tokens_reach_few_experts() -> None:
    """One token reads two of eight experts, many read nearly all of them."""
    made = shape(
        expert_layers=(0, 1), experts=8, experts_per_token=2, expert_size=64, intermediate_size=0
    )
    one, many = (work_of(made, KEPT, Phase("d", rows=n, held=1)) for n in (1, 64))
    assert 200 + 1_000 / 4 < one.weight_bytes < 200 + 1_000 / 2
    assert 1_190 < many.weight_bytes <= 1_200


def test_the_ceiling_is_the_dearer_of_reading_and_multiplying() -> None:
    """One row waits for memory; with enough of them the arithmetic decides."""
    alone = work_of(shape(), KEPT, Phase("d", rows=1, held=10))
    bound = ceiling(alone, 1, bandwidth=1e3, flops_per_s=1e9)
    assert bound.by == "memory bandwidth"
    assert bound.tokens_per_s == pytest.approx(1e3 / alone.size_bytes)
    crowd = work_of(shape(), KEPT, Phase("d", rows=500, held=10))
    bound = ceiling(crowd, 500, bandwidth=1e9, flops_per_s=1e6)
    assert bound.by == "arithmetic"
    assert bound.tokens_per_s == pytest.approx(500 * 1e6 / crowd.flops)


@pytest.mark.parametrize("quantization", ["none", "int8", "int4"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_step_reads_the_matrices_as_they_are_kept(
    tiny_folder: Path, dtype: str, quantization: str
) -> None:
    """Norms and all linear layers with the head; of the embedding, rows only."""
    loaded = load_model(tiny_folder, "test", dtype, quantization)
    found = roofline.kept(loaded, "auto")
    head: Any = loaded.model.head
    assert found.head_bytes == head.weight_bytes
    linears, norms = 0, 0
    for layer in loaded.model.layers:
        mine: Any = layer
        linears += mine.attention.qkv.weight_bytes + mine.attention.out.weight_bytes
        linears += mine.mlp.gate_up.weight_bytes + mine.mlp.down.weight_bytes
        norms += 2 * loaded.config.hidden_size * loaded.dtype.itemsize
    norms += loaded.config.hidden_size * loaded.dtype.itemsize
    assert found.layers_bytes == linears + norms
    item = loaded.dtype.itemsize
    assert found.kv_layer_bytes == 2 * loaded.config.kv_heads * loaded.config.head_dim * item


def test_what_is_measured_is_what_would_serve(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A real engine on a small model, every phase; the report and its JSON say the same."""
    monkeypatch.setattr(roofline, "LARGE_MATRIX", 64)
    monkeypatch.setattr(roofline, "CACHES", 0)
    monkeypatch.setattr(roofline, "BUFFER_BYTES_MIN", 1 << 20)
    settings = WorkerSettings(
        model=str(tiny_folder), quantization="int8", kv_tokens=16_384, threads=1
    )
    found = roofline.measure(settings, limit_s=0.2)
    assert [row.phase.tokens for row in found.rows][1:] == [1, 8, 32]
    assert found.rows[0].phase.chunk == found.rows[0].phase.tokens > 1
    for row in found.rows:
        assert row.tokens_per_s > 0
        assert row.fraction == pytest.approx(row.tokens_per_s / row.ceiling.tokens_per_s)
        assert row.phase.name in found.text()
    assert found.multiplied_in == "int8" and {"int8", "int4"} < set(found.products)
    facts = json.loads(json.dumps(found.facts()))
    assert facts["rows"][1]["ceiling"]["by"] in ("memory bandwidth", "arithmetic")
    assert facts["bandwidth"] == found.bandwidth > 0


def test_a_pool_that_is_too_small_is_refused(tiny_folder: Path) -> None:
    with pytest.raises(SettingsError, match="too small"):
        roofline.measure(
            WorkerSettings(model=str(tiny_folder), kv_tokens=64, step_tokens=64, threads=1), 0.1
        )


def test_reading_reads_all_of_the_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    """A byte at its very end that should not be there is found."""
    filled = torch.full

    def spoiled(*args: Any, **kwargs: Any) -> torch.Tensor:
        made = filled(*args, **kwargs)
        made[-1] = 2
        return made

    assert roofline.read_rate(2, 1 << 16, 0.0) > 0
    monkeypatch.setattr(torch, "full", spoiled)
    with pytest.raises(AssertionError, match="another byte"):
        roofline.read_rate(2, 1 << 16, 0.0)


def test_products_are_measured_in_every_format_of_this_machine(tiny: LoadedModel) -> None:
    found = roofline.product_rates(shape_of(tiny.config), rows=4, limit_s=0.0)
    assert all(rate > 0 for rate in found.values())
    assert {"float32, torch", "bfloat16, torch", "int8", "int4"} <= set(found)
    assert set(roofline.formats_of(tiny)) & set(found)
