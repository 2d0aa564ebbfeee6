"""Reading models: the same numbers as transformers from either format, and clear refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter
from tokenizers import Tokenizer

from headrace.errors import ModelError
from headrace_worker.loading import LoadedModel, load_model, memory
from headrace_worker.loading.gguf_file import GgufSource
from headrace_worker.loading.load import resolve_dtype
from headrace_worker.model import linear
from worker.builders import (
    add_gguf_tokenizer,
    random_tokens,
    split_as_named,
    write_gguf,
    write_hf_folder,
)
from worker.corpus import HARD_TEXTS
from worker.test_greedy import logits_of

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def assert_same_logits(loaded: LoadedModel, model: Any, limit: float = 1e-4) -> None:
    prompt = random_tokens(150, 3)
    with torch.inference_mode():
        expected = model(torch.tensor([prompt])).logits[0].float()
    torch.testing.assert_close(logits_of(loaded, prompt), expected, rtol=limit, atol=limit)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": True},
        {"num_key_value_heads": 4},
        {"num_key_value_heads": 1, "head_dim": 32},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 500_000.0}},
        {"rope_parameters": LLAMA3_ROPE},
    ],
)
def test_a_folder_gives_the_reference_logits(tmp_path: Path, changes: dict[str, Any]) -> None:
    """Head layouts, tied heads and rotary scalings, each against transformers."""
    model = write_hf_folder(tmp_path, **changes)
    assert_same_logits(load_model(tmp_path, "m", "float32"), model)


def test_a_sharded_folder_in_the_older_spelling(tmp_path: Path) -> None:
    """Weights over several files, `rope_theta` and `rope_scaling` at the top of config.json."""
    model = write_hf_folder(tmp_path, shard="100KB", rope_parameters=LLAMA3_ROPE)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    file = tmp_path / "config.json"
    facts = json.loads(file.read_text())
    rules = facts.pop("rope_parameters")
    facts |= {"rope_theta": rules.pop("rope_theta"), "rope_scaling": rules}
    file.write_text(json.dumps(facts))
    assert_same_logits(load_model(tmp_path, "m", "float32"), model)


def test_bfloat16_is_near_the_reference_in_bfloat16(tmp_path: Path) -> None:
    """Rounding differs in places, nothing else: about one part in a hundred of the logits."""
    model = write_hf_folder(tmp_path)
    loaded = load_model(tmp_path, "m", "bfloat16")
    assert loaded.dtype is torch.bfloat16
    prompt = random_tokens(100, 3)
    with torch.inference_mode():
        exact = model(torch.tensor([prompt])).logits[0]
        theirs = model.to(torch.bfloat16)(torch.tensor([prompt])).logits[0].float()
    ours = logits_of(loaded, prompt)
    assert (ours - exact).abs().mean() < 1.2 * (theirs - exact).abs().mean()


def test_packing_is_optional(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A torch without the packed multiplication gives the same numbers, to bfloat16's rounding."""
    write_hf_folder(tmp_path)
    packed = logits_of(load_model(tmp_path, "m", "bfloat16"), random_tokens(60, 3))
    monkeypatch.setattr(linear, "_PACKING", None)
    plain = logits_of(load_model(tmp_path, "m", "bfloat16"), random_tokens(60, 3))
    assert (packed - plain).abs().mean() < 0.02 * plain.abs().mean()


def test_the_record_of_a_folder(tiny: LoadedModel, tiny_folder: Path) -> None:
    """What gateways are told: ends from generation_config, template and names from their files."""
    record = tiny.record
    assert record.architecture == "llama" and record.context_tokens == 512
    assert record.vocab_size == 300 and record.eos_token_ids == (1, 0)
    assert record.chat_template == "{{ messages[0].content }}"
    assert record.template_tokens == {"bos_token": "<|begin|>", "eos_token": "<|end|>"}
    assert (record.bos_token_id, record.add_bos) == (0, False)
    assert record.tokenizer_json == (tiny_folder / "tokenizer.json").read_bytes()


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
@pytest.mark.parametrize("tied", [False, True])
def test_a_gguf_file_gives_the_reference_logits(tmp_path: Path, kind: str, tied: bool) -> None:
    """transformers with the dequantized weights, ours with the file: rows of q and k put back."""
    from gguf.quants import dequantize, quantize

    quantization = GGMLQuantizationType[kind]
    model = write_hf_folder(tmp_path, tie_word_embeddings=tied)
    file = tmp_path / "model.gguf"
    write_gguf(file, model, quantization)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                packed = quantize(parameter.numpy(), quantization)
                parameter.copy_(torch.from_numpy(dequantize(packed, quantization).copy()))
    assert_same_logits(load_model(file, "m", "float32"), model)


