"""GGUF files: the model that the Hugging Face folder gives, and no file that breaks the reader."""

from __future__ import annotations

import os
import random
import struct
import tracemalloc
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter
from gguf.quants import dequantize, quantize

from headrace.errors import ModelError
from headrace_worker import native
from headrace_worker.loading import LoadedModel, gguf_file, load_model
from headrace_worker.loading.gguf_file import TYPES, GgufSource
from headrace_worker.loading.hf_folder import HfSource
from headrace_worker.model.config import ModelConfig
from worker.builders import (
    add_gguf_tokenizer,
    assert_same_logits,
    logits_of,
    random_tokens,
    write_gguf,
    write_hf_folder,
)
from worker.gguf_models import FAMILIES, Family, write_family

FUZZED = int(os.environ.get("HEADRACE_TEST_FUZZED_FILES", "300"))


def assert_same_config(ours: ModelConfig, theirs: ModelConfig) -> None:
    """Equal but for the last digit of rotary frequencies, which a file may hold divided."""
    for field in fields(ModelConfig):
        if field.name != "ropes":
            assert getattr(ours, field.name) == getattr(theirs, field.name), field.name
    assert len(ours.ropes) == len(theirs.ropes)
    for mine, reference in zip(ours.ropes, theirs.ropes, strict=True):
        assert mine.frequencies == pytest.approx(reference.frequencies, rel=3e-7)
        assert mine.long_frequencies == pytest.approx(reference.long_frequencies, rel=3e-7)
        assert mine.factor == pytest.approx(reference.factor, rel=3e-7)
        assert mine.short_tokens == reference.short_tokens


@pytest.mark.parametrize("name", FAMILIES)
def test_both_formats_give_the_same_model(tmp_path: Path, name: str) -> None:
    """Shape, every tensor and the logits, for each family: one model, two files."""
    FAMILIES[name].folder(tmp_path)
    file = tmp_path / "m.gguf"
    write_family(file, tmp_path, FAMILIES[name].arch)
    ours, theirs = GgufSource(file), HfSource(tmp_path)
    assert_same_config(ours.config, theirs.config)
    assert ours.names() == theirs.names()
    for tensor in theirs.names():  # Gemma's norms are stored with 1 added
        torch.testing.assert_close(ours.read(tensor), theirs.read(tensor), rtol=0, atol=6e-8)
    prompt = random_tokens(150, 3)
    logits = [logits_of(load_model(path, "m", "float32"), prompt) for path in (file, tmp_path)]
    torch.testing.assert_close(*logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "llama-tied", "qwen2"])
def test_transformers_reads_the_same_model(tmp_path: Path, name: str) -> None:
    """Its own GGUF reader, for the families of which it reads all that a file says."""
    import transformers.modeling_utils
    from transformers import AutoModelForCausalLM, GgufConfig

    FAMILIES[name].folder(tmp_path)
    write_family(tmp_path / "m.gguf", tmp_path, FAMILIES[name].arch)
    (tmp_path / "config.json").unlink()
    transformers.utils.logging.disable_progress_bar()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transformers.modeling_utils, "is_accelerate_available", lambda *_: True)
        model = AutoModelForCausalLM.from_pretrained(
            tmp_path,
            gguf_file="m.gguf",
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.float32,
        ).eval()
    assert_same_logits(load_model(tmp_path / "m.gguf", "m", "float32"), model)


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_a_quantized_file_gives_the_reference_logits(tmp_path: Path, kind: str) -> None:
    """transformers with the dequantized weights, ours with the file: rows of q and k put back."""
    quantization = GGMLQuantizationType[kind]
    model = write_hf_folder(tmp_path)
    write_gguf(tmp_path / "model.gguf", model, quantization)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                packed = quantize(parameter.numpy(), quantization)
                parameter.copy_(torch.from_numpy(dequantize(packed, quantization).copy()))
    assert_same_logits(load_model(tmp_path / "model.gguf", "m", "float32"), model)
    assert GgufSource(tmp_path / "model.gguf").in_four_bits is (kind in ("Q4_0", "Q4_1"))


def _nibbles(data: bytes) -> tuple[list[int], list[int]]:
    return [byte & 15 for byte in data], [byte >> 4 for byte in data]


def _half(data: bytes, at: int) -> float:
    return float(struct.unpack_from("<e", data, at)[0])


