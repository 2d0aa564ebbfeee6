"""The planner: what fits which devices, why not, and what it could do at most."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.errors import ModelError, SettingsError
from headrace.policy.devices import DEVICES, GIB, Device, Fleet, parse_cpu, parse_gpus, with_speeds
from headrace.policy.limits import Load, bounds
from headrace.policy.model_shape import ModelShape, Precision
from headrace.policy.splits import replication, split_layers, tensor_refusal
from headrace.policy.topology import KV_TOKENS_MIN, Topology, Wish, plan

BF16 = Precision()


def llama_70b() -> ModelShape:
    return ModelShape("llama", 128_256, 8192, 28_672, 80, 64, 8, 128, 131_072, tied=False)


def llama_8b() -> ModelShape:
    return ModelShape("llama", 128_256, 4096, 14_336, 32, 32, 8, 128, 131_072, tied=False)


def llama_405b() -> ModelShape:
    return ModelShape("llama", 128_256, 16_384, 53_248, 126, 128, 8, 128, 131_072, tied=False)


def smollm2_135m() -> ModelShape:
    return ModelShape("llama", 49_152, 576, 1536, 30, 9, 3, 64, 8192, tied=True)


def mixtral() -> ModelShape:
    return ModelShape(
        "mixtral",
        32_000,
        4096,
        14_336,
        32,
        32,
        8,
        128,
        32_768,
        tied=False,
        expert_layers=tuple(range(32)),
        experts=8,
        experts_per_token=2,
        expert_size=14_336,
    )


def best_of(topology: Topology) -> tuple[int, int, int]:
    split = topology.fitting[0]
    return split.tensor, split.pipeline, split.replicas


def reason_for(shape: ModelShape, gpus: str, tensor: int, pipeline: int = 1) -> str:
    wish = Wish(tensor=tensor, pipeline=pipeline)
    topology = plan(shape, BF16, parse_gpus(gpus), wish)
    assert not topology.fitting
    [refused] = topology.refused
    return refused.refusal


def test_a_small_model_is_repeated_and_a_large_one_is_split() -> None:
    """8B goes on each of 8 GPUs; 70B takes at least two, since its weights alone are 131 GiB."""
    assert best_of(plan(llama_8b(), BF16, parse_gpus("8xh100"), Wish())) == (1, 1, 8)
    topology = plan(llama_70b(), BF16, parse_gpus("8xh100"), Wish())
    assert min(split.devices for split in topology.fitting) == 2
    alone = next(split for split in topology.refused if split.devices == 1)
    assert "weights 131.4" in alone.refusal and "too many" in alone.refusal


def test_405b_needs_two_hosts_in_bfloat16_and_one_in_int8() -> None:
    """756 GiB of weights do not go into 8 x 80 GiB; tensor parallel does not cross hosts."""
    assert not plan(llama_405b(), BF16, parse_gpus("8xh100"), Wish()).fitting
    across = plan(llama_405b(), BF16, parse_gpus("2x8xh100"), Wish())
    assert best_of(across) == (8, 2, 1)
    assert all(split.tensor <= 8 for split in across.fitting)
    eight = plan(llama_405b(), Precision(quantization="int8"), parse_gpus("8xh100"), Wish())
    assert best_of(eight) == (8, 1, 1)
    assert any("CPU workers only" in note for note in eight.notes)


def test_a_135m_model_fits_a_small_machine_with_its_whole_context() -> None:
    topology = plan(smollm2_135m(), BF16, parse_cpu("2x24G"), Wish(context_tokens=8192))
    tensor, pipeline, replicas = best_of(topology)
    assert (tensor, pipeline, replicas) == (1, 1, 2)
    assert topology.fitting[0].kv_tokens > 100_000
    assert not topology.fitting[0].bounds, "nobody said how fast the machine is"
    assert any("--bandwidth-gbs" in note for note in topology.notes)


@pytest.mark.parametrize(
    ("shape", "tensor", "told"),
    [
        (llama_8b(), 12, "8 KV heads would be held 12 / 8 times each, which leaves 4 over"),
        (smollm2_135m(), 6, "2 devices for each of 3 KV heads would share its 3 query heads"),
        (smollm2_135m(), 4, "what works: 1, 2, 3, 9"),
        (replace(mixtral(), experts=4), 8, "4 experts over 8 devices: some would hold none"),
        (replace(llama_8b(), vocab_size=4), 8, "a vocabulary of 4 tokens over 8 devices"),
    ],
)
def test_what_does_not_divide_is_refused_with_the_division(
    shape: ModelShape, tensor: int, told: str
) -> None:
    assert told in reason_for(shape, f"{tensor}x80G", tensor)


def test_uneven_splits_count_by_their_fullest_device() -> None:
    """3 KV heads on 2 devices: one holds two, and its 6 query heads; so KV has half the room."""
    shape = smollm2_135m()
    two = plan(shape, BF16, parse_gpus("2xl4"), Wish(tensor=2, pipeline=1)).fitting[0]
    assert shape.heads_on(2) == 6
    assert two.stages[0].kv_token_bytes == 30 * 2 * 2 * 64 * 2
    assert any("3 KV heads over 2 devices: the fullest holds 2" in told for told in two.reasons)


def test_too_many_stages_and_too_few_devices_are_refused() -> None:
    assert "32 layers over 40 stages" in reason_for(llama_8b(), "40xh100", 1, 40)
    assert "4 x 4 = 16 devices, there are 8" in reason_for(llama_8b(), "8xh100", 4, 4)
    assert "TP 8 needs 8 devices in one host, there are 4" in reason_for(llama_8b(), "2x4xh100", 8)


def test_a_context_that_does_not_fit_is_refused_with_the_sum() -> None:
    wish = Wish(context_tokens=131_072, tensor=1, pipeline=1)
    [refused] = plan(llama_8b(), BF16, parse_gpus("1xl4"), wish).refused
    assert "131,072 are needed" in refused.refusal and "131,072 bytes a token" in refused.refusal
    with pytest.raises(SettingsError, match="more than the model's 8,192"):
        plan(smollm2_135m(), BF16, parse_gpus("1xl4"), Wish(context_tokens=9000))


def test_replicated_kv_heads_are_told_and_cost_their_memory() -> None:
    """8 KV heads over 16 devices: each is held twice, so twice the devices hold no more tokens."""
    assert replication(llama_70b(), 16) == 2
    fleet = parse_gpus("16xh100")
    eight, sixteen = (
        plan(llama_70b(), BF16, fleet, Wish(tensor=tensor, pipeline=1)).fitting[0]
        for tensor in (8, 16)
    )
    assert sixteen.stages[0].kv_token_bytes == eight.stages[0].kv_token_bytes
    assert any("each is held 2 times" in reason for reason in sixteen.reasons)


def test_limits_come_with_arithmetic_that_adds_up() -> None:
    """8B in bfloat16 on an H100: 15 GB of layers and head a token at 3,350 GB/s, 222 tokens/s."""
    split = plan(llama_8b(), BF16, parse_gpus("1xh100"), Wish(held_tokens=1)).fitting[0]
    one, full, prefill = split.bounds
    layers_and_head = (8_030_261_248 - 128_256 * 4096) * 2
    assert one.tokens_per_s == pytest.approx(3.35e12 / layers_and_head, rel=1e-3)
    assert "15.01 GB read a token" in one.arithmetic and one.by == "memory bandwidth"
    assert full.tokens_per_s == pytest.approx(64 * one.tokens_per_s, rel=0.01)
    assert prefill.by == "arithmetic"
    per_token = 2 * (8_030_261_248 - 2 * 128_256 * 4096)
    assert prefill.tokens_per_s == pytest.approx(989e12 / per_token, rel=1e-3)


def test_a_mixture_reads_only_the_experts_that_are_reached() -> None:
    """One token reads 2 of Mixtral's 8 experts, 64 tokens all of them."""
    shape = mixtral()
    one, many = (shape.layer_read_bytes(0, 1, BF16, tokens) for tokens in (1, 64))
    experts = 8 * 3 * 4096 * 14_336 * 2
    assert many == pytest.approx(shape.layer_bytes(0, 1, BF16), rel=1e-6)
    assert many - one == pytest.approx(experts * 6 / 8, rel=1e-6)


