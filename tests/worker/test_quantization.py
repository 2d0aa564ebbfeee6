"""Quantized weights and KV: what rounding may cost, and that it costs nothing else."""

from __future__ import annotations

import math
import pydoc_data.topics
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional

from headrace.errors import ModelError
from headrace.types import BLOCK_TOKENS
from headrace_worker import quantization
from headrace_worker.attention.interface import AttentionBatch
from headrace_worker.attention.sdpa import SdpaBackend
from headrace_worker.kv import pool as kv_pool
from headrace_worker.kv.pool import KvDtype, KvPool
from headrace_worker.loading import LoadedModel, load_model
from headrace_worker.loading.fingerprint import block_fingerprint
from headrace_worker.loading.gguf_file import GgufSource
from headrace_worker.model import linear as linear_layers
from headrace_worker.quantization import MODES, Role, int4, int8, make_linear
from headrace_worker.quantization.int4 import Int4Linear
from headrace_worker.quantization.int8 import Int8Linear
from worker.builders import finish_all, make_engine, make_job, random_tokens

SHAPES = [(960, 576), (64, 32), (7, 33), (300, 100), (1, 1), (130, 1536)]
"""Rows and columns; the second and the last fit the kernels, the others need padding or less."""
FLOAT32, BFLOAT16 = 2.0**-24, 2.0**-8
"""Half a step of these types at 1: what one rounding may change, relatively."""


