"""Shapes of published models, from their configurations, against what their publishers count."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from headrace.errors import ModelError
from headrace.policy.model_shape import Precision
from headrace_worker.describe import read_shape, shape_of
from headrace_worker.loading import LoadedModel, memory
from headrace_worker.loading.hf_config import read_config

CONFIGS = Path(__file__).parent.parent / "support" / "model_configs"

PUBLISHED = {
    "smollm2-135m": 134_515_008,
    "smollm2-360m": 361_821_120,
    "smollm2-1.7b": 1_711_376_384,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "llama-3.1-405b": 405_853_388_800,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-72b": 72_706_203_648,
    "qwen3-0.6b": 596_049_920,
    "qwen3-8b": 8_190_735_360,
    "qwen3-32b": 32_762_123_264,
    "qwen3-30b-a3b": 30_532_122_624,
    "qwen3-235b-a22b": 235_093_634_560,
    "mistral-7b-v0.3": 7_248_023_552,
    "mixtral-8x7b": 46_702_792_704,
    "mixtral-8x22b": 140_620_634_112,
    "gemma-3-1b": 999_885_952,
    "gemma-3-27b": 27_009_346_304,
}
"""Numbers in the checkpoints' safetensors; of Gemma 3 27B those of its language model."""


def test_every_config_has_its_count() -> None:
    assert {path.stem for path in CONFIGS.glob("*.json")} == PUBLISHED.keys()


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_those_that_were_published(name: str) -> None:
    assert read_shape(str(CONFIGS / f"{name}.json")).parameters == PUBLISHED[name]


@pytest.mark.parametrize(
    ("name", "billions"),
    [("mixtral-8x7b", 12.9), ("qwen3-30b-a3b", 3.3), ("qwen3-235b-a22b", 22.2)],
)
def test_a_token_meets_as_many_parameters_as_was_published(name: str, billions: float) -> None:
    """Published counts have the embedding, too, of which a token reads one row."""
    shape = read_shape(str(CONFIGS / f"{name}.json"))
    assert (shape.active_parameters + shape.embedding_values) / 1e9 == pytest.approx(
        billions, rel=0.02
    )


@pytest.mark.parametrize("name", ["llama-3.1-8b", "qwen3-30b-a3b", "mixtral-8x7b", "gemma-3-1b"])
@pytest.mark.parametrize("quantization", ["none", "int8", "int4"])
@pytest.mark.usefixtures("torch_alone")
def test_weights_weigh_what_a_worker_allows_for(name: str, quantization: str) -> None:
    """The planner and the check before a load agree on one device, to a thousandth."""
    facts = json.loads((CONFIGS / f"{name}.json").read_text())
    config = read_config(facts).model
    shape, how = shape_of(config), Precision("bfloat16", quantization)
    layers = sum(shape.layer_bytes(i, 1, how) for i in range(shape.layers))
    weights = layers + shape.embedding_bytes(1, how) + shape.head_bytes(1, how)
    assert weights == pytest.approx(memory.weight_bytes(config, "bfloat16", quantization), rel=1e-3)


def test_a_gguf_file_has_the_shape_of_its_model(smollm2: LoadedModel, smollm2_path: Path) -> None:
    assert read_shape(str(smollm2_path)) == shape_of(smollm2.config)
    assert read_shape(str(smollm2_path)).parameters == PUBLISHED["smollm2-135m"]


def test_a_folder_needs_no_weights(tmp_path: Path) -> None:
    source = CONFIGS / "llama-3.1-8b.json"
    (tmp_path / "config.json").write_text(source.read_text())
    assert read_shape(str(tmp_path)) == read_shape(str(source))


@pytest.mark.parametrize("text", ["", "[]", "{", '{"model_type": "mamba"}'])
def test_what_describes_no_model_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ModelError):
        read_shape(str(tmp_path))