def test_pipelines_do_not_make_one_stream_faster_but_all_of_them() -> None:
    device = DEVICES["h100"]
    halves = [range(40), range(40, 80)]
    single, double = (
        bounds(llama_70b(), BF16, device, runs, 4, Load(64, 2048)) for runs in ([range(80)], halves)
    )
    assert double[0].tokens_per_s == pytest.approx(single[0].tokens_per_s, rel=1e-6)
    assert double[1].tokens_per_s > 1.05 * single[1].tokens_per_s
    assert double[2].tokens_per_s == pytest.approx(2 * single[2].tokens_per_s, rel=0.01)


def test_slow_links_bound_prefill_over_many_devices() -> None:
    fleet = parse_gpus("8xl4")
    split = plan(llama_70b(), BF16, fleet, Wish(tensor=8, pipeline=1, context_tokens=4096))
    assert split.fitting, split.refused
    slow = with_speeds(fleet, link_gbs=1)
    [prefill] = [
        bound
        for bound in plan(llama_70b(), BF16, slow, Wish(tensor=8, pipeline=1)).fitting[0].bounds
        if bound.name == "prefill"
    ]
    assert prefill.by == "links" and "1 GB/s" in prefill.arithmetic


def test_windows_bound_what_decoding_reads_but_not_what_is_kept() -> None:
    shape = replace(llama_8b(), windows=(512, 0) * 16)
    assert shape.seen_tokens(0, 4096) == 512 and shape.seen_tokens(1, 4096) == 4096
    plain, windowed = (
        plan(s, BF16, parse_gpus("1xh100"), Wish(held_tokens=8192)).fitting[0]
        for s in (llama_8b(), shape)
    )
    assert windowed.kv_tokens == plain.kv_tokens
    assert windowed.bounds[1].tokens_per_s > plain.bounds[1].tokens_per_s


