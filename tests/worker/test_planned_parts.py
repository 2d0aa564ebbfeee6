"""What the planner says a device holds is what a rank really holds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from headrace.errors import ModelError
from headrace.policy.splits import tensor_refusal
from headrace.policy.topology import stage_layers
from headrace_worker.describe import read_shape, shape_of
from headrace_worker.loading.hf_config import read_config
from headrace_worker.parallel.shape import Shape, part_of, refuse
from headrace_worker.parallel.stages import split

CONFIGS = Path(__file__).parent.parent / "support" / "model_configs"


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.json")), ids=lambda path: path.stem)
def test_the_fullest_rank_holds_what_the_planner_counts(path: Path) -> None:
    """For every published shape and 1 to 16 tensor ranks: the same refusals, the same runs."""
    config = read_config(json.loads(path.read_text())).model
    shape = read_shape(str(path))
    assert shape == shape_of(config)
    for tensor in range(1, 17):
        ranks = Shape(tensor, 1)
        if tensor_refusal(shape, tensor) is not None:
            with pytest.raises(ModelError, match=r"cannot share|need an expert"):
                refuse(config, ranks)
            continue
        parts = [part_of(config, ranks, rank) for rank in range(tensor)]
        assert max(len(part.kv_heads) for part in parts) == shape.kv_heads_on(tensor)
        assert max(len(part.heads) for part in parts) == shape.heads_on(tensor)
        assert max(len(part.inner) for part in parts) == shape.columns_on(tensor)
        assert max(len(part.vocab) for part in parts) == shape.vocab_on(tensor)
        if shape.experts and tensor > 1:
            assert max(len(part.experts) for part in parts) == shape.experts_on(tensor)
    for stages in (1, 2, 3, 4, 8):
        assert stage_layers(shape, stages) == split(config, stages)