@pytest.mark.parametrize(("kind", "scales"), [("Q4_K", (0, 2)), ("Q5_K", (0, 2)), ("Q6_K", (208,))])
def test_k_quants_are_read_as_the_reference_reads_them(
    tmp_path: Path, kind: str, scales: tuple[int, ...]
) -> None:
    """Random blocks with sane scales through a file, against transformers' own arithmetic."""
    from transformers.integrations.gguf.dequant import dequantize as theirs

    quantization = GGMLQuantizationType[kind]
    values, size = GGML_QUANT_SIZES[quantization]
    source = np.random.default_rng(5)
    data = source.integers(0, 256, (256, 256 // values * size), np.uint8)
    for at in scales:
        scale = source.uniform(0.001, 0.01, (256, 1)).astype(np.float16)
        data[:, at : at + 2] = scale.view(np.uint8)
    model = write_hf_folder(tmp_path, hidden_size=256)
    file, raw = tmp_path / "m.gguf", {"blk.0.attn_output.weight": (data, quantization)}
    write_gguf(file, model, GGMLQuantizationType.F32, raw=raw)
    ours = GgufSource(file).read("model.layers.0.self_attn.o_proj.weight")
    expected = theirs(torch.from_numpy(data), int(quantization)).reshape(256, 256)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)


def test_a_gguf_file_with_rotary_factors(tmp_path: Path) -> None:
    """Llama 3.1's scaling, which llama.cpp writes as one factor a frequency."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    model = write_hf_folder(tmp_path, rope_parameters=LLAMA3_ROPE)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](model.config, "cpu")
    plain = 1.0 / (10_000.0 ** (np.arange(0, 16, 2, dtype=np.float32) / 16))
    factors = (plain / scaled.numpy()).astype(np.float32)
    write_gguf(tmp_path / "m.gguf", model, GGMLQuantizationType.F32, rope_factors=factors)
    assert_same_logits(load_model(tmp_path / "m.gguf", "m", "float32"), model)


def test_the_record_of_smollm2(smollm2: LoadedModel, hf_tokenizer: Any) -> None:
    """The real file's metadata, and the template as transformers has it."""
    record = smollm2.record
    assert record.context_tokens == 8192 and record.vocab_size == 49152
    assert record.eos_token_ids == (2,) and not record.add_bos
    assert record.template_tokens["eos_token"] == "<|im_end|>"
    assert record.chat_template == hf_tokenizer.chat_template
    assert smollm2.config.parameters == 134_515_008


def assert_same_tokens(ours: Tokenizer, theirs: Any, vocab: int) -> None:
    for text in HARD_TEXTS:
        ids = ours.encode(text, add_special_tokens=False).ids
        assert ids == theirs.encode(text, add_special_tokens=False), repr(text)
        for skip in (False, True):
            decoded = theirs.decode(ids, skip_special_tokens=skip)
            assert ours.decode(ids, skip_special_tokens=skip) == decoded, repr(text)
    assert ours.get_vocab_size() == vocab


def test_the_real_tokenizer_equals_the_reference(smollm2: LoadedModel, hf_tokenizer: Any) -> None:
    """Token for token over scripts, emoji, code, whitespace and special tokens in the text."""
    ours = Tokenizer.from_str(smollm2.record.tokenizer_json.decode())
    assert_same_tokens(ours, hf_tokenizer, 49152)


@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "llama-bpe", "qwen2"])
def test_each_kind_of_tokenizer_equals_the_reference(tmp_path: Path, pre: str) -> None:
    """One small vocabulary under each splitting rule, with control and user-defined tokens."""
    from transformers import AutoTokenizer

    model = write_hf_folder(tmp_path / "hf")
    file = tmp_path / "m.gguf"
    write_gguf(file, model, GGMLQuantizationType.F32, pre=pre)
    ours = Tokenizer.from_str(load_model(file, "m", "float32").record.tokenizer_json.decode())
    theirs = split_as_named(AutoTokenizer.from_pretrained(tmp_path, gguf_file=file.name), pre)
    assert_same_tokens(ours, theirs, 300)


def test_the_fingerprint_is_of_the_content(tmp_path: Path, tiny: LoadedModel) -> None:
    """Another path changes nothing; another dtype, weight or setting does."""
    write_hf_folder(tmp_path)
    same = load_model(tmp_path, "other-name", "float32").record.fingerprint
    assert same == tiny.record.fingerprint and len(same) == 64
    seen = {same, load_model(tmp_path, "m", "bfloat16").record.fingerprint}
    weights = tmp_path / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-3] ^= 1
    weights.write_bytes(data)
    seen.add(load_model(tmp_path, "m", "float32").record.fingerprint)
    facts = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(facts | {"rms_norm_eps": 1e-6}))
    seen.add(load_model(tmp_path, "m", "float32").record.fingerprint)
    assert len(seen) == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt_bigcode"}, "architecture 'gpt_bigcode' is not supported; supported"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu' is not supported"),
        ({"attention_bias": True}, "attention_bias"),
        ({"sliding_window": 128}, "sliding_window"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantization_config"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "rope type 'yarn'"),
        ({"num_key_value_heads": 3}, "4 heads cannot share 3 KV heads"),
        ({"intermediate_size": 97}, r"has shape \[96, 64\], not \[97, 64\]"),
        ({"num_hidden_layers": 2}, "9 tensors have no place in this model"),
        ({"num_hidden_layers": 4}, r"model\.layers\.3\.\S+ is missing"),
        ({"hidden_size": "64"}, "hidden_size is '64', expected a number"),
    ],
)
def test_a_folder_that_cannot_be_run_is_refused_by_name(
    tiny_folder: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    """Everything that would make another model of it stops the load and says what it is."""
    for file in tiny_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    facts = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(facts | changes))
    with pytest.raises(ModelError, match=message):
        load_model(tmp_path, "m", "float32")


