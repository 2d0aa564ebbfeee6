"""The native kernels: each against torch, rows that cannot tell, models with and without them.

Where there is no compiler, or no processor that the kernels know, what needs them is skipped.
"""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from headrace.types import BLOCK_TOKENS
from headrace_worker import native
from headrace_worker.attention.choice import attention_over
from headrace_worker.attention.interface import AttentionBatch
from headrace_worker.attention.sdpa import SdpaBackend
from headrace_worker.executor import Executor
from headrace_worker.kv.pool import KvDtype, KvPool
from headrace_worker.loading import LoadedModel, load_model
from headrace_worker.model.config import ModelConfig
from headrace_worker.model.rope import Angles, plain, yarn
from headrace_worker.native import build, pages
from headrace_worker.native.abi import Library
from headrace_worker.native.angles import AngleTable
from headrace_worker.native.attention import NativeBackend
from headrace_worker.native.linear import NativeLinear, in_groups
from headrace_worker.native.program import Scored
from headrace_worker.quantization import int4
from headrace_worker.step_inputs import StepInputs
from worker.builders import (
    finish_all,
    logits_of,
    make_engine,
    make_job,
    random_tokens,
    write_hf_folder,
)
from worker.rounding_reference import quantize_q8, turned

SHAPES = [(960, 576), (64, 32), (7, 33), (300, 100), (1, 1), (130, 1536)]
"""Rows and columns: whole panels and groups, and what needs padding."""
FORMATS = ("float32", "int8", "int4")
FLOAT32 = 2.0**-24


def random(*shape: int, seed: int = 1) -> Tensor:
    """Normal numbers with a few columns 30 times as large, as activations have them."""
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    values[..., ::97] *= 30
    return values


def make_linear(
    library: Library, kind: str, weight: Tensor, bias: Tensor | None = None
) -> tuple[NativeLinear, Tensor]:
    """The layer, and its weights as they are stored, float64."""
    if kind == "float32":
        return NativeLinear.of_float32(library, weight, bias), weight.double()
    columns = weight.shape[1]
    if kind == "int8":
        values, scales = quantize_q8(weight)
        stored = turned(values.double() * scales.double()[..., None])
        linear = NativeLinear.of_int8(library, weight, bias)
        return linear, stored.view(len(weight), -1)
    quantized = int4.quantize_weight(weight)
    linear = NativeLinear.of_int4(library, quantized, columns, bias)
    return linear, quantized.dequantized().double()


def as_rounded(x: Tensor, kind: str) -> Tensor:
    """x as rounded to int8 by groups of 32 columns, float64; turned meanwhile for int8 weights."""
    groups = torch.nn.functional.pad(x, (0, -x.shape[1] % 32)).view(len(x), -1, 32)
    groups = turned(groups) if kind == "int8" else groups
    most = groups.abs().amax(-1, keepdim=True).clamp_min(1e-30)
    rounded = (groups * (127 / most)).round().double() * (most / 127).double()
    rounded = turned(rounded) / 32 if kind == "int8" else rounded
    return rounded.view(len(x), -1)


