"""The flash backend, whole engine and all, over functions that do what flash-attn documents.

No GPU is here: what is tested is everything up to the calls and after them, on a CPU, in float32,
against the SDPA backend. Tests marked `gpu` run flash-attn itself where there is one.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from headrace.errors import ModelError, SettingsError
from headrace.types import Band
from headrace_worker import native
from headrace_worker.attention import choice
from headrace_worker.attention.buckets import bucket_for, buckets_up_to, fill
from headrace_worker.attention.choice import Wanted, make_attention
from headrace_worker.attention.flash import FlashBackend, page_tables
from headrace_worker.attention.flash_kernels import Kernels, Look, find_kernels
from headrace_worker.attention.interface import AttentionBackend, AttentionBatch
from headrace_worker.attention.sdpa import SdpaBackend
from headrace_worker.decode_graphs import DecodeGraphs
from headrace_worker.device import collectives_for, resolve_device
from headrace_worker.engine import Engine
from headrace_worker.executor import Executor
from headrace_worker.kv.paged import PagedKvPool
from headrace_worker.kv.pool import KvPool
from headrace_worker.loading import LoadedModel, load_model
from headrace_worker.loading.hf_config import read_config
from headrace_worker.loading.load import resolve_dtype, resolve_quantization
from headrace_worker.model import ARCHITECTURES
from headrace_worker.model.linear import DenseEmbedding, DenseLinear, Embedding
from headrace_worker.policy.speculation import Guesser
from headrace_worker.step_inputs import StepInputs
from worker import flash_reference
from worker.builders import (
    TINY,
    Output,
    finish_all,
    guesses_from,
    make_engine,
    make_job,
    random_tokens,
    take_export,
    tiny_tokenizer,
)

CPU = torch.device("cpu")
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 37, "head_dim": 24},
    "gemma3_text": {
        "head_dim": 16,
        "query_pre_attn_scalar": 24,
        "sliding_window": 21,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "num_key_value_heads": 1,
    },
}
"""Plain; a window on every layer; windows on some, another scale, one KV head."""


def build(folder: Path, kind: str, **changes: Any) -> LoadedModel:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(11)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **(TINY | changes))).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.1) if parameter.ndim > 1 else parameter.uniform_(0.5, 1.5)
    model.save_pretrained(folder)
    tiny_tokenizer().save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|end|>"}))
    return load_model(folder, "test", "float32")


@pytest.fixture(scope="module", autouse=True)
def torch_alone() -> Iterator[None]:
    """Nothing here computes with the native kernels, as nothing on a GPU does."""
    native.choose("off")
    yield
    native.choose("auto")


@pytest.fixture(scope="module")
def tiny(tiny_folder: Path) -> LoadedModel:
    return load_model(tiny_folder, "test", "float32")


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> dict[str, LoadedModel]:
    return {
        kind: build(tmp_path_factory.mktemp(kind), kind, **changes)
        for kind, changes in FAMILIES.items()
    }


@pytest.fixture
def flash(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Kernels:
    """Engines that are told `flash` compute with the reference functions of one version.

    Of version 2, whose pages hold several blocks, unless a test asks for another.
    """
    kernels = flash_reference.VERSIONS[getattr(request, "param", "2")]()
    monkeypatch.setattr(choice, "find_kernels", lambda: ([kernels], []))
    flash_reference.calls.clear()
    return kernels


every_version = pytest.mark.parametrize("flash", sorted(flash_reference.VERSIONS), indirect=True)
both_page_sizes = pytest.mark.parametrize("flash", ["2", "3"], indirect=True)


def both(
    loaded: LoadedModel, run: Callable[[Engine], Output], **limits: Any
) -> tuple[Output, Output]:
    """What `run` gives over SDPA and over flash-attn."""
    engines = [make_engine(loaded, attention=name, **limits) for name in ("sdpa", "flash")]
    plain, ours = (run(engine) for engine in engines)
    pool = engines[1]._kv
    assert isinstance(pool, PagedKvPool)
    pool.check_integrity()
    assert ours.tokens == plain.tokens
    assert ours.finishes == plain.finishes
    return plain, ours


LENGTHS = (5, 16, 70, 255, 256, 300)
"""Around blocks and pages, and beyond all windows."""


@every_version
@pytest.mark.parametrize("kind", FAMILIES)
def test_greedy_text_is_that_of_sdpa(
    flash: Kernels, families: dict[str, LoadedModel], kind: str
) -> None:
    """Six prompts at once, in chunks of at most 64 tokens, past each other's pages."""
    jobs = [make_job(str(n), random_tokens(n, n), max_tokens=12) for n in LENGTHS]
    both(families[kind], lambda engine: finish_all(engine, jobs), step_tokens_max=64)
    used = {"flash-attn 2": 2, "flash-attn 3": 2, "flash-attn 4": 1}
    assert len(set(flash_reference.calls)) == used.get(flash.name, 0)