def test_broken_files_are_refused(tiny_folder: Path, tmp_path: Path) -> None:
    """No traceback of a parser: the file's name and what is wrong with it."""
    with pytest.raises(ModelError, match=r"neither a \.gguf file nor a folder"):
        load_model(tmp_path / "x.bin", "m")
    with pytest.raises(ModelError, match=r"config\.json is not readable"):
        load_model(tmp_path, "m")
    (tmp_path / "x.gguf").write_bytes(b"GGUF but not really")
    with pytest.raises(ModelError, match=r"x\.gguf is not a readable GGUF file"):
        load_model(tmp_path / "x.gguf", "m")
    for file in tiny_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0notjson!")
    with pytest.raises(ModelError, match=r"model\.safetensors is not readable"):
        load_model(tmp_path, "m")
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ModelError, match="safetensors only"):
        load_model(tmp_path, "m")
    with pytest.raises(ModelError, match="dtype 'int7' is not one of auto, float32, bfloat16"):
        load_model(tmp_path, "m", "int7")


def test_gguf_files_that_cannot_be_run_are_refused_by_name(tmp_path: Path) -> None:
    """Unknown architectures and tokenizers stop before any weight is read."""
    model = write_hf_folder(tmp_path / "hf")
    file = tmp_path / "m.gguf"
    write_gguf(file, model, GGMLQuantizationType.F32, architecture="mamba")
    with pytest.raises(ModelError, match="architecture 'mamba' is not supported; supported: llama"):
        load_model(file, "m")
    write_gguf(file, model, GGMLQuantizationType.F32, pre="tekken")
    with pytest.raises(ModelError, match="'gpt2' with pre-tokenizer 'tekken' is not supported"):
        load_model(file, "m")
    scaling = {"llama.rope.scaling.type": "yarn"}
    write_gguf(file, model, GGMLQuantizationType.F32, extra=scaling)
    with pytest.raises(ModelError, match=r"llama\.rope\.scaling\.type is not supported"):
        load_model(file, "m")


def test_an_unknown_tensor_type_is_refused_by_name(tmp_path: Path) -> None:
    """The message names the tensor, its type and the types that work."""
    writer = GGUFWriter(tmp_path / "m.gguf", "llama")
    add_gguf_tokenizer(writer, "gpt-2")
    writer.add_tensor("token_embd.weight", np.zeros((4, 32), np.int8))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(
        ModelError, match=r"tensor token_embd\.weight has type I8, .* supported: BF16"
    ):
        load_model(tmp_path / "m.gguf", "m")


def test_a_model_that_does_not_fit_is_refused_before_loading(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both sizes, and what would help."""
    monkeypatch.setattr(memory, "available_bytes", lambda: 1000)
    with pytest.raises(
        ModelError, match=r"needs .* MiB of memory, 0 MiB are available: use a smaller"
    ):
        load_model(tiny_folder, "m", "float32")


def test_auto_dtype_follows_the_processor(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """bfloat16 with AVX512-BF16 or AMX, else float32."""
    from headrace_worker.loading import load

    cpuinfo = tmp_path / "cpuinfo"
    monkeypatch.setattr(load, "_CPUINFO", cpuinfo)
    cpuinfo.write_text("flags : fpu avx2 avx512_bf16")
    assert resolve_dtype("auto") is torch.bfloat16
    cpuinfo.write_text("flags : fpu avx2 avx512f")
    assert resolve_dtype("auto") is torch.float32
    cpuinfo.unlink()
    assert resolve_dtype("auto") is torch.float32


def test_memory_is_read_from_the_machine_and_its_container(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The smaller of what the machine and the cgroup leave; page cache counts as free."""
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal: 9000 kB\nMemAvailable:    4096 kB\n")
    monkeypatch.setattr(memory, "_MEMINFO", meminfo)
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    assert memory.available_bytes() == 4096 * 1024
    (tmp_path / "memory.max").write_text("2000000\n")
    (tmp_path / "memory.current").write_text("1500000\n")
    (tmp_path / "memory.stat").write_text("anon 1200000\ninactive_file 300000\n")
    assert memory.available_bytes() == 800_000
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.available_bytes() == 4096 * 1024
    meminfo.unlink()
    assert memory.available_bytes() is None
    memory.require(1 << 60, "anything", "nothing")