def random(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal numbers with a few columns 30 times as large, as activations have them."""
    source = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=source)
    values[..., ::97] *= 30
    return values.to(dtype)


def int4_linear(weight: Tensor, bias: Tensor | None = None) -> Int4Linear:
    return Int4Linear(int4.quantize_weight(weight), weight.shape[1], bias)


# --- int8


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int8_is_its_reference_but_for_the_last_roundings(
    shape: tuple[int, int], dtype: torch.dtype
) -> None:
    """Sums are exact: what differs from float64 is four roundings and the result's own."""
    weight, bias = random(*shape), random(shape[0], seed=2, dtype=dtype)
    x, residual = random(19, shape[1], seed=3, dtype=dtype), random(19, shape[0], dtype=dtype)
    linear = Int8Linear(weight, bias)
    exact = int8.reference(x, weight, bias)
    last = FLOAT32 if dtype is torch.float32 else BFLOAT16
    terms = exact.abs() + 2 * bias.double().abs()
    assert ((linear(x).double() - exact).abs() <= (4 * FLOAT32 + last) * terms).all()
    added, summed = linear.added(x, residual), exact + residual.double()
    assert added.dtype is dtype
    terms += summed.abs() + residual.double().abs()
    assert ((added.double() - summed).abs() <= (4 * FLOAT32 + last) * terms).all()


@pytest.mark.parametrize("shape", SHAPES)
def test_int8_rounds_by_half_a_step(shape: tuple[int, int]) -> None:
    """Never more than half a step of weight and activation; on average what chance predicts."""
    weight, x = random(*shape), random(40, shape[1], seed=3)
    block = int8.block_of(shape[1])
    turned, turned_weight = int8.rotate(x.double().float()), int8.rotate(weight) / block
    values, scales = int8.quantize_rows(x)
    w_values, w_scales = int8.quantize_weight(weight)
    stored = w_values.double() * w_scales.double()[:, None]
    grid = x.abs().amax(1, keepdim=True) * block * block / 2**25
    x_error = (scales / 2 + grid).double()
    slack = 1 + 1e-5
    assert ((values * scales - turned).abs() <= x_error * slack).all()
    assert ((stored - turned_weight).abs() <= w_scales[:, None] / 2 * slack).all()
    error = Int8Linear(weight)(x).double() - x.double() @ weight.double().t()
    worst = turned.double().abs().sum(1, keepdim=True) * w_scales.double() / 2
    worst += x_error * stored.abs().sum(1)
    assert (error.abs() <= worst * slack + 1e-5).all()
    if shape[1] >= 500:
        variance = turned.double().square().sum(1, keepdim=True) * w_scales.double() ** 2
        variance += scales.double() ** 2 * stored.square().sum(1)
        ratio = (error.square().mean() / (variance.mean() / 12)).sqrt()
        assert 0.9 < ratio < 1.1


def test_the_rotation_is_exact() -> None:
    """On the integers that rows become, so that no order of summation can show; its own inverse."""
    x = (random(50, 192).clamp(-1, 1) * 2**18).round()
    x[0] = 2**18
    hadamard = int8.rotate(torch.eye(64)).double()
    expected = (x.double().view(-1, 64) @ hadamard).view(x.shape)
    assert torch.equal(int8.rotate(x).double(), expected)
    assert torch.equal(hadamard @ hadamard, 64 * torch.eye(64).double())


def test_int8_rows_do_not_know_of_each_other() -> None:
    """Alone or in any batch, bit for bit."""
    linear = Int8Linear(random(300, 576), random(300))
    x = random(140, 576, seed=5, dtype=torch.bfloat16)
    alone = torch.cat([linear(row[None]) for row in x])
    for count in (*range(2, 71, 7), 70, 97, 140):
        assert torch.equal(linear(x[:count]), alone[:count]), count
        assert torch.equal(linear(x[-count:]), alone[-count:]), count


@pytest.mark.parametrize("make", [Int8Linear, int4_linear])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extreme_rows_stay_among_themselves(
    make: Callable[[Tensor], Int8Linear | Int4Linear], dtype: torch.dtype
) -> None:
    """Zeros give zeros, what is tiny stays tiny; no NaN or infinity leaves its row or is lost."""
    weight = random(65, 64)
    linear, x = make(weight), random(9, 64, seed=3, dtype=dtype)
    before = linear(x)
    x[1] = 0
    x[2] = 1e-40
    x[3, 5] = 1e30
    x[4, 5] = math.nan
    x[5, 5] = math.inf
    x[6, 5] = -math.inf
    after = linear(x)
    plain = [0, 7, 8]
    assert torch.equal(after[plain], before[plain])
    assert (after[1] == 0).all()
    assert (after[2].abs() < 1e-30).all()
    exact = 1e30 * weight[:, 5].double()
    assert ((after[3].double() - exact).abs() < 1e30 * weight.abs().amax(1).double() / 5).all()
    for row in (4, 5, 6):
        assert not torch.isfinite(after[row]).any()
    assert linear(x[:0]).shape == (0, 65)


def test_without_a_fast_product_int8_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another processor or build of torch: slower, bit for bit equal."""
    weight, x = random(100, 2100), random(9, 2100, seed=2)
    fast = Int8Linear(weight)(x)
    monkeypatch.setattr(int8, "_PRODUCT", int8._Plain)
    assert torch.equal(Int8Linear(weight)(x), fast)


# --- int4


@pytest.mark.parametrize("shape", SHAPES)
def test_int4_rounds_by_half_a_step(shape: tuple[int, int]) -> None:
    """Of a group's own scale; both factors are bfloat16's, whose rounding comes on top."""
    weight = random(*shape)
    quantized = int4.quantize_weight(weight)
    error = (quantized.dequantized()[:, : shape[1]] - weight).abs()
    spread = functional.pad(error, (0, -shape[1] % int4.GROUP)).view(shape[0], -1, int4.GROUP)
    scales, zeros = quantized.scales[..., None], quantized.zeros[..., None]
    factors = BFLOAT16 * (zeros.abs() + int4.LEVELS * scales)
    assert (spread <= scales / 2 * (1 + 1e-5) + factors).all()
    padded = functional.pad(weight, (0, -shape[1] % int4.GROUP), value=math.nan)
    groups = padded.view(shape[0], -1, int4.GROUP)
    span = groups.nan_to_num(-math.inf).amax(-1) - groups.nan_to_num(math.inf).amin(-1)
    assert (quantized.scales <= span / int4.LEVELS * (1 + 2 * BFLOAT16) + 1e-29).all()


@pytest.mark.parametrize("kernel", [True, False])
@pytest.mark.parametrize("rows", [1, 2, 70, int4.KERNEL_ROWS_MAX, int4.KERNEL_ROWS_MAX + 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int4_is_its_reference_to_bfloat16(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, rows: int, kernel: bool
) -> None:
    """With torch's kernel and without, few rows and many, in shapes that fit and that do not."""
    if not kernel:
        monkeypatch.setattr(int4, "_KERNEL", replace(int4._KERNEL, available=False))
    for shape in SHAPES:
        weight, bias = random(*shape), random(shape[0], seed=2, dtype=dtype)
        x = random(rows, shape[1], seed=3, dtype=dtype)
        exact = int4.reference(x, weight)
        dense = int4.quantize_weight(weight).dequantized()[:, : shape[1]].double()
        # each factor rounded to bfloat16, float32 sums, the product and the sum with the bias
        sizes = x.double().abs() @ dense.abs().t()
        bound = (2 * BFLOAT16 + shape[1] * 2 * FLOAT32) * sizes + BFLOAT16 * exact.abs()
        product = int4_linear(weight)(x)
        assert product.dtype is dtype
        assert ((product.double() - exact).abs() <= bound).all(), shape
        with_bias = int4_linear(weight, bias)(x).double() - exact - bias.double()
        bound += BFLOAT16 * (exact.abs() + bias.double().abs() + bound)
        assert (with_bias.abs() <= bound).all(), shape


def test_int4_rows_do_not_know_of_each_other() -> None:
    """Alone or among others, as many as the kernel takes; beyond, whatever the others hold."""
    linear = int4_linear(random(300, 576), random(300, dtype=torch.bfloat16))
    x = random(140, 576, seed=5, dtype=torch.bfloat16)
    alone = torch.cat([linear(row[None]) for row in x])
    for count in (*range(2, 71, 7), 70, int4.KERNEL_ROWS_MAX):
        assert torch.equal(linear(x[:count]), alone[:count]), count
        assert torch.equal(linear(x[-count:]), alone[-count:]), count
    many, others = linear(x), x.clone()
    others[:70] = 5
    assert torch.equal(linear(others)[70:], many[70:])


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1"])
def test_weights_that_were_in_4_bits_stay_what_they_are(kind: str) -> None:
    """A group that uses 12 of its 16 levels is not stretched over all 16."""
    coded = GGMLQuantizationType[kind]
    weight = torch.from_numpy(dequantize(quantize(random(200, 576).numpy(), coded), coded))
    assert int4.quantize_weight(weight).error < int4_error_of_factors(weight)
    levels = torch.randint(0, 12, (200, 64)) * 0.25 - 1.5  # factors that bfloat16 holds
    levels[:, ::32], levels[:, 1::32] = -1.5, 1.25
    assert int4.quantize_weight(levels).error == 0
    assert int4.quantize_weight(random(200, 576)).error > 0.03


def int4_error_of_factors(weight: Tensor) -> float:
    """What rounding scale and zero point to bfloat16 can do at most, relative to the weights."""
    groups = weight.view(len(weight), -1, int4.GROUP)
    size = groups.abs().amax(-1) + 15 / 8 * (groups.amax(-1) - groups.amin(-1))
    return float(BFLOAT16 * size.square().mean().sqrt() / groups.square().mean().sqrt())


# --- which matrix gets what


def test_roles_are_told_by_names() -> None:
    """Stacked or as one, whatever a family calls them."""
    prefix = "model.layers.3"
    assert Role.of(f"{prefix}.self_attn.q_proj") is Role.of(f"{prefix}.self_attn.qkv_proj")
    assert Role.of(f"{prefix}.mlp.gate_up_proj") is Role.of(f"{prefix}.mlp.experts.7.gate_proj")
    assert Role.of(f"{prefix}.block_sparse_moe.experts.0.w1") is Role.GATE_UP
    assert Role.of("lm_head") is Role.HEAD
    assert Role.of(f"{prefix}.mlp.down_proj") is Role.of(f"{prefix}.self_attn.o_proj")


def test_int4_spares_what_would_suffer(torch_alone: None) -> None:
    """Head and, unless they were in 4 bits before, q, k, v, and gate and up of narrow models."""

    def kind(role: Role, weight: Tensor) -> type:
        return type(make_linear("int4", weight, None, role, torch.float32))

    weight, wide = random(96, 64), random(4, quantization.NARROW)
    grid = int4.quantize_weight(weight).dequantized()
    assert [kind(role, weight) for role in Role] == [Int8Linear] * 3 + [Int4Linear]
    assert [kind(role, wide) for role in Role] == [
        Int8Linear, Int4Linear, Int8Linear, Int4Linear
    ]  # fmt: skip
    assert [kind(role, grid) for role in Role] == [
        Int4Linear, Int4Linear, Int8Linear, Int4Linear
    ]  # fmt: skip


# --- models


@pytest.mark.parametrize("mode", ["int8", "int4"])
def test_a_quantized_model_is_near_the_one_it_was(
    tiny: LoadedModel, tiny_folder: Path, mode: str
) -> None:
    """Its logits move by a share of their size; it knows its mode and what it weighs."""
    tokens = random_tokens(60, 3)
    loaded = load_model(tiny_folder, "test", "float32", mode)
    exact, found = logits_of(tiny, tokens), logits_of(loaded, tokens)
    share = float((found - exact).square().mean().sqrt() / exact.std())
    assert 0.001 < share < (0.05 if mode == "int8" else 0.3)
    assert loaded.quantization == mode and tiny.quantization == "none"


def test_weights_take_the_bytes_that_are_claimed(
    torch_alone: None, tiny_folder: Path, smollm2_path: Path
) -> None:
    """A byte a weight and 4 a row; 5 bits a weight; what is not a linear layer as it was."""
    plain = 300 * 64 + 7 * 64
    q_k_v, out, gate_up, down = 128 * 64, 64 * 64, 192 * 64, 96 * 64
    linear = 3 * (q_k_v + out + gate_up + down) + 300 * 64
    rows = 3 * (128 + 64 + 192 + 64) + 300
    tiny = load_model(tiny_folder, "test", "float32")
    assert tiny.weight_bytes == 4 * (plain + linear)
    loaded = load_model(tiny_folder, "test", "float32", "int8")
    assert loaded.weight_bytes == 4 * plain + linear + 4 * rows
    loaded = load_model(tiny_folder, "test", "float32", "int4")
    spared, spared_rows = 3 * (q_k_v + gate_up) + 300 * 64, 3 * (128 + 192) + 300
    assert loaded.weight_bytes == 4 * plain + spared + 4 * spared_rows + 3 * (out + down) * 5 // 8
    whole = load_model(smollm2_path, "test", "bfloat16")
    # the tied head is a matrix of its own where bfloat16 is packed for the CPU, and when quantized
    head = 2 * whole.record.vocab_size * whole.config.hidden_size
    none = whole.weight_bytes + (0 if linear_layers._PACKING else head)
    assert load_model(smollm2_path, "test", "bfloat16", "int8").weight_bytes < 0.6 * none
    assert load_model(smollm2_path, "test", "bfloat16", "int4").weight_bytes < 0.47 * none


def test_an_unknown_quantization_is_refused(tiny_folder: Path) -> None:
    """Before anything is read, with the ones there are."""
    with pytest.raises(ModelError, match="'int3' is not one of auto, none, int8, int4"):
        load_model(tiny_folder, "m", "float32", "int3")


def test_blocks_of_another_rounding_are_other_blocks(tiny_folder: Path) -> None:
    """Each way to hold weights and KV has a fingerprint of its own, the same every time."""
    models = [load_model(tiny_folder, "m", "float32", mode).record.fingerprint for mode in MODES]
    again = [load_model(tiny_folder, "x", "float32", mode).record.fingerprint for mode in MODES]
    kinds: list[KvDtype] = ["auto", "int8"]
    assert models == again
    assert len({block_fingerprint(model, kind) for model in models for kind in kinds}) == 6


# --- perplexity


def logits_of(loaded: LoadedModel, tokens: Sequence[int], kv_dtype: KvDtype = "auto") -> Tensor:
    """Logits of all rows, computed in two pieces, float32 [N, vocab]."""
    pool = KvPool(loaded.config, -(-len(tokens) // BLOCK_TOKENS), loaded.dtype, kv_dtype)
    backend, half, found = SdpaBackend(pool, loaded.config), len(tokens) // 2, []
    with torch.inference_mode():
        for start, stop in ((0, half), (half, len(tokens))):
            places = torch.arange(start, stop)
            batch = AttentionBatch(
                [list(range(pool.blocks))], [stop], [0, stop - start], slots=places
            )
            ids = torch.tensor(tokens[start:stop])
            found.append(loaded.model(ids, places, None, backend.prepare(batch)))
    return torch.cat(found)


TOPICS = ("objects", "execmodel", "naming")
"""What Python's help says about its objects, their names and where they are looked up."""


def perplexity(loaded: LoadedModel, kv_dtype: KvDtype = "auto", topics: int = 1) -> float:
    """Over the first 700 tokens of each of some topics."""
    tokenizer, losses = Tokenizer.from_str(loaded.record.tokenizer_json.decode()), []
    for topic in TOPICS[:topics]:
        tokens = tokenizer.encode(pydoc_data.topics.topics[topic]).ids[:700]
        logits = logits_of(loaded, tokens[:-1], kv_dtype)
        losses.append(functional.cross_entropy(logits, torch.tensor(tokens[1:])).item())
    return math.exp(sum(losses) / topics)


@pytest.mark.timeout(900)  # five models over eight texts: two minutes on an idle core of AVX2
def test_perplexity_of_smollm2(smollm2: LoadedModel, smollm2_path: Path) -> None:
    """int8 costs at most 1 %, of weights, of KV and of both; int4 at most 5 %.

    Over eight texts: a single one of 700 tokens varies by more than 1 % with the rounding of the
    processor's float32 sums, which decides what int8 rounds to.
    """
    exact = perplexity(smollm2, topics=8)
    assert perplexity(smollm2, "int8", topics=8) < 1.01 * exact
    loaded = load_model(smollm2_path, "test", "float32", "int8")
    assert perplexity(loaded, topics=8) < 1.01 * exact
    assert perplexity(loaded, "int8", topics=8) < 1.01 * exact
    loaded = load_model(smollm2_path, "test", "float32", "int4")
    assert perplexity(loaded, topics=8) < 1.05 * exact


@pytest.mark.timeout(900)
def test_perplexity_of_weights_that_never_were_in_4_bits(
    smollm2_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SmolLM2's file is in 4 bits; with noise of half a step its weights stand on no grid."""
    read = GgufSource.read

    def noisy(self: GgufSource, name: str) -> Tensor:
        tensor = read(self, name)
        if "layers" not in name or tensor.ndim == 1:
            return tensor
        source = torch.Generator().manual_seed(sum(name.encode()))
        groups = tensor.view(len(tensor), -1, 32)
        step = (groups.amax(-1, keepdim=True) - groups.amin(-1, keepdim=True)) / 15
        noise = torch.rand(groups.shape, generator=source) - 0.5
        return (groups + noise * step).view(tensor.shape)

    monkeypatch.setattr(GgufSource, "read", noisy)
    exact = perplexity(load_model(smollm2_path, "test", "float32"), topics=8)
    loaded = load_model(smollm2_path, "test", "float32", "int4")
    assert perplexity(loaded, topics=8) < 1.05 * exact, "one topic alone varies by that much"


# --- KV in int8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_pool_in_int8_gives_back_what_it_can(tiny: LoadedModel, dtype: torch.dtype) -> None:
    """Half a scale of each token and head; in whatever block, exported or not."""
    pool = KvPool(tiny.config, 4, dtype, "int8")
    k, v = random(20, 2, 16, seed=1, dtype=dtype), random(20, 2, 16, seed=2, dtype=dtype)
    k[3], k[4, 1], v[5] = 0, 1e4, 1e-38
    chunks = torch.tensor([2 * 3 * 2 + 2] * 16 + [0 * 3 * 2 + 2] * 4)  # layer 1 of blocks 2 and 0
    offsets = torch.tensor([*range(16), *range(4)]).repeat(2)
    pool.write(torch.cat((chunks, chunks + 1)), offsets, k, v)
    data = pool.export_block(2)
    assert len(data) == KvPool.block_bytes(tiny.config, dtype, "int8")
    pool.import_block(3, data)
    for full in (2, 3):
        wanted = torch.tensor([full * 3 * 2 + 2, 2, full * 3 * 2 + 3, 3])
        keys, values = pool.read(wanted, 1)
        assert keys.shape == (1, 2, 32, 16) and keys.dtype is dtype
        for read, written in ((keys, k), (values, v)):
            rounded = read[0, :, :20].transpose(0, 1).double()
            size = written.double().abs().amax(-1, keepdim=True)
            # the scale is rounded to dtype, and so is the number
            bound = size * (1 + 2 * BFLOAT16) / 127 / 2 + size * BFLOAT16 + 1e-30
            assert ((rounded - written.double()).abs() <= bound).all()
            assert (read[0, :, 20:] == 0).all(), "what was never written is zero"


def test_int8_kv_takes_half_of_bfloat16(smollm2: LoadedModel) -> None:
    """A byte a number and a scale per token and head."""
    config = smollm2.config
    full = KvPool.block_bytes(config, torch.bfloat16)
    assert KvPool.block_bytes(config, torch.bfloat16, "int8") == full // 2 * (64 + 2) // 64


def test_a_payload_whose_scales_are_no_numbers_is_refused(tiny: LoadedModel) -> None:
    """NaN, infinity, and scales that would make infinities of int8."""
    pool = KvPool(tiny.config, 2, torch.float32, "int8")
    data = bytearray(pool.export_block(0))
    chunk = len(data) // (tiny.config.layers * 2)
    for scale in (math.nan, math.inf, -math.inf, 1e38):
        bad = data.copy()
        bad[chunk - 4 : chunk] = np.float32(scale).tobytes()
        assert not pool.accepts(bytes(bad))
        with pytest.raises(ValueError, match="finite"):
            pool.import_block(1, bytes(bad))
    data[chunk - 4 : chunk] = np.float32(1e30).tobytes()
    data[:8] = b"\xff\x80\x7f\x00\x01\x02\x03\x04"  # any int8 is a number
    assert pool.accepts(bytes(data)) and not pool.accepts(bytes(data[:-4]))
    pool.import_block(1, bytes(data))
    assert all(torch.isfinite(part).all() for part in pool.read(torch.arange(6, 12), 3))


def test_what_is_not_finite_is_still_seen(tiny: LoadedModel) -> None:
    """A NaN or an infinity in a key reads as something not finite, so that its job ends."""
    for bad in (math.nan, math.inf, -math.inf):
        x = random(3, 2, 16)
        x[1, 0, 7] = bad
        values, scales = kv_pool.quantize(x)
        finite = torch.isfinite(values * scales[..., None]).all(-1)
        assert finite.tolist() == [[True, True], [False, True], [True, True]]


def jobs(name: str, *, output: int = 12):
    """Six prompts of 5 to 130 tokens; the second half shares its first two blocks."""
    shared = random_tokens(32, 99)
    lengths = (5, 40, 130, 9, 33, 70)
    return [
        make_job(
            f"{name}{i}",
            [*(shared if i > 2 else []), *random_tokens(length, i)],
            max_tokens=output,
        )
        for i, length in enumerate(lengths)
    ]


def test_greedy_runs_with_int8_kv(tiny: LoadedModel) -> None:
    """Alone, together, in small chunks, from the prefix cache, under preemption: the same."""
    alone: dict[str, list[int]] = {}
    for job in jobs("a"):
        alone |= finish_all(make_engine(tiny, kv_dtype="int8"), [job]).tokens
    expected = list(alone.values())
    engine = make_engine(tiny, kv_dtype="int8")
    assert list(finish_all(engine, jobs("a")).tokens.values()) != [], "something was said"
    warm = finish_all(engine, jobs("b"))
    assert [warm.tokens[f"b{i}"] for i in range(6)] == expected
    assert warm.cached["b2"] == 128
    chunked = make_engine(tiny, kv_dtype="int8", max_running=6, step_tokens_max=20)
    out = finish_all(chunked, jobs("c"))
    assert [out.tokens[f"c{i}"] for i in range(6)] == expected
    small = make_engine(tiny, 192, kv_dtype="int8")
    out = finish_all(small, jobs("d", output=12))
    assert [out.tokens[f"d{i}"] for i in range(6)] == expected
    assert sum(story.preemptions for story in out.stories.values()) > 0


def test_int8_blocks_travel_between_engines(tiny: LoadedModel) -> None:
    """They are half as long, are taken by their like and are never asked for by another kind."""
    first, second = make_engine(tiny, kv_dtype="int8"), make_engine(tiny, kv_dtype="int8")
    job = jobs("a")[2]
    source = finish_all(first, [job])
    missing = second.missing_blocks(job).hashes
    assert set(missing) <= source.blocks.keys()
    assert not set(make_engine(tiny).missing_blocks(job).hashes) & source.blocks.keys()
    size = KvPool.block_bytes(tiny.config, tiny.dtype, "int8")
    assert {len(payload.data) for payload in source.blocks.values()} == {size}
    second.add(job, [source.blocks[block_hash] for block_hash in missing])
    out = finish_all(second)
    assert out.tokens == source.tokens
    assert out.stories["a2"].cached_imported == len(missing) * BLOCK_TOKENS == 128


def test_a_prompt_computed_whole_reads_what_a_later_one_will(tiny: LoadedModel) -> None:
    """Rounded keys from the first token on: else a prefix hit would change the answer."""
    tokens = random_tokens(80, 7)
    pool = KvPool(tiny.config, 5, tiny.dtype, "int8")
    backend, places = SdpaBackend(pool, tiny.config), torch.arange(80)
    with torch.inference_mode():
        batch = AttentionBatch([list(range(5))], [80], [0, 80], slots=places)
        whole = tiny.model(torch.tensor(tokens), places, None, backend.prepare(batch))
    pieces = logits_of(tiny, tokens, "int8")
    torch.testing.assert_close(whole, pieces, rtol=1e-4, atol=1e-4)
    assert (whole - logits_of(tiny, tokens)).abs().max() > 1e-3, "int8 does round"