@every_version
@pytest.mark.parametrize("kind", FAMILIES)
def test_logits_are_those_of_sdpa(
    flash: Kernels, families: dict[str, LoadedModel], kind: str
) -> None:
    """Of two sequences, in uneven chunks and single rows, to 1e-4."""
    loaded = families[kind]
    pool = make_attention(loaded.model, loaded.config, loaded.dtype, Wanted(64, name="flash"))
    plain = KvPool(loaded.config, 64, loaded.dtype)
    backends: list[AttentionBackend] = [SdpaBackend(plain, loaded.config), pool.backend]
    texts = [random_tokens(330, 1), random_tokens(330, 2)]
    tables = [list(range(0, 42, 2)), list(range(1, 43, 2))]
    done = [0, 0]
    with torch.inference_mode():
        for counts in ((100, 7), (1, 1), (60, 200), (1, 40), (3, 1), (1, 1), (90, 1)):
            logits = [step_logits(loaded, each, texts, tables, done, counts) for each in backends]
            torch.testing.assert_close(logits[1], logits[0], rtol=1e-4, atol=1e-4)
            done = [d + c for d, c in zip(done, counts, strict=True)]


def step_logits(
    loaded: LoadedModel,
    backend: AttentionBackend,
    texts: list[list[int]],
    tables: list[list[int]],
    done: list[int],
    counts: tuple[int, ...],
) -> Tensor:
    tokens, positions, slots, starts = [], [], [], [0]
    for text, table, start, count in zip(texts, tables, done, counts, strict=True):
        span = range(start, start + count)
        tokens += text[start : start + count]
        positions += span
        slots += [table[p // 16] * 16 + p % 16 for p in span]
        starts.append(len(tokens))
    lengths = [start + count for start, count in zip(done, counts, strict=True)]
    attend = backend.prepare(AttentionBatch(tables, lengths, starts, torch.tensor(slots)))
    return loaded.model(torch.tensor(tokens), torch.tensor(positions), None, attend)


def test_a_shared_prefix_is_found_and_parts_within_a_page(
    flash: Kernels, tiny: LoadedModel
) -> None:
    """The second and third prompt go on from 270 cached tokens, each its own way, at once."""
    prefix = random_tokens(272, 5)
    rest = [make_job(n, prefix + random_tokens(20, i), max_tokens=30) for i, n in enumerate("bc")]

    def run(engine: Engine) -> Output:
        finish_all(engine, [make_job("a", [*prefix, 7], max_tokens=2)])
        return finish_all(engine, rest)

    plain, ours = both(tiny, run)
    assert ours.cached == plain.cached == {"b": 272, "c": 272}


def test_preempted_sequences_come_back_to_the_same_text(flash: Kernels, tiny: LoadedModel) -> None:
    """Six sequences over room for three of them: blocks change hands again and again."""
    jobs = [make_job(str(i), random_tokens(90, i), max_tokens=40, arrived_ms=i) for i in range(6)]
    _, ours = both(tiny, lambda engine: finish_all(engine, jobs), kv_tokens=400, max_running=6)
    assert sum(story.preemptions for story in ours.stories.values()) > 0


def test_guessed_tokens_are_computed_as_without(
    flash: Kernels, tiny: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several rows of a sequence that decodes, some of them wrong and written over."""
    prompts = [random_tokens(250, 3), random_tokens(40, 4)]
    jobs = [make_job(str(i), p, max_tokens=40) for i, p in enumerate(prompts)]
    said = finish_all(make_engine(tiny), jobs).tokens
    texts = [p + said[str(i)] for i, p in enumerate(prompts)]
    monkeypatch.setattr(Guesser, "guess", guesses_from(texts))
    _, ours = both(tiny, lambda engine: finish_all(engine, jobs))
    assert ours.tokens == said and ours.steps < 40


def test_bands_and_batches_mix(flash: Kernels, tiny: LoadedModel) -> None:
    jobs = [
        make_job(f"{i}", random_tokens(20 + 37 * i, i), max_tokens=5 + i, band=Band(i % 3))
        for i in range(7)
    ]
    both(tiny, lambda engine: finish_all(engine, jobs), step_tokens_max=48, max_running=4)


def test_more_partings_than_pages_are_computed_all_the_same(
    flash: Kernels, tiny: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twelve sequences that part within one page, and two pages to spare."""
    usual = choice._paged

    def tight(config: Any, dtype: Any, wanted: Wanted, device: Any, kernels: Kernels) -> Any:
        narrow = Wanted(wanted.blocks, running_max=2)
        return usual(config, dtype, narrow, device, kernels)

    monkeypatch.setattr(choice, "_paged", tight)
    prefix = random_tokens(112, 5)
    jobs = [make_job(str(i), prefix + random_tokens(5, i), max_tokens=20) for i in range(12)]

    def run(engine: Engine) -> Output:
        finish_all(engine, [make_job("first", [*prefix, 1], max_tokens=1)])
        return finish_all(engine, jobs)

    both(tiny, run, kv_tokens=640)


@both_page_sizes
def test_blocks_go_from_one_kind_of_pool_to_the_other(flash: Kernels, tiny: LoadedModel) -> None:
    """What either exports is the same bytes to float32's last digits, and either imports it."""
    prompt = random_tokens(100, 8)
    job = make_job("a", prompt, max_tokens=4)
    engines = [make_engine(tiny, attention=name) for name in ("sdpa", "flash")]
    outs = [finish_all(engine, [job]) for engine in engines]
    assert engines[0].layout == engines[1].layout
    assert outs[0].blocks.keys() == outs[1].blocks.keys() and len(outs[0].blocks) == 6
    for block_hash, payload in outs[0].blocks.items():
        ours, theirs = (np.frombuffer(out.blocks[block_hash].data, np.float32) for out in outs)
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)
        assert payload.parent == outs[1].blocks[block_hash].parent
    for name, given_blocks in (("flash", outs[0].blocks), ("sdpa", outs[1].blocks)):
        other = make_engine(tiny, attention=name)
        other.add(job, imported=given_blocks.values())
        got = finish_all(other)
        assert got.cached == {"a": 96} and got.tokens == outs[0].tokens


def test_an_export_outlives_the_block_that_it_is_of(flash: Kernels, tiny: LoadedModel) -> None:
    """Blocks are handed out again while the cache service has not taken them yet."""
    engine = make_engine(tiny, kv_tokens=320, attention="flash")
    for job in (make_job("a", random_tokens(100, 1), max_tokens=1),):
        engine.add(job)
    exports = []
    while engine.has_work:
        exports += engine.step().blocks
    expected = [take_export(e).data for e in finish_exports(tiny, 1)]
    finish_all(engine, [make_job("b", random_tokens(300, 2), max_tokens=4)])
    assert [bytes(take_export(export).data) for export in exports] == expected


def finish_exports(tiny: LoadedModel, seed: int) -> list[Any]:
    engine = make_engine(tiny, attention="flash")
    engine.add(make_job("a", random_tokens(100, seed), max_tokens=1))
    exports = []
    while engine.has_work:
        exports += engine.step().blocks
    return exports


@both_page_sizes
def test_what_is_not_finite_is_not_imported(flash: Kernels, tiny: LoadedModel) -> None:
    pool = PagedKvPool(
        tiny.config, 20, tiny.dtype, page_tokens=flash.page_tokens, spare_pages=1, device=CPU
    )
    good = np.ones(pool.payload_bytes // 4, np.float32)
    pool.import_block(3, good.tobytes())
    assert pool.export_block(3) == good.tobytes()
    bad = good.copy()
    bad[5] = np.nan
    with pytest.raises(ValueError, match="finite"):
        pool.import_block(3, bad.tobytes())
    with pytest.raises(ValueError):
        pool.import_block(4, b"short")
    pool.check_integrity()


# --- what is refused


def refused(loaded: LoadedModel, device: torch.device = CPU, **wanted: Any) -> str:
    with pytest.raises(SettingsError) as caught:
        make_attention(loaded.model, loaded.config, loaded.dtype, Wanted(64, **wanted), device)
    return caught.value.message


def test_flash_on_a_machine_without_it_says_what_is_missing(tiny: LoadedModel) -> None:
    told = refused(tiny, name="flash")
    assert "HEADRACE_ATTENTION=flash: no flash-attn that works here" in told
    assert "flash-attn 2: No module named 'flash_attn'" in told


def test_int8_blocks_are_refused_with_the_reason(flash: Kernels, tiny: LoadedModel) -> None:
    told = refused(tiny, name="flash", kv_dtype="int8")
    assert told == refused(tiny, kv_dtype="int8", device=torch.device("cuda", 0))
    assert "HEADRACE_KV_DTYPE=int8: flash-attn reads keys and values in the model's dtype" in told


def test_each_limit_of_the_kernels_is_told(flash: Any, tiny: LoadedModel) -> None:
    flash.dtypes = (torch.bfloat16,)
    assert "computes in bfloat16, not in float32" in refused(tiny, name="flash")
    flash.dtypes, flash.head_dim_max = (torch.float32,), 8
    assert "heads of 16 numbers, 8 at most" in refused(tiny, name="flash")
    flash.head_dim_max, flash.devices = 256, ("cuda",)
    assert "computes on cuda, not on cpu" in refused(tiny, name="flash")


def test_odd_heads_are_refused(flash: Kernels, tmp_path: Path) -> None:
    loaded = build(tmp_path, "llama", head_dim=20)
    assert "heads of 20 numbers: flash-attn wants a multiple of 8" in refused(loaded, name="flash")


def test_a_cpu_takes_sdpa_by_itself(flash: Kernels, tiny: LoadedModel) -> None:
    machine = make_attention(tiny.model, tiny.config, tiny.dtype, Wanted(64))
    assert isinstance(machine.backend, SdpaBackend) and machine.graphs is None


def test_devices_are_refused_by_name() -> None:
    assert resolve_device("cpu") == CPU
    for name in ("tpu", "cuda:x", "mps"):
        with pytest.raises(ModelError, match="none of auto, cpu, cuda"):
            resolve_device(name)
    if not torch.cuda.is_available():
        assert resolve_device("auto") == CPU
        with pytest.raises(ModelError, match="HEADRACE_DEVICE=cuda"):
            resolve_device("cuda")
    assert collectives_for(torch.device("cuda")) == "nccl" and collectives_for(CPU) == "gloo"


def test_a_gpu_takes_bfloat16_and_no_kernels_of_cpus() -> None:
    gpu = torch.device("cuda", 0)
    assert resolve_dtype("auto", gpu) is torch.bfloat16
    for mode in ("int8", "int4"):
        with pytest.raises(ModelError, match="kernels for CPUs"):
            resolve_quantization(mode, gpu)


# --- graphs


@given(st.integers(1, 2000), st.integers(1, 2000))
def test_every_step_has_the_smallest_bucket_that_holds_it(running_max: int, count: int) -> None:
    buckets = buckets_up_to(running_max)
    assert list(buckets) == sorted(set(buckets)) and buckets[-1] == min(running_max, 512)
    bucket = bucket_for(count, buckets)
    assert bucket == min((size for size in buckets if size >= count), default=None)
    if bucket is not None and 16 < count <= min(running_max, 512):
        assert bucket - count < 16, "padding stays small"


@given(st.lists(st.integers(1, 900), min_size=1, max_size=9), st.integers(0, 7))
def test_padding_reads_and_writes_a_page_of_nobody(lengths: list[int], more: int) -> None:
    count, bucket = len(lengths), len(lengths) + more
    tables = page_tables([range(-(-length // 256)) for length in lengths])
    numbers = list(range(count))
    filled = fill(
        bucket, numbers, numbers, numbers, lengths, tables, padding_page=99, page_tokens=256
    )
    assert filled.lengths[:count].tolist() == lengths and set(filled.lengths[count:]) <= {1}
    assert (filled.tables[count:] == 99).all() and (filled.slots[count:] == 99 * 256).all()
    assert np.array_equal(np.diff(filled.starts), filled.lengths)
    assert (filled.tables[:count] == tables).all() and filled.slots[:count].tolist() == numbers


class Recorded(TorchDispatchMode):
    """Records calls of operators on tensors, to repeat them over the same memory: a CUDA graph."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out

    def replay(self) -> None:
        with torch.inference_mode():
            for func, args, kwargs, out in self.calls:
                again = func(*args, **kwargs)
                for old, new in zip(_tensors(out), _tensors(again), strict=True):
                    if old.data_ptr() != new.data_ptr():
                        old.copy_(new)


def _tensors(out: Any) -> list[Tensor]:
    if isinstance(out, Tensor):
        return [out]
    return [t for t in out if isinstance(t, Tensor)] if isinstance(out, tuple | list) else []


class CallRecorder:
    """A Recorder without a GPU."""

    def __init__(self) -> None:
        self.recordings: list[int] = []

    def record(self, run: Callable[[], Tensor]) -> tuple[Callable[[], object], Tensor]:
        mode = Recorded()
        with mode:
            out = run()
        self.recordings.append(len(out))
        return mode.replay, out


def recorded_engine(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch, **limits: Any
) -> tuple[Engine, CallRecorder]:
    engine = make_engine(loaded, attention="flash", **limits)
    executor: Any = engine._runner._steps
    recorder = CallRecorder()
    backend = executor._backend
    assert isinstance(backend, FlashBackend)
    buckets = buckets_up_to(limits.get("max_running", 64))
    executor._graphs = DecodeGraphs(
        loaded.model, backend, buckets, loaded.config.context_tokens, recorder
    )
    return engine, recorder


@pytest.mark.parametrize("kind", FAMILIES)
def test_replayed_decode_steps_give_the_same_text(
    flash: Kernels,
    families: dict[str, LoadedModel],
    kind: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Five streams that end one after the other: buckets of 8, 4, 2 and 1, each recorded once."""
    loaded = families[kind]
    jobs = [make_job(str(i), random_tokens(10 + 60 * i, i), max_tokens=6 + 4 * i) for i in range(5)]
    plain = finish_all(make_engine(loaded, speculation=False), jobs)
    engine, recorder = recorded_engine(loaded, monkeypatch, speculation=False)
    out = finish_all(engine, jobs)
    assert out.tokens == plain.tokens
    assert sorted(recorder.recordings) == [1, 2, 4, 8]
    assert out.steps > 3 * len(recorder.recordings), "most steps are replays"


def test_a_mixture_of_experts_is_computed_without_recording(
    flash: Kernels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = build(tmp_path, "mixtral", num_local_experts=4, num_experts_per_tok=2)
    engine, recorder = recorded_engine(loaded, monkeypatch)
    jobs = [make_job("a", random_tokens(30, 1), max_tokens=5)]
    assert finish_all(engine, jobs).tokens == finish_all(make_engine(loaded), jobs).tokens
    assert not recorder.recordings


# --- everything on one device, without one


class EmptyWeights:
    """Weights of the right shapes on a device, without numbers."""

    dtype = torch.bfloat16

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def take(self, name: str, shape: tuple[int, ...]) -> Tensor:
        return torch.empty(shape, dtype=self.dtype, device=self._device)

    def linear(self, names: Any, outs: Any, columns: int, *, bias: bool = False) -> DenseLinear:
        weight = torch.empty(sum(outs), columns, dtype=self.dtype, device=self._device)
        return DenseLinear(weight, weight[:, 0] if bias else None)

    def embedding(self, name: str, shape: tuple[int, int]) -> Embedding:
        return DenseEmbedding(self.take(name, shape))

    def router(self, name: str, shape: tuple[int, int]) -> DenseLinear:
        return DenseLinear(self.take(name, shape))

    def tied_head(self, embedding: Tensor) -> DenseLinear:
        return DenseLinear(embedding)

    def total(self, x: Tensor) -> Tensor:
        return x


class ShapeKernels:
    """Kernels that look at devices and shapes only."""

    name, head_dim_max = "shapes", 256
    capabilities = (9,)
    devices, dtypes = ("meta",), (torch.bfloat16,)

    def __init__(self, page_tokens: int) -> None:
        self.page_tokens = page_tokens

    def _mixed(self, q: Tensor, *others: Tensor) -> Tensor:
        assert {each.device.type for each in (q, *others)} == {"meta"}
        return torch.empty_like(q)

    def decode(self, q: Tensor, cached: Any, look: Look) -> Tensor:
        return self._mixed(q, cached.keys, cached.tables, cached.lengths)

    def recorded(self, q: Tensor, cached: Any, rows: Any, look: Look) -> Tensor:
        return self.decode(q, cached, look)

    def prefill(self, q: Tensor, cached: Any, rows: Any, look: Look) -> Tensor:
        return self._mixed(q, cached.keys, cached.tables, cached.starts, rows.starts)

    def packed(self, q: Tensor, k: Tensor, v: Tensor, cached: Any, rows: Any, look: Look) -> Tensor:
        return self._mixed(q, k, v, cached.starts, rows.starts)


@pytest.mark.parametrize(("kind", "page_tokens"), [("llama", 256), ("gemma3_text", 16)])
def test_all_of_a_step_is_on_its_device(kind: str, page_tokens: int) -> None:
    """On the device `meta`, which mixes with no other: a prefill step, then one that decodes."""
    config = read_config(TINY | FAMILIES[kind] | {"model_type": kind}).model
    meta = torch.device("meta")
    model = ARCHITECTURES[kind](config, EmptyWeights(meta))
    pool = PagedKvPool(
        config, 40, torch.bfloat16, page_tokens=page_tokens, spare_pages=2, device=meta
    )
    executor = Executor(model, FlashBackend(pool, config, ShapeKernels(page_tokens)), meta)
    for counts, done in (((300, 1), (0, 0)), ((1, 1), (300, 1))):
        logits = executor.forward(two_sequences(counts, done))
        assert logits is not None and logits.device == meta
        assert logits.shape == (2, config.vocab_size)


def two_sequences(counts: tuple[int, int], done: tuple[int, int]) -> StepInputs:
    """A step that computes so many rows of each of two sequences."""
    tables = [list(range(20)), list(range(20, 40))]
    spans = [range(d, d + c) for d, c in zip(done, counts, strict=True)]
    slots = [t[p // 16] * 16 + p % 16 for t, s in zip(tables, spans, strict=True) for p in s]
    return StepInputs(
        tokens=np.zeros(sum(counts), np.int64),
        positions=np.array([p for span in spans for p in span]),
        slots=np.array(slots),
        block_tables=tables,
        lengths=[span.stop for span in spans],
        query_starts=[0, counts[0], sum(counts)],
        rows=np.array([counts[0] - 1, sum(counts) - 1]),
    )


# --- on hardware

needs_gpu = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no NVIDIA GPU here: flash-attn itself has not run"
)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("kind", FAMILIES)
def test_flash_attn_itself_gives_the_text_of_sdpa(tmp_path: Path, kind: str) -> None:
    """In bfloat16, whole engine, graphs on: most tokens agree with the CPU's."""
    found, missing = find_kernels()
    if not found:
        pytest.skip("; ".join(missing))
    build(tmp_path, kind, **(FAMILIES[kind] | {"head_dim": 64}))
    gpu = load_model(tmp_path, "test", "bfloat16", device=torch.device("cuda", 0))
    cpu = load_model(tmp_path, "test", "bfloat16")
    jobs = [make_job(str(n), random_tokens(n, n), max_tokens=12) for n in LENGTHS]
    engine = make_engine(gpu, attention="flash")
    ours, theirs = finish_all(engine, jobs).tokens, finish_all(make_engine(cpu), jobs).tokens
    same = sum(a == b for n in ours for a, b in zip(ours[n], theirs[n], strict=True))
    assert same >= 0.8 * 12 * len(LENGTHS)
    graphs: Any = engine._runner._steps
    assert graphs._graphs is not None and not graphs._graphs.refusal


@pytest.mark.gpu
@needs_gpu
def test_blocks_pass_through_pinned_memory(tmp_path: Path) -> None:
    build(tmp_path, "llama")
    loaded = load_model(tmp_path, "test", "bfloat16", device=torch.device("cuda", 0))
    pool = PagedKvPool(
        loaded.config, 40, loaded.dtype, page_tokens=256, spare_pages=2, device=loaded.device
    )
    payload = np.random.default_rng(1).integers(0, 100, pool.payload_bytes, np.uint8).tobytes()
    pool.import_block(7, payload)
    assert pool._staging.pinned and pool.export_block(7) == payload
