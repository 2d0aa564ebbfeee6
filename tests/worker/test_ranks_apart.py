"""Ranks that reach each other and not each other's KV: on several hosts, and on GPUs.

No GPU is asked for here. What runs is the code that GPUs run: processes that this one starts as
torchrun would, over torch.distributed, and pools of pages on each rank, read by flash-attn's
reference functions. That NCCL carries the sums is what only GPUs can show.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from headrace.errors import ModelError, SettingsError
from headrace.types import Job
from headrace_worker import native, startup
from headrace_worker.attention import choice
from headrace_worker.device import CPU, rank_device
from headrace_worker.loading import LoadedModel, load_model
from headrace_worker.parallel import rank
from headrace_worker.parallel.commands import Loaded, Open, pack_open, unpack_open
from headrace_worker.parallel.shape import Shape
from headrace_worker.settings import WorkerSettings
from worker import flash_reference
from worker.builders import finish_all, make_engine, make_job, random_tokens
from worker.ranked import as_env, settings_for, threaded
from worker.test_architectures import config_of, write_model
from worker.test_ranks import logprobs_of

LIMITS: dict[str, Any] = {"step_tokens_max": 64, "max_running": 8, "offer_blocks": False}
SHAPES = [Shape(2, 1), Shape(1, 2), Shape(2, 2)]


def jobs() -> list[Job]:
    """A prompt of several chunks, two that share blocks, one that is told of, one that draws."""
    shared = random_tokens(40, 1)
    return [
        make_job("long", random_tokens(300, 2), max_tokens=12),
        make_job("first", [*shared, 5], max_tokens=20, logprobs=0, prompt_logprobs=0),
        make_job("second", [*shared, 9, 9], max_tokens=20),
        make_job("drawn", random_tokens(9, 3), temperature=1.0, seed=5, max_tokens=16),
    ]


PROGRAM = """
import json, os, sys
from headrace.config import load_or_exit
from headrace_worker.parallel.ranks import Ranks
from headrace_worker.parallel.torch_links import join, launch
from headrace_worker.settings import WorkerSettings
from headrace_worker import startup
from worker.builders import finish_all
from worker.ranked import engine_over
from worker.test_ranks import logprobs_of
from worker.test_ranks_apart import LIMITS, jobs

settings = load_or_exit(WorkerSettings)
shape = startup.shape_of(settings)
assert not startup.shares_memory(settings)
children = launch(shape, {"OMP_NUM_THREADS": "1"})
ranks = Ranks(join(shape, settings.device), children)
engine = engine_over(ranks, settings, **LIMITS)
out = finish_all(engine, jobs())
ranks.close()
said = [out.tokens, logprobs_of(out), [child.returncode for child in children]]
print(json.dumps(said), flush=True)
os._exit(0)  # gloo's threads would abort the interpreter's end, once in a while
"""


def test_processes_started_as_torchrun_does_answer_as_one(tmp_path: Path) -> None:
    """Without torchrun, on one host, as for GPUs; all of them end when they are told to.

    Where the kernels compute, not one log probability has another bit.
    """
    sizes = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 16}
    write_model(tmp_path, config_of("llama", num_attention_heads=8, num_key_value_heads=4, **sizes))
    shape, kind = Shape(2, 2), {"dtype": "bfloat16", "quantization": "int8"}
    whole = load_model(tmp_path, "test", **kind)
    expected = finish_all(make_engine(whole, **LIMITS), jobs())
    settings = settings_for(tmp_path, shape, rank_links="torch", **kind)
    env = os.environ | as_env(settings) | {"OMP_NUM_THREADS": "1", "PYTHONPATH": ":".join(sys.path)}
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=env, capture_output=True, text=True, timeout=150
    )
    assert run.returncode == 0, run.stderr
    tokens, logprobs, codes = json.loads(run.stdout.splitlines()[-1])
    assert tokens == expected.tokens
    if native.library() is not None:
        assert logprobs == logprobs_of(expected)
    assert codes == [0] * (shape.ranks - 1)


@pytest.fixture
def flash(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: no native kernels, and flash-attn 2's functions are found."""
    kernels = flash_reference.VERSIONS["2"]()
    monkeypatch.setattr(choice, "find_kernels", lambda: ([kernels], []))
    flash_reference.calls.clear()