def _simple(data: bytes, bits: int, minimum: bool) -> list[float]:
    """Q4_0, Q4_1, Q5_0, Q5_1: 32 numbers, the first 16 in the low nibbles."""
    d, at = _half(data, 0), 4 if minimum else 2
    m = _half(data, 2) if minimum else 0.0
    high = 0
    if bits == 5:
        high, at = int.from_bytes(data[at : at + 4], "little"), at + 4
    low, upper = _nibbles(data[at:])
    offset = 0 if minimum else 1 << (bits - 1)
    quants = [q | (high >> i & 1) << 4 for i, q in enumerate(low + upper)]
    return [d * (q - offset) + m for q in quants]


def _scales(packed: bytes) -> list[tuple[int, int]]:
    """The eight 6-bit scales and minima that K-quants pack into 12 bytes."""
    first = [(packed[j] & 63, packed[j + 4] & 63) for j in range(4)]
    last = [
        (packed[j + 8] & 15 | (packed[j] >> 6) << 4, packed[j + 8] >> 4 | (packed[j + 4] >> 6) << 4)
        for j in range(4)
    ]
    return first + last


def _k4_or_k5(data: bytes, bits: int) -> list[float]:
    d, minimum, scales = _half(data, 0), _half(data, 2), _scales(data[4:16])
    high, quants = (data[16:48], data[48:]) if bits == 5 else (bytes(32), data[16:])
    values = []
    for chunk in range(4):
        halves = _nibbles(quants[32 * chunk : 32 * chunk + 32])
        for which, nibbles in enumerate(halves):
            block = 2 * chunk + which
            scale, least = scales[block]
            values += [
                d * scale * (q | (high[i] >> block & 1) << 4) - minimum * least
                for i, q in enumerate(nibbles)
            ]
    return values