@given(
    costs=st.lists(st.integers(1, 100), min_size=1, max_size=12),
    stages=st.integers(1, 6),
    head=st.integers(0, 200),
)
def test_stages_are_contiguous_and_no_split_has_a_cheaper_dearest_one(
    costs: list[int], stages: int, head: int
) -> None:
    """Against the best of all splits, found by trying them."""
    stages = min(stages, len(costs))
    runs = split_layers(costs, stages, head=head)
    assert [i for run in runs for i in run] == list(range(len(costs)))
    assert all(len(run) for run in runs)

    def dearest(start: int, left: int) -> int:
        if left == 1:
            return sum(costs[start:]) + head
        return min(
            max(sum(costs[start:stop]), dearest(stop, left - 1))
            for stop in range(start + 1, len(costs) - left + 2)
        )

    told = max(sum(costs[i] for i in run) + head * (run is runs[-1]) for run in runs)
    assert told == dearest(0, stages)


@given(
    tensor=st.integers(1, 16),
    pipeline=st.integers(1, 8),
    heads=st.sampled_from([(8, 8), (32, 8), (32, 4), (9, 3), (48, 6)]),
    experts=st.sampled_from([0, 8, 128]),
    gib=st.sampled_from([8, 24, 80]),
)
def test_whatever_fits_keeps_within_every_device(
    tensor: int, pipeline: int, heads: tuple[int, int], experts: int, gib: int
) -> None:
    """Memory adds up on each device; all weights are somewhere, a split over devices loses none."""
    shape = ModelShape(
        "test", 32_000, 1024, 4096, 24, *heads, 64, 4096, tied=False, qk_norm=True,
        expert_layers=tuple(range(24)) if experts else (), experts=experts,
        experts_per_token=2 if experts else 0, expert_size=512 if experts else 0,
    )  # fmt: skip
    fleet = Fleet(Device("d", "gpu", gib * GIB), 1, 128)
    topology = plan(shape, BF16, fleet, Wish(tensor=tensor, pipeline=pipeline))
    for split in topology.fitting:
        assert tensor_refusal(shape, tensor) is None
        assert split.kv_tokens >= KV_TOKENS_MIN and split.kv_tokens % 16 == 0
        assert split.replicas * split.devices + split.unused == fleet.count
        assert [i for s in split.stages for i in s.layers] == list(range(24))
        for stage in split.stages:
            kv = split.kv_tokens * stage.kv_token_bytes
            others = stage.weights_bytes + stage.step_bytes + stage.runtime_bytes
            assert kv + others <= stage.usable_bytes < fleet.device.memory_bytes
        whole = tensor * sum(stage.weights_bytes for stage in split.stages)
        assert whole >= shape.parameters * 2
    for split in topology.refused:
        assert split.refusal


