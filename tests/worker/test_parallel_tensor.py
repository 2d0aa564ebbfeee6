"""Tensor parallel: N ranks compute what one process does, with parts of the same files.

Ranks are threads here, over the memory that processes share; see test_parallel_ranks.py for these.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize

from headrace.errors import ModelError
from headrace_worker import native
from headrace_worker.loading import LoadedModel, gguf_file, load_model
from headrace_worker.loading.gguf_file import TYPES, GgufSource
from headrace_worker.native.linear import GROUP, NativeLinear
from headrace_worker.parallel.collective import Counts, SharedGroup, minimal_bytes
from headrace_worker.parallel.shape import Shape, part_of, run_of
from headrace_worker.quantization import Role, make_linear
from worker.builders import logits_of, random_tokens, write_gguf, write_hf_folder
from worker.gguf_models import FAMILIES, write_family
from worker.ranks import together
from worker.test_architectures import (
    VOCAB,
    config_of,
    gemma3_text,
    llama,
    mixtral,
    phi3,
    qwen2,
    qwen3_moe,
    write_model,
)
from worker.test_gguf import random_blocks

HEADS = {"num_attention_heads": 8, "num_key_value_heads": 2}
CASES: dict[str, tuple[Callable[[], Any], tuple[int, ...]]] = {
    "llama": (lambda: llama(**HEADS, attention_bias=True, mlp_bias=True), (2, 4, 8)),
    "llama of uneven parts": (lambda: llama(num_key_value_heads=3), (2, 3)),
    "qwen2": (qwen2, (3,)),
    "qwen3_moe": (lambda: qwen3_moe(**HEADS), (2, 4)),
    "mixtral": (mixtral, (4,)),
    "gemma3": (lambda: gemma3_text(**HEADS), (2, 4)),
    "phi3 of fused matrices": (lambda: phi3(4), (2,)),
}


def load_part(folder: Path, group: SharedGroup | None, ranks: int, **options: Any) -> LoadedModel:
    shape = Shape(tensor=ranks)
    rank = 0 if group is None else group.rank
    return load_model(
        folder, "test", part=lambda config: part_of(config, shape, rank), group=group, **options
    )


def logits_together(
    folder: Path, ranks: int, prompt: list[int], **options: Any
) -> tuple[torch.Tensor, Counts]:
    """Logits of all rows, the ranks' runs of the vocabulary side by side."""

    def work(group: SharedGroup) -> tuple[torch.Tensor, Counts]:
        loaded = load_part(folder, group, ranks, **options)
        group.counts.bytes = group.counts.messages = 0
        return logits_of(loaded, prompt), group.counts

    found = together(ranks, work)
    return torch.cat([logits for logits, _ in found], dim=1), found[0][1]


@pytest.mark.parametrize("name", CASES)
def test_logits_are_those_of_one_process(name: str, tmp_path: Path) -> None:
    """Heads split or replicated, biases, experts, norms after sums, fused matrices; in float32."""
    config, splits = CASES[name]
    made = config()
    write_model(tmp_path, made)
    prompt = random_tokens(75, 3, VOCAB)
    alone = load_model(tmp_path, "test", "float32")
    expected = logits_of(alone, prompt)
    for ranks in splits:
        found, counts = logits_together(tmp_path, ranks, prompt, dtype="float32")
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        layers, hidden = alone.config.layers, alone.config.hidden_size
        assert counts.messages in range(2 * layers + 1, 2 * (2 * layers + 1) + 1)
        least = minimal_bytes(ranks, (2 * layers + 1) * len(prompt) * hidden * 4)
        assert least * 0.99 <= counts.bytes <= least * ranks / 2 + 1