def _k6(data: bytes) -> list[float]:
    low, high = data[:128], data[128:192]
    scales, d = struct.unpack("<16b", data[192:208]), _half(data, 208)
    values = []
    for half in range(2):
        ql, qh = low[64 * half : 64 * half + 64], high[32 * half : 32 * half + 32]
        for part in range(4):
            for i in range(32):
                byte = ql[i + 32 * (part % 2)]
                nibble = byte >> 4 if part > 1 else byte & 15
                q = (nibble | (qh[i] >> 2 * part & 3) << 4) - 32
                values.append(d * scales[8 * half + 2 * part + i // 16] * q)
    return values


DECODERS: dict[str, Callable[[bytes], list[float]]] = {
    "F32": lambda data: list(struct.unpack("<f", data)),
    "F16": lambda data: list(struct.unpack("<e", data)),
    "BF16": lambda data: list(struct.unpack("<f", b"\0\0" + data)),
    "Q8_0": lambda data: [_half(data, 0) * q for q in struct.unpack("<32b", data[2:])],
    "Q4_0": lambda data: _simple(data, 4, minimum=False),
    "Q4_1": lambda data: _simple(data, 4, minimum=True),
    "Q5_0": lambda data: _simple(data, 5, minimum=False),
    "Q5_1": lambda data: _simple(data, 5, minimum=True),
    "Q4_K": lambda data: _k4_or_k5(data, 4),
    "Q5_K": lambda data: _k4_or_k5(data, 5),
    "Q6_K": _k6,
}
"""A number at a time, from the layouts of ggml's block structures."""

HALVES_AT = {"Q6_K": [208]} | {kind: [0, 2] for kind in ("Q4_1", "Q5_1", "Q4_K", "Q5_K")}
"""Where a block has its 16-bit scales; the others have one, in front."""


def random_blocks(kind: str, rows: int, columns: int, source: np.random.Generator) -> np.ndarray:
    """Any bytes, with scales that are finite: any sign, subnormal ones among them."""
    values, size = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    if kind in ("F32", "F16", "BF16"):
        numbers = source.normal(0, 1, (rows, columns)).astype(np.float32)
        return quantize(numbers, GGMLQuantizationType[kind]).view(np.uint8)
    blocks = source.integers(0, 256, (rows, columns // values, size), np.uint8)
    for at in HALVES_AT.get(kind, [0]):
        bits = source.integers(0, 1 << 16, blocks.shape[:2], np.uint16)
        bits = np.where(bits & 0x7C00 == 0x7C00, bits & 0x83FF, bits)
        blocks[..., at : at + 2] = bits.astype("<u2")[..., None].view(np.uint8)
    return blocks.reshape(rows, -1)


@pytest.mark.parametrize("kernels", ["auto", "off"])
def test_every_type_is_read_as_the_format_says(
    tmp_path: Path, kernels: native.Mode, request: pytest.FixtureRequest
) -> None:
    """Random blocks of every type, through one file: bit for bit what `gguf` makes of them, and
    what a decoder written from the layouts gives."""
    request.addfinalizer(lambda: native.choose("auto"))
    native.choose(kernels)
    model = write_hf_folder(tmp_path, hidden_size=256, head_dim=64)
    source = np.random.default_rng(5)
    parts = ["attn_output", "ffn_gate", "ffn_up", "attn_v"]
    names = {"attn_output": "self_attn.o_proj", "attn_v": "self_attn.v_proj"} | {
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
    }
    raw, where = {}, {}
    for i, kind in enumerate(sorted(TYPES)):
        part, layer = parts[i // 3], i % 3
        rows = {"attn_output": 256, "attn_v": 128}.get(part, 96)
        data = random_blocks(kind, rows, 256, source)
        raw[f"blk.{layer}.{part}.weight"] = (data, GGMLQuantizationType[kind])
        where[kind] = (f"model.layers.{layer}.{names[part]}.weight", data)
    write_gguf(tmp_path / "m.gguf", model, GGMLQuantizationType.F32, raw=raw)
    opened = GgufSource(tmp_path / "m.gguf")
    for kind, (name, data) in where.items():
        ours = opened.read(name).numpy()
        reference = dequantize(data, GGMLQuantizationType[kind]).reshape(ours.shape)
        assert np.array_equal(ours.view(np.int32), reference.view(np.int32)), kind
        size = GGML_QUANT_SIZES[GGMLQuantizationType[kind]][1]
        blocks = data[:8].tobytes()
        expected = [
            value
            for at in range(0, len(blocks), size)
            for value in DECODERS[kind](blocks[at : at + size])
        ]
        np.testing.assert_allclose(ours[:8].reshape(-1), expected, rtol=3e-6, atol=1e-6)


def test_an_expert_is_dequantized_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One expert of a quantized stack costs its own numbers, not the stack's."""
    family = Family("mixtral", "llama", FAMILIES["mixtral"].changes | {"intermediate_size": 128})
    family.folder(tmp_path)
    write_family(tmp_path / "m.gguf", tmp_path, "llama", GGMLQuantizationType.Q8_0)
    ours, theirs = GgufSource(tmp_path / "m.gguf"), HfSource(tmp_path)
    seen: list[int] = []
    convert = gguf_file._converted

    def counted(data: np.ndarray, kind: GGMLQuantizationType) -> torch.Tensor | None:
        values = convert(data, kind)
        seen.append(0 if values is None else values.numel())
        return values

    monkeypatch.setattr(gguf_file, "_converted", counted)
    for part, shape in (("w1", (128, 64)), ("w2", (64, 128)), ("w3", (128, 64))):
        name = f"model.layers.1.block_sparse_moe.experts.4.{part}.weight"
        packed = quantize(theirs.read(name).numpy(), GGMLQuantizationType.Q8_0)
        expected = dequantize(packed, GGMLQuantizationType.Q8_0)
        assert ours.read(name).shape == shape
        assert np.array_equal(ours.read(name).numpy(), expected)
        assert ours.stored_bytes(name) == packed.nbytes
    assert set(seen) == {128 * 64}
    assert ours.largest_values() == 300 * 64, "the embedding, not a stack"


def test_experts_of_old_files_stand_alone(tmp_path: Path) -> None:
    """Mixtral's first files had a tensor for each expert."""
    FAMILIES["mixtral"].folder(tmp_path)
    write_family(tmp_path / "m.gguf", tmp_path, "llama", stacked=False)
    ours, theirs = GgufSource(tmp_path / "m.gguf"), HfSource(tmp_path)
    assert ours.names() == theirs.names()
    for name in theirs.names():
        assert torch.equal(ours.read(name), theirs.read(name)), name


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folders of families, made when first asked for."""
    made: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name)
            FAMILIES[name].folder(made[name])
        return made[name]

    return folder


def config_with(
    folders: Callable[[str], Path], tmp_path: Path, name: str, **changed: Any
) -> ModelConfig:
    """The shape of family `name` read with metadata `changed`, where "__" stands for a dot."""
    keys = {key.replace("__", "."): value for key, value in changed.items()}
    arch = FAMILIES[name].arch
    in_file = {key if key.startswith("split.") else f"{arch}.{key}": v for key, v in keys.items()}
    write_family(tmp_path / "m.gguf", folders(name), arch, changed=in_file)
    return GgufSource(tmp_path / "m.gguf").config


def test_what_the_format_leaves_out_has_llama_cpp_s_value(
    folders: Callable[[str], Path], tmp_path: Path
) -> None:
    """Gemma's pattern, local base and 27B scale, and lists that are the same for every layer."""

    def gemma(**changed: Any) -> ModelConfig:
        return config_with(folders, tmp_path, "gemma3", **changed)

    plain = gemma(rope__freq_base_swa=None)
    assert plain.windows == (16, 16, 16, 16, 16, 0, 16)
    assert plain.layer_ropes == (1, 1, 1, 1, 1, 0, 1)
    assert plain.ropes[1] == gemma(rope__freq_base_swa=10_000.0).ropes[1]
    assert gemma(attention__sliding_window_pattern=2).windows == (16, 0, 16, 0, 16, 0, 16)
    listed = [True, False, False, True, True, False, True]
    assert gemma(attention__sliding_window_pattern=listed).windows == (16, 0, 0, 16, 16, 0, 16)
    assert gemma(attention__sliding_window=None).windows == ()
    assert gemma(attention__scale=0.25).attention_scale == 0.25
    assert plain.attention_scale == 24**-0.5
    listed = config_with(
        folders, tmp_path, "llama", feed_forward_length=[96] * 3, attention__head_count=[4] * 3
    )
    assert (listed.intermediate_size, listed.heads) == (96, 4)
    linear = config_with(
        folders,
        tmp_path,
        "llama-linear",
        rope__scaling__type=None,
        rope__scaling__factor=None,
        rope__scale_linear=2.0,
    )
    assert linear.ropes == config_with(folders, tmp_path, "llama-linear").ropes


@pytest.mark.parametrize(
    ("name", "changed", "message"),
    [
        (
            "gemma3",
            {"final_logit_softcapping": 30.0},
            r"gemma3\.final_logit_softcapping = 30\.0 is",
        ),
        ("llama", {"attention__causal": False}, "causal = False is not supported"),
        ("llama", {"feed_forward_length": [96, 96, 64]}, r"= \[96, 96, 64\] differs by layer"),
        ("llama", {"attention__head_count_kv": [1, 2, 1]}, "differs by layer"),
        ("llama", {"attention__value_length": 16}, "value_length = 16 is not the 32 of the keys"),
        (
            "llama",
            {"rope__scaling__type": "dynamic"},
            "= dynamic is not supported; supported: none",
        ),
        ("llama", {"rope__dimension_count": 16}, "dimension_count = 16 is not between 32 and 32"),
        ("llama", {"rope__freq_base": 0.5}, "freq_base = 0.5 is not above 1"),
        ("llama", {"rope__freq_base": float("nan")}, "freq_base = nan is not above 1"),
        ("llama-3.1", {"rope__scaling__factor": 2.0}, "beside a rope.scaling.factor"),
        ("llama", {"block_count": 2_000_000}, "block_count = 2000000 is not between 1 and"),
        ("llama", {"block_count": 0}, "block_count = 0 is not between 1"),
        ("llama", {"attention__head_count": 0}, "head_count = 0 is not between 1"),
        ("llama", {"attention__head_count_kv": 3}, "4 heads cannot share 3 KV heads"),
        (
            "llama",
            {"embedding_length": "64"},
            r"llama\.embedding_length is '64', expected a number",
        ),
        ("llama", {"context_length": None}, r"llama\.context_length is None, expected a number"),
        ("llama", {"split.count": 2}, "is one of 2 parts of a model: merge them"),
        ("mixtral", {"expert_count": 4}, r"has shape \[5, 96, 64\], not one of 4 experts"),
        ("mixtral", {"expert_used_count": 9}, "expert_used_count = 9 is not between 1 and 5"),
        ("mixtral", {"expert_count": 1 << 20}, "1048576 experts are more than the 4096"),
        ("qwen2", {"expert_count": 4}, "qwen2 with 4 experts is not supported"),
        ("qwen2", {"attention__sliding_window": 8}, r"qwen2\.attention\.sliding_window = 8 is not"),
        ("qwen3-moe", {"expert_gating_func": 2}, "expert_gating_func = 2 is not supported"),
    ],
)
def test_metadata_that_makes_another_model_is_refused_by_name(
    folders: Callable[[str], Path], tmp_path: Path, name: str, changed: dict[str, Any], message: str
) -> None:
    """Absurd numbers and settings that nobody computes here stop before a weight is read."""
    with pytest.raises(ModelError, match=message):
        config_with(folders, tmp_path, name, **changed)


def test_a_gguf_file_with_unknown_parts_is_refused_by_name(tmp_path: Path) -> None:
    """Architectures, tokenizers, tensors and their types: each by name, with what would work."""
    model = write_hf_folder(tmp_path / "hf")
    file = tmp_path / "m.gguf"
    write_gguf(file, model, GGMLQuantizationType.F32, architecture="mamba")
    known = "gemma3, llama, phi3, qwen2, qwen3, qwen3moe, smollm3"
    with pytest.raises(ModelError, match=f"'mamba' is not supported; supported: {known}"):
        load_model(file, "m")
    write_gguf(file, model, GGMLQuantizationType.F32, pre="deepseek-llm")
    with pytest.raises(ModelError, match="'gpt2' with pre-tokenizer 'deepseek-llm' is not supp"):
        load_model(file, "m")
    writer = GGUFWriter(file, "llama")
    add_gguf_tokenizer(writer, "gpt-2")
    writer.add_tensor("token_embd.weight", np.zeros((4, 32), np.int8))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ModelError, match=r"token_embd\.weight has type I8, .* supported: BF16"):
        load_model(file, "m")


@pytest.fixture(scope="module")
def small_file(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A valid model of one layer: short, so that most of its bytes are metadata."""
    folder = tmp_path_factory.mktemp("small")
    changes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    Family("llama", "llama", changes | {"tie_word_embeddings": True}).folder(folder)
    write_family(folder / "m.gguf", folder, "llama", GGMLQuantizationType.Q8_0)
    assert load_model(folder / "m.gguf", "m", "float32").config.layers == 1
    return (folder / "m.gguf").read_bytes()


def _field(data: bytes, key: str) -> int:
    """Where the value of a metadata key begins: after the key and four bytes of type."""
    return data.index(key.encode()) + len(key) + 4


def _tensor(data: bytes, name: str) -> int:
    """Where a tensor's number of dimensions stands: after its name."""
    return data.index(struct.pack("<Q", len(name)) + name.encode()) + 8 + len(name)


def _u64(value: int) -> bytes:
    return struct.pack("<Q", value)


HUGE = 1 << 62


@pytest.mark.parametrize(
    ("where", "bytes_in", "message"),
    [
        (lambda d: 0, b"GGML", "it does not begin with GGUF"),
        (lambda d: 4, struct.pack("<I", 1), "version 1; supported: 2 and 3"),
        (lambda d: 4, struct.pack(">I", 3), r"version 50331648 \(a big-endian file\)"),
        (lambda d: 8, _u64(HUGE), f"{HUGE} tensors cannot stand in the"),
        (lambda d: 16, _u64(HUGE), f"{HUGE} metadata pairs cannot stand in the"),
        (lambda d: 24, _u64(HUGE), "a metadata key at byte 32 goes beyond the end"),
        (lambda d: 32, b"\xff\xff", "a metadata key at byte 32 is not UTF-8"),
        (lambda d: _field(d, "general.architecture"), _u64(1 << 40), "goes beyond the end"),
        (lambda d: _field(d, "llama.block_count") - 4, b"\x63", "a value of unknown type 99"),
        (lambda d: _field(d, "tokenizer.ggml.tokens"), b"\x09", "array of type 9, which is not"),
        (lambda d: _field(d, "tokenizer.ggml.tokens") + 4, _u64(HUGE), "texts of 'tokenizer.ggml"),
        (lambda d: _field(d, "tokenizer.ggml.token_type") + 4, _u64(HUGE), "elements of 'tokeni"),
        (lambda d: _tensor(d, "output_norm.weight"), b"\x09", "has 9 dimensions"),
        (lambda d: _tensor(d, "output_norm.weight") + 4, _u64(HUGE), "ends at byte .* cut off"),
        (lambda d: _tensor(d, "output_norm.weight") + 4, _u64(0), r"has shape \[0\], impossible"),
        (lambda d: _tensor(d, "token_embd.weight") + 4, _u64(33), r"\[300, 33\], impossible for"),
        (lambda d: _tensor(d, "output_norm.weight") + 12, b"\x63", "has unknown type 99"),
        (lambda d: _tensor(d, "output_norm.weight") + 16, _u64(HUGE), "it is cut off"),
    ],
)
def test_a_damaged_head_is_told(
    small_file: bytes,
    tmp_path: Path,
    where: Callable[[bytes], int],
    bytes_in: bytes,
    message: str,
) -> None:
    """Each number that a file could lie with: what it is, and where it stands."""
    at = where(small_file)
    file = tmp_path / "m.gguf"
    file.write_bytes(small_file[:at] + bytes_in + small_file[at + len(bytes_in) :])
    with pytest.raises(ModelError, match=rf"m\.gguf is not a readable GGUF file: .*{message}"):
        load_model(file, "m")


def test_names_that_stand_twice_are_refused(small_file: bytes, tmp_path: Path) -> None:
    """Of metadata and of tensors: which of the two would count?"""
    file = tmp_path / "m.gguf"
    file.write_bytes(small_file.replace(b"eos_token_id", b"bos_token_id"))
    with pytest.raises(ModelError, match=r"'tokenizer\.ggml\.bos_token_id' stands twice"):
        load_model(file, "m")
    file.write_bytes(small_file.replace(b"ffn_down.weight", b"ffn_gate.weight"))
    with pytest.raises(ModelError, match=r"tensor 'blk\.0\.ffn_gate\.weight' stands twice"):
        load_model(file, "m")


def test_a_file_cut_anywhere_is_refused(small_file: bytes, tmp_path: Path) -> None:
    """From no byte at all to one byte too few."""
    file = tmp_path / "m.gguf"
    source = random.Random(3)
    cuts = [0, 1, 4, 23, 24, len(small_file) - 1]
    for cut in cuts + [source.randrange(len(small_file)) for _ in range(60)]:
        file.write_bytes(small_file[:cut])
        with pytest.raises(ModelError, match=r"m\.gguf is not a readable GGUF file"):
            load_model(file, "m")


@pytest.mark.parametrize("bits", [0x7E00, 0x7C00, 0xFC00])
def test_scales_that_are_no_numbers_are_refused(
    small_file: bytes, tmp_path: Path, bits: int
) -> None:
    """NaN and infinity in a block's scale: every logit would be NaN."""
    file = tmp_path / "m.gguf"
    file.write_bytes(small_file)
    tensor = GgufSource(file)._file.tensors["blk.0.ffn_up.weight"]
    at = small_file.index(tensor.data.tobytes())
    file.write_bytes(small_file[:at] + struct.pack("<H", bits) + small_file[at + 2 :])
    with pytest.raises(ModelError, match=r"blk\.0\.ffn_up\.weight holds values that are no numb"):
        load_model(file, "m")


def test_flipped_bytes_never_break_the_reader(small_file: bytes, tmp_path: Path) -> None:
    """A model or a ModelError, in bounded memory, whatever bytes are wrong."""
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    source = random.Random(seed)
    head = small_file.index(b"token_embd.weight") + 1200
    file = tmp_path / "m.gguf"
    refused = 0
    tracemalloc.start()
    for _ in range(FUZZED):
        data = bytearray(small_file)
        end = head if source.random() < 0.8 else len(data)
        for _ in range(source.choice([1, 1, 1, 2, 5])):
            data[source.randrange(end)] = source.choice(
                [0, 1, 0x7F, 0x80, 0xFF, source.randrange(256)]
            )
        file.write_bytes(data)
        tracemalloc.reset_peak()
        try:
            load_model(file, "m", "float32")
        except ModelError as error:
            assert str(error)
            refused += 1
        peak = tracemalloc.get_traced_memory()[1]
        assert peak < 200 * len(small_file), "memory is bounded by the file's size"
    tracemalloc.stop()
    assert refused > FUZZED // 20


def test_the_record_of_smollm2(smollm2: LoadedModel, hf_tokenizer: Any) -> None:
    """The real file's metadata, and the template as transformers has it."""
    record = smollm2.record
    assert record.context_tokens == 8192 and record.vocab_size == 49152
    assert record.eos_token_ids == (2, 0) and not record.add_bos
    assert record.template_tokens["eos_token"] == "<|im_end|>"
    assert record.chat_template == hf_tokenizer.chat_template
    assert smollm2.config.parameters == 134_515_008
