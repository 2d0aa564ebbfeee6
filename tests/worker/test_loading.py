"""Reading models: the same numbers as transformers from a folder, and clear refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from headrace.errors import ModelError
from headrace_worker.loading import LoadedModel, load_model, memory
from headrace_worker.loading.load import resolve_dtype
from headrace_worker.model import linear
from worker.builders import assert_same_logits, logits_of, random_tokens, write_hf_folder

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


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
        ({"attention_bias": True}, r"q_proj\.bias is missing"),
        ({"sliding_window": 128}, "sliding_window"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantization_config"),
        ({"rope_parameters": {"rope_type": "mrope"}}, "rope type 'mrope'"),
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
    with pytest.raises(ModelError, match="quantization 'int7' is not one of auto, none, int8, int"):
        load_model(tmp_path, "m", quantization="int7")


def test_a_model_that_does_not_fit_is_refused_before_loading(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both sizes, and what would help."""
    monkeypatch.setattr(memory, "available_bytes", lambda: 1000)
    with pytest.raises(ModelError, match=r"needs .* MiB of memory, 0 MiB are available: it would"):
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


@pytest.mark.parametrize(
    ("flags", "kernels", "dtype", "expected"),
    [
        ("avx2", True, "auto", ("int8", torch.bfloat16)),
        ("avx2", True, "float32", ("none", torch.float32)),
        ("avx2", True, "bfloat16", ("none", torch.bfloat16)),
        ("avx2", False, "auto", ("none", torch.float32)),
        ("avx2 avx512_bf16", True, "auto", ("none", torch.bfloat16)),
    ],
)
def test_what_nothing_is_said_about_follows_processor_and_kernels(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    flags: str,
    kernels: bool,
    dtype: str,
    expected: tuple[str, torch.dtype],
) -> None:
    """int8 where the kernels multiply it and nothing else is asked for; a dtype is kept exact.

    int4 in its place where the file is in 4 bits already.
    """
    from headrace_worker.loading import load

    (tmp_path / "cpuinfo").write_text(f"flags : fpu {flags}")
    monkeypatch.setattr(load, "_CPUINFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(load.native, "library", lambda: object() if kernels else None)
    mode = load.resolve_quantization("auto", dtype=dtype)
    assert (mode, resolve_dtype(dtype, mode=mode)) == expected
    in_four_bits = load.resolve_quantization("auto", dtype=dtype, in_four_bits=True)
    assert in_four_bits == {"int8": "int4"}.get(mode, mode)
    assert load.resolve_quantization("auto", torch.device("cuda"), dtype) == "none"


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
