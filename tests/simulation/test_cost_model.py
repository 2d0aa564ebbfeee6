"""Cost models: what a step takes, and files of them."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.errors import SettingsError
from headrace.policy.cost_model import CostModel, attended
from headrace_sim.presets import PRESETS, cost_model
from simulation.builders import SMALL


def test_a_step_takes_the_sum_of_its_parts() -> None:
    assert SMALL.step_duration_ms(0, 0, 0, 0) == 5
    assert SMALL.step_duration_ms(100, 2, 4_000, 2_000_000) == 5 + 25 + 1 + 0.5 + 1


@given(st.integers(0, 10_000), st.lists(st.integers(1, 500), max_size=8))
def test_chunks_attend_to_as_much_as_the_whole(start: int, chunks: list[int]) -> None:
    done, pairs = start, 0.0
    for chunk in chunks:
        pairs += attended(done, chunk)
        done += chunk
    assert pairs == attended(start, sum(chunks)) == sum(range(start + 1, done + 1))


@pytest.mark.parametrize("model", PRESETS.values(), ids=PRESETS)
def test_a_model_survives_its_file(model: CostModel, tmp_path: Path) -> None:
    path = tmp_path / "model.json"
    path.write_text(model.to_json())
    assert cost_model(str(path)) == model


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"step_ms": -1}, "step_ms has to be 0 or more"),
        ({"step_ms": "1"}, "step_ms has to be a number"),
        ({"decode_row_ms": float("nan")}, "decode_row_ms"),
        ({"kv_tokens": 0}, "kv_tokens"),
        ({"kv_tokens": 1.5}, "kv_tokens"),
        ({"max_jobs": True}, "max_jobs"),
        ({"max_jobs": 300}, "step_tokens has to give"),
        ({"name": ""}, "name"),
        ({"colour": 1}, "colour is not one"),
        ({"step_ms": 0, "decode_row_ms": 0}, "steps take time"),
    ],
)
def test_a_bad_field_is_named(change: dict[str, object], told: str) -> None:
    with pytest.raises(SettingsError, match=told):
        CostModel.from_json(json.dumps({**asdict(SMALL), **change}))


@pytest.mark.parametrize("text", ["", "[]", "{}", "[" * 100_000, '{"step_ms": 1}'])
def test_what_is_no_model_is_refused(text: str) -> None:
    with pytest.raises(SettingsError, match="cost model"):
        CostModel.from_json(text)


def test_a_name_that_is_neither_preset_nor_file_is_told() -> None:
    with pytest.raises(SettingsError, match=r"cpu-small, gpu-8b"):
        cost_model("gpu-9b")
