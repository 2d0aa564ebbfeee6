"""What the worker's tests build from: jobs, tiny models, and a loop that steps an engine."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import quantize
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from headrace.cache_client import CacheClient
from headrace.clock import ManualClock
from headrace.policy.hashing import root_hash
from headrace.types import Band, Delta, Finish, Job, Sampling, pack_tokens
from headrace_worker.attention.choice import attention_over
from headrace_worker.cache_link import CacheLink
from headrace_worker.engine import Engine, EngineConfig
from headrace_worker.executor import Executor
from headrace_worker.kv.export import Export, ExportFacts
from headrace_worker.kv.pool import KvPool
from headrace_worker.loading import LoadedModel
from headrace_worker.policy.sequence import Sequence
from headrace_worker.policy.speculation import Guesser
from headrace_worker.results import BlockPayload, JobStory
from headrace_worker.step_inputs import StepInputs

STEPS_MAX = 20_000
PATIENCE_MS = 10_000
"""For a cache service on a busy machine."""


def make_job(id: str, prompt: Iterable[int], *, max_tokens: int = 8, **changes: Any) -> Job:
    """A greedy job for the model named `test`; sampling fields and job fields by name."""
    sampling = {"temperature": 0.0, "ignore_eos": True}
    for name in Sampling.__dataclass_fields__:
        if name in changes:
            sampling[name] = changes.pop(name)
    if "logged" in changes:
        changes["logged"] = pack_tokens(changes["logged"])
    fields = {"model": "test", "tenant": "t", "band": Band.STANDARD, "arrived_ms": 0} | changes
    return Job(
        id=id,
        gateway="g",
        prompt=pack_tokens(prompt),
        sampling=Sampling(max_tokens=max_tokens, **sampling),
        **fields,
    )


def make_engine(loaded: LoadedModel, kv_tokens: int = 8192, **limits: Any) -> Engine:
    return Engine(loaded, EngineConfig(kv_tokens=kv_tokens, **limits), ManualClock())


def make_link(engine: Engine, url: str) -> CacheLink:
    """An engine's link to the cache service at `url`. Belongs to the running event loop."""
    client = CacheClient(url, timeout_s=PATIENCE_MS / 1000)
    return CacheLink(
        client, layout=engine.layout, block_bytes=engine.block_bytes, limit_ms=PATIENCE_MS
    )


def make_sequence(id: str, prompt: Iterable[int], *, output: int = 4, **fields: Any) -> Sequence:
    tokens = list(prompt)
    return Sequence(id, tokens, root=root_hash("f", b""), tokens_max=len(tokens) + output, **fields)


def random_tokens(count: int, seed: int, vocab: int = 256) -> list[int]:
    source = random.Random(seed)
    return [source.randrange(vocab) for _ in range(count)]


@dataclass
class Output:
    """All that came of some jobs."""

    tokens: dict[str, list[int]] = field(default_factory=dict)
    finishes: dict[str, Finish] = field(default_factory=dict)
    cached: dict[str, int] = field(default_factory=dict)
    stories: dict[str, JobStory] = field(default_factory=dict)
    blocks: dict[bytes, BlockPayload] = field(default_factory=dict)
    offers: list[ExportFacts] = field(default_factory=list)
    deltas: list[Delta] = field(default_factory=list)
    steps: int = 0


def take_export(export: Export) -> BlockPayload:
    """What the cache service would get of an export."""
    data = bytearray(export.size_bytes)
    export.fill(memoryview(data))
    return BlockPayload(export.facts.hash, export.facts.parent, export.facts.depth, bytes(data))


def finish_all(
    engine: Engine, jobs: Iterable[Job] = (), *, after_step: Callable[[Output], None] | None = None
) -> Output:
    """Adds `jobs`, steps until nothing is left, checks integrity after every step."""
    out = Output()
    for job in jobs:
        engine.add(job)
    while engine.has_work:
        assert out.steps < STEPS_MAX, "the engine does not come to an end"
        result = engine.step()
        out.steps += 1
        named = [delta.job for delta in result.deltas]
        assert len(named) == len(set(named)), "at most one delta a job and step"
        for delta in result.deltas:
            assert delta.job not in out.finishes, "nothing comes after the end"
            out.tokens.setdefault(delta.job, []).extend(delta.tokens)
            out.cached[delta.job] = delta.cached_tokens
            if delta.finish is not None:
                out.finishes[delta.job] = delta.finish
        out.deltas += result.deltas
        out.stories.update({story.job: story for story in result.stories})
        for export in result.blocks:
            facts = export.facts
            out.blocks[facts.hash] = take_export(export)
            out.offers.append(facts)
        engine.check_integrity()
        if after_step is not None:
            after_step(out)
    return out


def guesses_from(texts: list[list[int]]) -> Callable[..., tuple[int, ...]]:
    """A `Guesser.guess` that knows how `texts` go on, and is wrong in the middle now and then."""

    def guess(_: Guesser, tokens: Iterable[int], price: float, limit: int) -> tuple[int, ...]:
        known = list(tokens)
        ahead = next(text for text in texts if text[: len(known)] == known)[len(known) :]
        ahead = ahead[: min(5, limit)]
        if len(known) % 3 == 0 and len(ahead) > 2:
            ahead[2] += 1 if ahead[2] == 0 else -1
        return tuple(ahead)

    return guess