@pytest.mark.usefixtures("flash")
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"tp{s.tensor}pp{s.pipeline}")
def test_each_rank_reads_pages_of_its_own(
    tiny: LoadedModel, tiny_folder: Path, shape: Shape
) -> None:
    """Each has its heads' and layers' part of the KV, in pages; the tokens are one process's."""
    expected = finish_all(make_engine(tiny, **LIMITS), jobs())
    settings = settings_for(tiny_folder, shape, attention="flash", kernels="off")
    try:
        with threaded(settings, apart=True, attention="flash", **LIMITS) as engine:
            found = finish_all(engine, jobs())
            again = finish_all(engine, jobs())
    finally:
        native.choose("auto")
    assert found.tokens == again.tokens == expected.tokens
    assert again.cached["long"] == 288, "blocks are found again"
    assert len(flash_reference.calls) % (len(tiny.model.layers) * shape.tensor) == 0
    assert flash_reference.calls, "flash-attn computed it"


def test_ranks_with_common_memory_have_no_pages(tiny_folder: Path) -> None:
    settings = settings_for(tiny_folder, Shape(2, 1), attention="flash")
    with (
        pytest.raises(SettingsError, match="HEADRACE_RANK_LINKS=torch"),
        threaded(settings, attention="flash", **LIMITS),
    ):
        pass


def test_ranks_that_compute_in_different_ways_are_refused(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A host without a compiler beside one that has one: what they add up would not fit."""

    def loaded(*told: Any, kernels: str) -> Loaded:
        assert kernels == native.isa()
        return Loaded(*told, kernels="sse2")

    monkeypatch.setattr(rank, "Loaded", loaded)
    with (
        pytest.raises(ModelError, match=r"rank 1 on .* native kernels: sse2, rank 0 with"),
        threaded(settings_for(tiny_folder, Shape(2, 1)), apart=True, **LIMITS),
    ):
        pass


def test_a_pool_that_is_asked_for_comes_as_it_was_said() -> None:
    wanted = choice.Wanted(77, "int8", "flash", 9)
    for starts in ((), (0, 4096)):
        opening = Open(wanted, starts)
        assert unpack_open(pack_open(opening)[1:]) == opening


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch says on a host with two of them."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))


@pytest.mark.usefixtures("two_gpus")
def test_each_rank_of_a_host_takes_a_gpu_of_its_own() -> None:
    assert [rank_device("auto", rank, 2).index for rank in range(2)] == [0, 1]
    assert rank_device("cuda", 1, 2) == torch.device("cuda", 1)
    assert rank_device("cpu", 1, 2) == CPU
    with pytest.raises(ModelError, match="3 ranks on this host need a GPU each and there are 2"):
        rank_device("cuda", 2, 3)
    with pytest.raises(ModelError, match="HEADRACE_DEVICE=cuda:1: ranks take a GPU each"):
        rank_device("cuda:1", 0, 2)


@pytest.mark.usefixtures("two_gpus")
def test_ranks_on_gpus_share_no_memory() -> None:
    assert not startup.shares_memory(WorkerSettings(device="cuda"))
    assert startup.shares_memory(WorkerSettings(device="cpu"))
    assert not startup.shares_memory(WorkerSettings(device="cpu", rank_links="torch"))
    with pytest.raises(ModelError, match=r"RANK_LINKS=shared: HEADRACE_DEVICE=auto: .* on its GPU"):
        startup.shares_memory(WorkerSettings(rank_links="shared"))


def test_the_fullest_gpu_decides_how_much_kv_there_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_folder: Path
) -> None:
    """A rank with the output head has less room than the first one."""
    loaded = load_model(tiny_folder, "test", "float32")
    monkeypatch.setattr(startup, "free_bytes", lambda _: 100 << 20)
    settings = WorkerSettings(model=str(tmp_path))
    alone = startup.kv_tokens_for(settings, loaded, 4096)
    assert startup.kv_tokens_for(settings, loaded, 4096, 50 << 20) == alone // 2 // 16 * 16
    assert startup.kv_tokens_for(settings, loaded, 4096, 200 << 20) == alone