@pytest.mark.parametrize(
    ("text", "count", "gib", "name"),
    [
        ("8x80G", 8, 80, "h100"),
        ("8x80GB", 8, 80, "h100"),
        ("4xA100-40G", 4, 40, "a100-40"),
        ("2x8xh200", 16, 141, "h200"),
        ("1x17G", 1, 17, "17G"),
    ],
)
def test_fleets_are_read(text: str, count: int, gib: int, name: str) -> None:
    fleet = parse_gpus(text)
    assert (fleet.count, fleet.device.name) == (count, name)
    assert fleet.device.memory_bytes == gib * GIB
    assert bool(fleet.assumed) == ("80G" in text or "17G" in text), "what was assumed is said"


@pytest.mark.parametrize("text", ["", "80G", "0x80G", "8x0G", "8xz9", "8x80T", "x80G", "9999x80G"])
def test_what_is_no_fleet_is_refused(text: str) -> None:
    with pytest.raises(SettingsError):
        parse_gpus(text)


def test_unknown_precisions_and_shapes_are_refused() -> None:
    with pytest.raises(ModelError, match="quantization 'int3'"):
        Precision(quantization="int3")
    facts = mixtral().facts()
    assert ModelShape.of_facts(json.loads(json.dumps(facts))) == mixtral()
    with pytest.raises(ModelError, match="other fields"):
        ModelShape.of_facts(facts | {"colour": 1})


def run_plan(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "headrace.cli.main", "plan", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
    )


CONFIGS = Path(__file__).parent.parent / "support" / "model_configs"


def test_the_command_plans_a_config_alone() -> None:
    """405B from its config.json: a table with reasons, JSON, and exit code 1 where nothing fits."""
    large = str(CONFIGS / "llama-3.1-405b.json")
    done = run_plan("--model", large, "--gpus", "2x8xh100")
    assert done.returncode == 0, done.stderr
    assert "405.85B parameters" in done.stdout
    assert "take TP8 x PP2 x 1 replicas" in done.stdout
    assert "by memory bandwidth" in done.stdout
    done = run_plan("--model", large, "--gpus", "8xh100", "--json")
    assert done.returncode == 1
    facts = json.loads(done.stdout)
    assert facts["model"]["parameters"] == 405_853_388_800
    assert not facts["fitting"] and all(split["reason"] for split in facts["refused"])


def test_the_command_says_what_it_cannot_do() -> None:
    done = run_plan("--model", "nowhere/nothing.gguf", "--gpus", "1x80G")
    assert done.returncode == 1 and "no model at nowhere/nothing.gguf" in done.stderr
    done = run_plan("--model", "x")
    assert done.returncode == 1 and "--gpus 8x80G" in done.stderr
