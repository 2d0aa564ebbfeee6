"""Workers of several ranks: what they answer is what one process answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from headrace.types import Job
from headrace_worker.loading import LoadedModel
from headrace_worker.parallel.shape import Shape
from worker.builders import finish_all, make_engine, make_job, random_tokens
from worker.ranked import settings_for, spawned, threaded


def jobs_of_all_kinds() -> list[Job]:
    """Long and short prompts, some shared, greedy and drawn."""
    shared = random_tokens(40, 1)
    return [
        make_job("long", random_tokens(150, 2), max_tokens=12),
        make_job("first", [*shared, 5], max_tokens=20),
        make_job("second", [*shared, 9, 9], max_tokens=20),
        make_job("drawn", random_tokens(9, 3), max_tokens=16, temperature=0.8, seed=5),
        make_job("top", random_tokens(9, 4), max_tokens=16, temperature=1.0, top_p=0.8, seed=6),
        make_job("few", random_tokens(7, 5), max_tokens=16, temperature=1.0, top_k=5, seed=7),
    ]


LIMITS: dict[str, Any] = {"step_tokens_max": 64, "max_running": 8}


def test_processes_that_share_a_model_answer_as_one(tiny: LoadedModel, tiny_folder: Path) -> None:
    """Two tensor ranks in each of two stages, each a process of its own."""
    expected = finish_all(make_engine(tiny, **LIMITS), jobs_of_all_kinds())
    with spawned(settings_for(tiny_folder, Shape(2, 2)), **LIMITS) as (engine, _):
        got = finish_all(engine, jobs_of_all_kinds())
    assert got.tokens == expected.tokens


@pytest.mark.parametrize("shape", [Shape(2, 1), Shape(4, 1), Shape(1, 2), Shape(1, 3)], ids=str)
def test_every_shape_answers_as_one_process(
    tiny: LoadedModel, tiny_folder: Path, shape: Shape
) -> None:
    expected = finish_all(make_engine(tiny, **LIMITS), jobs_of_all_kinds())
    with threaded(settings_for(tiny_folder, shape), **LIMITS) as engine:
        got = finish_all(engine, jobs_of_all_kinds())
    assert got.tokens == expected.tokens