@pytest.mark.parametrize("mode", ["int8", "int4"])
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_columns_that_are_cut_between_groups_are_rounded_as_before(mode: str, ranks: int) -> None:
    """By the native kernels: the parts' products add up to the whole matrix's."""
    if native.library() is None:
        pytest.skip(f"no native kernels: {native.state()}")
    source = torch.Generator().manual_seed(3)
    weight = torch.randn(96, 384, generator=source)
    x = torch.randn(7, 384, generator=source) * torch.rand(384, generator=source) * 9
    role = Role.OTHER

    def product(columns: range) -> torch.Tensor:
        run = slice(columns.start, columns.stop)
        made = make_linear(mode, weight[:, run], None, role, torch.float32)  # type: ignore[arg-type]
        assert isinstance(made, NativeLinear)
        return made(x[:, run].contiguous())

    parts = [product(run_of(384, ranks, rank, GROUP)) for rank in range(ranks)]
    torch.testing.assert_close(sum(parts), product(range(384)), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(product(range(384)), x @ weight.T, rtol=0.5, atol=25)
    apart = [product(range(200)), product(range(200, 384))]
    assert (sum(apart) - product(range(384))).abs().max() > 1e-3, "a group that is cut is another"


@pytest.mark.parametrize("mode", ["int8", "int4"])
def test_quantized_parts_stay_within_their_mode(mode: str, tmp_path: Path) -> None:
    """Parts round their own rows: as far from float32 as one process is, not farther."""
    shape = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32, **HEADS}
    write_model(tmp_path, config_of("llama", **shape))
    prompt = random_tokens(40, 5, VOCAB)
    exact = logits_of(load_model(tmp_path, "test", "float32"), prompt)
    alone = logits_of(load_model(tmp_path, "test", "float32", mode), prompt)
    found, _ = logits_together(tmp_path, 2, prompt, dtype="float32", quantization=mode)
    error = (alone - exact).pow(2).mean().sqrt()
    assert (found - exact).pow(2).mean().sqrt() < 1.5 * error
    assert (found - alone).pow(2).mean().sqrt() < 2 * error


@pytest.mark.parametrize("name", ["llama", "mixtral", "phi3"])
def test_parts_of_gguf_files(name: str, tmp_path: Path) -> None:
    """Columns out of quantization blocks, heads in llama.cpp's own row order, stacks of experts."""
    family = FAMILIES[name]
    family.folder(tmp_path)
    file = tmp_path / "m.gguf"
    write_family(file, tmp_path, family.arch, GGMLQuantizationType.Q8_0)
    prompt = random_tokens(20, 5, 256)
    expected = logits_of(load_model(file, "test", "float32"), prompt)
    found, _ = logits_together(file, 2, prompt, dtype="float32")
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", sorted(TYPES))
def test_a_part_of_any_gguf_type_is_what_the_whole_has_there(kind: str, tmp_path: Path) -> None:
    """Rows in several runs, columns that begin and end within a block."""
    model = write_hf_folder(tmp_path, hidden_size=512, head_dim=128)
    source = np.random.default_rng(5)
    data = random_blocks(kind, 512, 512, source)
    raw = {"blk.1.attn_output.weight": (data, GGMLQuantizationType[kind])}
    write_gguf(tmp_path / "m.gguf", model, GGMLQuantizationType.F32, raw=raw)
    opened, name = GgufSource(tmp_path / "m.gguf"), "model.layers.1.self_attn.o_proj.weight"
    whole = opened.read(name)
    assert opened.shape(name) == whole.shape
    for columns in (range(40), range(200, 300), range(96, 512)):
        rows = [range(3, 9), range(100, 512)]
        part = opened.read_part(name, rows, columns)
        there = torch.cat([whole[run.start : run.stop] for run in rows])
        assert torch.equal(part, there[:, columns.start : columns.stop])


def test_a_rank_reads_its_part_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a GGUF file's matrices half the numbers are dequantized, whichever way they are cut."""
    family = FAMILIES["llama-3.1"]
    family.folder(tmp_path)
    write_family(tmp_path / "m.gguf", tmp_path, family.arch, GGMLQuantizationType.F32)
    seen: list[int] = []

    def counted(data: np.ndarray[Any, Any], kind: GGMLQuantizationType) -> np.ndarray[Any, Any]:
        values = dequantize(data, kind)
        seen.append(values.size)
        return values

    monkeypatch.setattr(gguf_file, "dequantize", counted)
    alone = load_model(tmp_path / "m.gguf", "test", "float32")
    whole = sum(seen)
    seen.clear()
    parts = together(2, lambda group: load_part(tmp_path / "m.gguf", group, 2, dtype="float32"))
    assert whole < sum(seen) < 1.01 * whole, "norms twice, all else once"
    for part in parts:
        assert part.weight_bytes < 0.56 * alone.weight_bytes
        assert part.record == alone.record


def test_a_matrix_of_another_shape_is_refused_by_its_name(tmp_path: Path) -> None:
    write_model(tmp_path, llama(**HEADS))
    facts = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(facts | {"intermediate_size": 64}))
    with pytest.raises(ModelError, match=r"(down|gate)_proj.weight has shape .* not 64"):
        together(2, lambda group: load_part(tmp_path, group, 2))