# --- products


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("shape", SHAPES)
def test_products_are_those_of_the_stored_weights(
    library: Library, each_isa: str, kind: str, shape: tuple[int, int]
) -> None:
    """But for float32's roundings, a few for each group; with bias and residual, any rows."""
    weight, bias = random(*shape), random(shape[0], seed=2)
    linear, stored = make_linear(library, kind, weight, bias)
    for rows in (1, 3, 8, 21, 130):
        x, residual = random(rows, shape[1], seed=3), random(rows, shape[0], seed=4)
        seen = x.double() if kind == "float32" else as_rounded(x, kind)
        stored = torch.nn.functional.pad(stored, (0, seen.shape[1] - stored.shape[1]))
        exact = seen @ stored.t() + bias.double()
        sizes = seen.abs() @ stored.abs().t() + bias.abs().double()
        bound = 4 * FLOAT32 * (shape[1] // (1 if kind == "float32" else 32) + 8) * sizes
        assert ((linear(x).double() - exact).abs() <= bound).all(), rows
        total = exact + residual.double()
        bound += 2 * FLOAT32 * residual.abs().double()
        assert ((linear.added(x, residual).double() - total).abs() <= bound).all(), rows


@pytest.mark.parametrize("kind", FORMATS)
def test_rows_do_not_know_of_each_other(library: Library, each_isa: str, kind: str) -> None:
    """Alone or in any batch, by one thread or by several, bit for bit."""
    linear, _ = make_linear(library, kind, random(300, 576), random(300))
    x = random(140, 576, seed=5)
    alone = torch.cat([linear(row[None]) for row in x])
    for count in (*range(2, 30, 3), 70, 140):
        assert torch.equal(linear(x[:count]), alone[:count]), count
        assert torch.equal(linear(x[-count:]), alone[-count:]), count
    torch.set_num_threads(3)
    assert torch.equal(linear(x), alone)
    assert torch.equal(linear(x[:1]), alone[:1])
    torch.set_num_threads(1)


def test_instruction_sets_agree_on_products(library: Library) -> None:
    """Bit for bit: their sums run in the same order."""
    x = random(9, 576, seed=3)
    layers = [make_linear(library, kind, random(100, 576))[0] for kind in FORMATS]
    best = library.isa
    if best == "avx2":
        pytest.skip("this processor has one of them only")
    expected = [layer(x) for layer in layers]
    library.use("avx2")
    found = [layer(x) for layer in layers]
    library.use(best)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


@pytest.mark.parametrize("kind", FORMATS)
def test_extreme_rows_stay_among_themselves(library: Library, kind: str) -> None:
    """Zeros give zeros, what is tiny stays tiny; no NaN or infinity leaves its row or is lost."""
    linear, _ = make_linear(library, kind, random(65, 64))
    x = random(9, 64, seed=3)
    before = linear(x)
    x[1] = 0
    x[2] = 1e-40
    x[4, 5], x[5, 5], x[6, 5] = torch.nan, torch.inf, -torch.inf
    after = linear(x)
    plain = [0, 3, 7, 8]
    assert torch.equal(after[plain], before[plain])
    assert (after[1] == 0).all()
    assert (after[2].abs() < 1e-30).all()
    for row in (4, 5, 6):
        assert not torch.isfinite(after[row]).any()
    assert linear(x[:0]).shape == (0, 65)


def test_int8_weights_are_rounded_by_half_a_step(library: Library) -> None:
    """Of their group's own scale, which is at most a bfloat16 step above the smallest possible."""
    for shape in SHAPES:
        weight = random(*shape)
        values, scales = quantize_q8(weight)
        stored = values.double() * scales.double()[..., None]
        padded = torch.nn.functional.pad(weight, (0, -shape[1] % 32)).view(*scales.shape, 32)
        padded = turned(padded) / 32
        assert ((stored - padded).abs() <= scales[..., None] / 2 * (1 + 1e-5)).all()
        assert int(values.abs().max()) <= 127
        assert (scales <= padded.abs().amax(-1) / 127 * (1 + 2.0**-7) + 1e-29).all()


def test_weights_are_rounded_as_torch_does_it(library: Library, each_isa: str) -> None:
    """To the bit in 8 and in 4 bits: numbers of any size, and on grids that leave levels unused."""
    sizes = torch.logspace(-12, 12, 200)[:, None]
    levels = torch.randint(0, 16, (200, 96), generator=torch.Generator().manual_seed(5))
    used = levels.view(200, 3, 32) % (3 + torch.arange(200)[:, None, None] % 14)
    gridded = used * torch.rand(200, 3, 1).bfloat16() - torch.rand(200, 3, 1).bfloat16()
    flat = torch.full((4, 64), -0.37)
    flat[1], flat[2, 5], flat[3] = 0, 4.0, torch.arange(64) * 1e-38
    for weight in (random(200, 96) * sizes, gridded.float().view(200, 96), flat, random(33, 31)):
        ours, theirs = int4.quantize_weight(weight, library), int4.quantize_weight(weight)
        for name in ("values", "scales", "zeros"):
            assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
        assert ours.error == pytest.approx(theirs.error, rel=1e-5)
        values, scales = library.round_q8(in_groups(weight))
        expected_values, expected_scales = quantize_q8(weight)
        assert torch.equal(values, expected_values) and torch.equal(scales, expected_scales)
    assert int4.quantize_weight(gridded.float().view(200, 96), library).error < 0.01


# --- attention


def shape_of(heads: int, kv_heads: int, head_dim: int, windows: tuple[int, ...]) -> ModelConfig:
    return ModelConfig(
        "llama", 300, heads * head_dim, 64, len(windows), heads, kv_heads, head_dim, 1e-5, 4096,
        False, (), windows=windows,
    )  # fmt: skip


class Sequences:
    """Some sequences over one pool, their keys and values known."""

    def __init__(self, config: ModelConfig, lengths: list[int]) -> None:
        self.config, self.lengths = config, lengths
        blocks = [-(-length // BLOCK_TOKENS) for length in lengths]
        order = torch.randperm(sum(blocks), generator=torch.Generator().manual_seed(9)).tolist()
        self.tables = [[order.pop() for _ in range(count)] for count in blocks]
        heads, kv, size = config.heads, config.kv_heads, config.head_dim
        self.q = [random(n, heads, size, seed=10 + i) for i, n in enumerate(lengths)]
        self.k = [random(n, kv, size, seed=40 + i) / 4 for i, n in enumerate(lengths)]
        self.v = [random(n, kv, size, seed=70 + i) for i, n in enumerate(lengths)]

    def pool(self, dtype: torch.dtype = torch.float32, kv: KvDtype = "auto") -> KvPool:
        return KvPool(self.config, sum(map(len, self.tables)), dtype, kv)

    def attend(
        self, backend: SdpaBackend | NativeBackend, which: list[tuple[int, int, int]], layer: int
    ) -> Tensor:
        """Rows `start` to `stop` of sequence s, for each (s, start, stop), in one step."""
        slots = [
            self.tables[s][p // BLOCK_TOKENS] * BLOCK_TOKENS + p % BLOCK_TOKENS
            for s, start, stop in which
            for p in range(start, stop)
        ]
        starts = np.cumsum([0, *(stop - start for _, start, stop in which)]).tolist()
        batch = AttentionBatch(
            [self.tables[s] for s, _, _ in which],
            [stop for _, _, stop in which],
            starts,
            torch.tensor(slots),
        )
        q, k, v = (
            torch.cat([values[s][start:stop] for s, start, stop in which])
            for values in (self.q, self.k, self.v)
        )
        return backend.prepare(batch)(layer, q, k, v).float()


LIMITS = {"float32": 5e-5, "int8": 2e-3, "bfloat16": 4e-3}
"""Of the largest result: scores go into the hundreds here, results are rounded to the dtype, and a
key whose int8 stands between two may be rounded either way."""

ATTENTION_SHAPES = [
    (9, 3, 64, (0,)),
    (4, 4, 16, (0, 40)),
    (8, 1, 128, (100,)),
    (6, 2, 80, (0,)),
]


@pytest.mark.parametrize("shape", ATTENTION_SHAPES)
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8"])
def test_attention_is_torchs(
    library: Library, each_isa: str, shape: tuple[int, int, int, tuple[int, ...]], kind: str
) -> None:
    """Decoding, chunks and whole prompts in one step, lengths around blocks and spans.

    In bfloat16 keys and values are what the pool holds; queries stay in float32 in the kernels, so
    it is torch's float32 that they are held against.
    """
    config = shape_of(*shape)
    sequences = Sequences(config, [1, 16, 63, 64, 65, 200, 333])
    dtype = torch.bfloat16 if kind == "bfloat16" else torch.float32
    sequences.k = [k.to(dtype).float() for k in sequences.k]
    sequences.v = [v.to(dtype).float() for v in sequences.v]
    kv: KvDtype = "int8" if kind == "int8" else "auto"
    before = [(s, 0, n - 1) for s, n in enumerate(sequences.lengths[:5]) if n > 1]
    before += [(5, 0, 120), (6, 0, 40)]
    step = [(s, n - 1, n) for s, n in enumerate(sequences.lengths[:5])] + [(5, 120, 200)]
    step += [(6, 40, 333)]
    for layer in range(len(shape[3])):
        theirs, ours = sequences.pool(torch.float32, kv), sequences.pool(dtype, kv)
        backends = (SdpaBackend(theirs, config), NativeBackend(library, ours, config))
        for part in (before, step):
            expected, found = (sequences.attend(b, part, layer) for b in backends)
            size = float(expected.abs().max())
            assert float((found - expected).abs().max()) < LIMITS[kind] * size
        if kind != "int8":  # rounding halves may go either way
            assert torch.equal(theirs.tensor.to(dtype), ours.tensor)


@pytest.mark.parametrize("shape", ATTENTION_SHAPES)
def test_attention_does_not_know_how_it_is_asked(
    library: Library, shape: tuple[int, int, int, tuple[int, ...]]
) -> None:
    """Row by row, in chunks or at once, alone or beside others, by one thread or many: bit for bit.

    That is what makes a text the same whatever the batch, the chunks and the cache.
    """
    config = shape_of(*shape)
    sequences = Sequences(config, [70, 260, 131])
    for layer in range(len(shape[3])):
        at_once = [(s, 0, n) for s, n in enumerate(sequences.lengths)]
        whole = sequences.attend(NativeBackend(library, sequences.pool(), config), at_once, layer)
        backend = NativeBackend(library, sequences.pool(), config)
        pieces = {s: [] for s in range(3)}
        for cut in ((0, 7), (7, 8), (8, 70)):
            for s, n in enumerate(sequences.lengths):
                span = (s, cut[0] * n // 70, cut[1] * n // 70)
                pieces[s].append(sequences.attend(backend, [span], layer))
        found = torch.cat([torch.cat(pieces[s]) for s in range(3)])
        assert torch.equal(found, whole)
        last = [(s, n - 1, n) for s, n in enumerate(sequences.lengths)]
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            rows = sequences.attend(backend, last, layer)
            alone = torch.cat([sequences.attend(backend, [one], layer) for one in last])
            ends = np.cumsum(sequences.lengths) - 1
            assert torch.equal(rows, whole[ends]) and torch.equal(alone, rows), threads
        torch.set_num_threads(1)


def test_weights_and_kv_lie_where_large_pages_can_be(library: Library) -> None:
    """In private mappings, from the start of a large page on: shared ones get none by default."""
    linear = NativeLinear.of_int8(library, torch.randn(64, 64), None)
    pool = pages.mapped(1 << 20)
    for address in (linear.matrix.panels, pool.ctypes.data):
        spans = (line.split()[:2] for line in Path("/proc/self/maps").read_text().splitlines())
        kinds = [kind for span, kind in spans if _holds(span, address)]
        assert kinds == ["rw-p"]
    assert pool.ctypes.data % pages.LARGE_PAGE_BYTES == 0


def _holds(span: str, address: int) -> bool:
    first, last = (int(end, 16) for end in span.split("-"))
    return first <= address < last


# --- whole steps


def test_angles_by_position_are_those_of_the_rotary_table() -> None:
    """Bit for bit, whichever of them are made together, for a scaled table too."""
    for rope in (plain(16, 1e4), yarn(24, 1e4, factor=4, original_tokens=64, attention_factor=1.2)):
        table = AngleTable(rope, 700)
        for length in (1, 300, 257, 700):
            table.reach(length)
        places = torch.tensor([0, 1, 255, 256, 300, 699])
        for made, wanted in zip(
            (table.cos, table.sin), Angles(rope, 700, torch.float32)(places), strict=True
        ):
            assert torch.equal(torch.from_numpy(made)[places], wanted[:, 0])


@pytest.mark.parametrize("value", [0.5, float("nan"), float("inf"), float("-inf")])
def test_the_first_highest_logit_is_found_as_numpy_finds_it(
    library: Library, tiny_folder: Path, value: float
) -> None:
    """Also where a weight of the head is no number: then a row has no token."""
    loaded = load_model(tiny_folder, "test", "float32", "none")
    with torch.inference_mode():
        loaded.model.head._panels.view(-1)[7] = value  # type: ignore[union-attr]
    pool = KvPool(loaded.config, 3, torch.float32)
    executor = Executor(loaded.model, attention_over(pool, loaded.config))
    places = np.arange(40)
    ids = np.array(random_tokens(40, 3), np.int64)
    executor.submit(StepInputs(ids, places, places, [[0, 1, 2]], [40], [0, 40], None))
    scored = executor.collect()
    assert isinstance(scored, Scored)
    tokens = scored.logits.argmax(axis=1)
    finite = np.isfinite(scored.logits[np.arange(40), tokens])
    assert scored.tops.tolist() == np.where(finite, tokens, -1).tolist()
    assert finite.all() == np.isfinite(value) or value in (float("inf"), float("-inf"))


def chunks_of(loaded: LoadedModel, tokens: list[int], cuts: list[int], kv: KvDtype) -> Tensor:
    """Logits of all rows, computed in pieces, float32 [N, vocab]."""
    pool = KvPool(loaded.config, -(-len(tokens) // BLOCK_TOKENS), loaded.dtype, kv)
    executor = Executor(loaded.model, attention_over(pool, loaded.config))
    assert executor._program is not None, "this model's steps are one call"
    parts = []
    for start, stop in zip([0, *cuts], [*cuts, len(tokens)], strict=True):
        places = np.arange(start, stop)
        ids = np.array(tokens[start:stop], np.int64)
        table = list(range(pool.blocks))
        inputs = StepInputs(ids, places, places, [table], [stop], [0, stop - start], None)
        parts.append(executor.forward(inputs))
    return torch.cat([part for part in parts if part is not None])


@pytest.mark.parametrize("mode", ["none", "int8", "int4"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_chunks_cannot_be_told_from_the_whole(
    library: Library, tiny_folder: Path, mode: str, dtype: str
) -> None:
    """Logits bit for bit, in every mode that is one native call."""
    if mode == "none" and dtype == "bfloat16":
        pytest.skip("multiplied by oneDNN")
    loaded = load_model(tiny_folder, "test", dtype, mode)
    tokens = random_tokens(150, 3)
    for kv in ("auto", "int8"):
        whole = chunks_of(loaded, tokens, [], kv)
        assert torch.equal(chunks_of(loaded, tokens, [1, 40, 41, 42, 100, 149], kv), whole)


@pytest.mark.parametrize("mode", ["none", "int8", "int4"])
@pytest.mark.parametrize(
    "rows", [[149], [0], [3, 70, 149], [149, 2, 2], [5] * 170, list(range(150))[::-1], []]
)
def test_the_rows_that_go_on_are_what_they_are_among_all(
    library: Library, tiny_folder: Path, mode: str, rows: list[int]
) -> None:
    """Bit for bit, in any order, some twice, or none; what the others leave is the same KV."""
    loaded = load_model(tiny_folder, "test", "float32", mode)
    tokens, places = random_tokens(150, 3), np.arange(150)
    pool = KvPool(loaded.config, 10, loaded.dtype)
    executor = Executor(loaded.model, attention_over(pool, loaded.config))
    ids, table = np.array(tokens, np.int64), [list(range(10))]
    inputs = StepInputs(ids, places, places, table, [150], [0, 150], np.array(rows, np.int64))
    logits = executor.forward(inputs)
    whole_pool = KvPool(loaded.config, 10, loaded.dtype)
    whole = Executor(loaded.model, attention_over(whole_pool, loaded.config)).forward(
        StepInputs(ids, places, places, table, [150], [0, 150], None)
    )
    assert whole is not None
    if rows:
        assert logits is not None and torch.equal(logits, whole[rows])
    else:
        assert logits is None
    for block in range(10):
        assert pool.export_block(block) == whole_pool.export_block(block)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"attention_bias": True, "mlp_bias": True},
        {"num_key_value_heads": 1},
        {"num_key_value_heads": 4, "tie_word_embeddings": True},
    ],
)
def test_a_step_is_what_torch_computes(
    library: Library, tmp_path: Path, changes: dict[str, object]
) -> None:
    """In float32, to 1e-4 of the logits; see test_architectures.py for the other families."""
    write_hf_folder(tmp_path, **changes)
    tokens = random_tokens(150, 3)
    found = logits_of(load_model(tmp_path, "test", "float32"), tokens)
    native.choose("off")
    expected = logits_of(load_model(tmp_path, "test", "float32"), tokens)
    native.choose("auto")
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", ["int8", "int4"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_key_value_heads": 4},  # a KV head's columns are half a group
        {"intermediate_size": 80},  # the last group of the gates is half a group
    ],
)
def test_what_is_rounded_at_once_is_what_layers_round(
    library: Library, tmp_path: Path, mode: str, changes: dict[str, object]
) -> None:
    """A step rounds where numbers are made, layer by layer they are rounded as a whole.

    Norms sum in another order there, so a number on the edge may be rounded the other way: 2 % of
    the largest logit. Few rows and many give the same, bit for bit.
    """
    write_hf_folder(tmp_path, **changes)
    loaded = load_model(tmp_path, "test", "float32", mode)
    tokens = random_tokens(90, 3)
    whole = chunks_of(loaded, tokens, [], "auto")
    assert torch.equal(chunks_of(loaded, tokens, [1, 3, 6, 50, 89], "auto"), whole)
    places = torch.arange(len(tokens))
    pool = KvPool(loaded.config, -(-len(tokens) // BLOCK_TOKENS), loaded.dtype)
    batch = AttentionBatch([list(range(pool.blocks))], [len(tokens)], [0, len(tokens)], places)
    with torch.inference_mode():
        attend = attention_over(pool, loaded.config).prepare(batch)
        expected = loaded.model(torch.tensor(tokens), places, places, attend)
    assert float((whole - expected).abs().max()) < 0.02 * float(expected.abs().max())


def test_texts_are_the_same_whatever_the_batch_in_int8(library: Library, tiny_folder: Path) -> None:
    """Quantized too: alone, together, preempted by a small pool, with cached prefixes."""
    loaded = load_model(tiny_folder, "test", "bfloat16", "int8")
    prompts = [random_tokens(20 + 13 * i, i) for i in range(6)]

    def jobs(name: str) -> list:
        return [make_job(f"{name}{i}", p, max_tokens=30) for i, p in enumerate(prompts)]

    expected = [
        finish_all(make_engine(loaded, 1024), [job]).tokens[job.id] for job in jobs("alone")
    ]
    engine = make_engine(loaded, 1024, max_running=6, step_tokens_max=48)
    for name in ("cold", "warm"):
        out = finish_all(engine, jobs(name))
        assert [out.tokens[f"{name}{i}"] for i in range(6)] == expected, name
    tight = finish_all(make_engine(loaded, 256, max_running=6, step_tokens_max=32), jobs("tight"))
    assert [tight.tokens[f"tight{i}"] for i in range(6)] == expected


def test_without_kernels_everything_runs_on_torch(torch_alone: None, tiny_folder: Path) -> None:
    """`off`: the models, the backend and the executor are torch's, and texts are exact as ever."""
    assert native.library() is None and native.state() == "off"
    loaded = load_model(tiny_folder, "test", "float32")
    pool = KvPool(loaded.config, 4, loaded.dtype)
    assert isinstance(attention_over(pool, loaded.config), SdpaBackend)
    assert Executor(loaded.model, attention_over(pool, loaded.config))._program is None
    prompts = [random_tokens(20 + 13 * i, i) for i in range(4)]
    off = finish_all(
        make_engine(loaded, 1024, max_running=4),
        [make_job(f"{i}", prompt, max_tokens=20) for i, prompt in enumerate(prompts)],
    )
    native.choose("auto")
    on = finish_all(
        make_engine(load_model(tiny_folder, "test", "float32"), 1024),
        [make_job(f"{i}", prompt, max_tokens=20) for i, prompt in enumerate(prompts)],
    )
    assert on.tokens == off.tokens


def test_many_engines_take_turns(library: Library, tiny_folder: Path) -> None:
    """Calls from several threads, with different numbers of threads, do not disturb each other."""
    loaded = load_model(tiny_folder, "test", "float32", "int8")
    tokens = random_tokens(90, 3)
    expected = chunks_of(loaded, tokens, [50], "auto")

    def one(number: int) -> bool:
        torch.set_num_threads(1 + number % 3)
        return all(torch.equal(chunks_of(loaded, tokens, [50], "auto"), expected) for _ in range(5))

    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(one, range(8)))
    torch.set_num_threads(1)


def test_packed_weights_take_the_bytes_that_are_claimed(
    library: Library, tiny_folder: Path
) -> None:
    """8.5 bits a weight and 5, in panels of 16 rows; the head has 300 rows, which are 304 then."""
    plain, head = 300 * 64 + 7 * 64, 304 * 64
    q_k_v, out, gate_up, down = 128 * 64, 64 * 64, 192 * 64, 96 * 64
    layers = 3 * (q_k_v + out + gate_up + down)

    def bytes_of(mode: str) -> int:
        return load_model(tiny_folder, "test", "float32", mode).weight_bytes - 4 * plain

    assert bytes_of("none") == 4 * (layers + head)
    assert bytes_of("int8") == (layers + head) * 17 // 16
    spared = 3 * (q_k_v + gate_up) + head
    assert bytes_of("int4") == spared * 17 // 16 + 3 * (out + down) * 5 // 8


# --- building


def test_no_compiler_is_no_disaster(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_folder: Path
) -> None:
    """The reason is kept for the log and the status, and torch computes."""
    monkeypatch.setenv("HEADRACE_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    native.choose("auto")
    try:
        assert native.library() is None
        assert "compiler" in native.state() or "processors" in native.state()
        assert logits_of(load_model(tiny_folder, "test", "float32"), [1, 2, 3]).shape == (3, 300)
    finally:
        monkeypatch.undo()
        native.choose("auto")


def test_a_source_that_does_not_compile_says_why(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, library: Library
) -> None:
    """And leaves nothing behind that a later start could take for a library."""
    source = tmp_path / "csrc"
    source.mkdir()
    (source / "broken.cpp").write_text("int headrace_abi_version( {")
    monkeypatch.setenv("HEADRACE_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(build, "SOURCE", source)
    with pytest.raises(build.BuildError, match=r"compiling failed: .*broken\.cpp"):
        build.built()
    assert [p.name for p in (tmp_path / "cache" / "kernels").iterdir()] == [".headrace.lock"]


def test_two_starts_at_once_compile_once(tmp_path: Path, library: Library) -> None:
    """Whole or not there: the second waits for the first and takes what it made."""
    counter = tmp_path / "compiler"
    counter.write_text(f'#!/bin/sh\necho x >> {tmp_path}/calls\nexec g++ "$@"\n')
    counter.chmod(0o755)
    source = tmp_path / "csrc"
    source.mkdir()
    shown = '__attribute__((visibility("default")))'
    (source / "one.cpp").write_text(
        f'extern "C" {shown} int headrace_abi_version() {{ return 7; }}'
    )
    script = (
        "import pathlib, sys\n"
        "from headrace_worker.native import build\n"
        f"build.SOURCE = pathlib.Path({str(source)!r})\n"
        "print(build.built())\n"
    )
    paths = ":".join(filter(None, sys.path))
    environment = {
        "CXX": str(counter), "HEADRACE_CACHE_DIR": str(tmp_path / "cache"), "PYTHONPATH": paths,
        "PATH": "/usr/bin:/bin",
    }  # fmt: skip
    running = [
        subprocess.Popen(
            [sys.executable, "-c", script], env=environment, stdout=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    found = {process.communicate(timeout=120)[0].strip() for process in running}
    assert len(found) == 1 and Path(found.pop()).exists()
    assert (tmp_path / "calls").read_text().count("x") == 2  # compiled and linked, once
    with pytest.raises(OSError, match="ABI 7"):
        Library(next((tmp_path / "cache" / "kernels").glob("*.so")))