def logits_of(loaded: LoadedModel, prompt: list[int]) -> torch.Tensor:
    """Logits of all rows of one prompt in one chunk, float32 [N, vocab]."""
    pool = KvPool(loaded.config, -(-len(prompt) // 16), loaded.dtype)
    places = np.arange(len(prompt))
    executor = Executor(loaded.model, attention_over(pool, loaded.config))
    logits = executor.forward(
        StepInputs(
            tokens=np.array(prompt, np.int64),
            positions=places,
            slots=places,
            block_tables=[list(range(pool.blocks))],
            lengths=[len(prompt)],
            query_starts=[0, len(prompt)],
            rows=None,
        )
    )
    assert logits is not None
    return logits


def assert_same_logits(loaded: LoadedModel, model: Any, limit: float = 1e-4) -> None:
    """Of one prompt longer than any window, against transformers' `model`."""
    prompt = random_tokens(150, 3)
    with torch.inference_mode():
        expected = model(torch.tensor([prompt])).logits[0].float()
    torch.testing.assert_close(logits_of(loaded, prompt), expected, rtol=limit, atol=limit)


TINY: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}


def tiny_tokenizer() -> Tokenizer:
    """A byte-level BPE of TINY's vocabulary, trained on a few lines."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=TINY["vocab_size"],
        special_tokens=["<|begin|>", "<|end|>", "<|endoftext|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    lines = ["the miller opens the headrace", "water turns the wheel, the wheel turns the mill"] * 4
    tokenizer.train_from_iterator([*lines, "1234 12 2024", "\n\n  \n"], trainer)
    return tokenizer


def split_as_named(tokenizer: Any, pre: str) -> Any:
    """transformers' tokenizer of a GGUF file, with the splitting rule that the file names.

    transformers reads `smollm` as GPT-2's rule; the checkpoint's own tokenizer.json, and llama.cpp,
    split digits off first. It leaves out that Qwen's tokenizer.json composes characters.
    """
    if pre == "qwen2":
        tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    if pre == "smollm":
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        )
    return tokenizer


def write_hf_folder(folder: Path, *, shard: str = "5GB", **changes: Any) -> Any:
    """A random Llama of TINY's shape with `changes`, saved to `folder`; transformers' model."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(7)
    model = LlamaForCausalLM(LlamaConfig(**(TINY | changes))).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # larger than default, so that errors show
            if parameter.ndim > 1:
                parameter.normal_(0, 0.1)
            else:
                parameter.uniform_(0.5, 1.5)
    model.save_pretrained(folder, max_shard_size=shard)
    tiny_tokenizer().save(str(folder / "tokenizer.json"))
    settings = {"bos_token": "<|begin|>", "eos_token": {"content": "<|end|>"}}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 0]}))
    return model


_GGUF_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def _gguf_name(name: str) -> str:
    top = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    stem = name.removesuffix(".weight")
    if stem in top:
        return f"{top[stem]}.weight"
    _, _, layer, rest = stem.split(".", 3)
    return f"blk.{layer}.{_GGUF_NAMES[rest]}.weight"


def _interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's row order of q and k: the two rows of a rotary pair side by side."""
    rows, columns = weight.shape
    halves = weight.reshape(heads, 2, rows // heads // 2, columns)
    return halves.swapaxes(1, 2).reshape(rows, columns)


def write_gguf(
    path: Path,
    model: Any,
    kind: GGMLQuantizationType,
    *,
    pre: str = "gpt-2",
    architecture: str = "llama",
    rope_factors: np.ndarray | None = None,
    extra: dict[str, str] | None = None,
    raw: dict[str, tuple[np.ndarray, GGMLQuantizationType]] | None = None,
) -> None:
    """transformers' Llama `model` as a GGUF file with matrices quantized to `kind`.

    `raw` tensors, by GGUF name, are written as the bytes they are.
    """
    config = model.config
    writer = GGUFWriter(path, architecture)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    add_gguf_tokenizer(writer, pre)
    for key, value in (extra or {}).items():
        writer.add_string(key, value)
    for name, parameter in model.named_parameters():
        values = parameter.detach().float().numpy()
        if "q_proj" in name:
            values = _interleaved(values, config.num_attention_heads)
        if "k_proj" in name:
            values = _interleaved(values, config.num_key_value_heads)
        if _gguf_name(name) in (raw or {}):
            data, raw_kind = raw[_gguf_name(name)]
            writer.add_tensor(_gguf_name(name), data, raw_dtype=raw_kind)
        elif values.ndim == 1:
            writer.add_tensor(_gguf_name(name), values)
        else:
            writer.add_tensor(_gguf_name(name), quantize(values, kind), raw_dtype=kind)
    if rope_factors is not None:
        writer.add_tensor("rope_freqs.weight", rope_factors)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_gguf_tokenizer(writer: GGUFWriter, pre: str) -> None:
    facts = json.loads(tiny_tokenizer().to_str())["model"]
    tokens = sorted(facts["vocab"], key=facts["vocab"].__getitem__)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3] * 3 + [1] * (len(tokens) - 4) + [4])
    writer.add_token_merges([" ".join(pair) for pair in facts["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(1)
    writer.add_add_bos_token(False)
    writer.add_chat_template("{{ messages[0]['content'] }}")
