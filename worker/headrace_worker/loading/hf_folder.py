"""Models as Hugging Face folders: config.json, safetensors, tokenizer.json.

Invariant: only data is read. No pickle, no code from the folder (`auto_map` is ignored), and a
setting that would change the computation and is not implemented stops the load by name.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer
from torch import Tensor

from headrace.errors import ModelError
from headrace_worker.loading.source import TokenizerFacts, need
from headrace_worker.model import ModelConfig, architecture, rope
from headrace_worker.model.config import Rope

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_DTYPES = frozenset({"F32", "F16", "BF16"})


class HfSource:
    """An opened folder. Raises ModelError when it cannot be run."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._facts = _read_json(folder / "config.json")
        kind = str(self._facts.get("model_type"))
        architecture(kind)
        self._refuse_unknown()
        self.files = self._weight_files()
        self._where, self._shapes = self._open()
        self.config = self._config(kind)

    def _refuse_unknown(self) -> None:
        plain: dict[str, tuple[Any, ...]] = {
            "hidden_act": ("silu",),
            "attention_bias": (False, None),
            "mlp_bias": (False, None),
            "sliding_window": (None,),
            "quantization_config": (None,),
        }
        for key, allowed in plain.items():
            if key in self._facts and self._facts[key] not in allowed:
                raise ModelError(f"config.json: {key} = {self._facts[key]!r} is not supported")

    def _weight_files(self) -> tuple[Path, ...]:
        index = self._folder / _INDEX
        if not index.exists():
            files = [self._folder / _SINGLE]
        else:
            names = set(_read_json(index).get("weight_map", {}).values())
            if any(Path(str(name)).name != name for name in names):
                raise ModelError(f"{_INDEX} names files outside the folder")
            files = [self._folder / name for name in sorted(names)]
        for file in files:
            if not file.exists():
                raise ModelError(f"{self._folder.name} has no {file.name}: safetensors only")
        return tuple(files)

    def _open(self) -> tuple[dict[str, Path], dict[str, tuple[str, tuple[int, ...]]]]:
        where: dict[str, Path] = {}
        shapes: dict[str, tuple[str, tuple[int, ...]]] = {}
        for file in self.files:
            try:
                with safe_open(file, framework="pt") as opened:
                    for name in opened.keys():  # noqa: SIM118 (it is no mapping)
                        part = opened.get_slice(name)
                        where[name] = file
                        shapes[name] = (part.get_dtype(), tuple(part.get_shape()))
            except (SafetensorError, OSError) as error:
                raise ModelError(f"{file.name} is not readable: {error}") from error
        for name, (dtype, _) in shapes.items():
            if dtype not in _DTYPES:
                raise ModelError(f"tensor {name} has type {dtype}, which is not supported")
        return where, shapes

    def _config(self, kind: str) -> ModelConfig:
        facts = self._facts

        def integer(key: str, default: int | None = None) -> int:
            if default is not None and facts.get(key) is None:
                return default
            return int(need(facts, key, int, "config.json"))

        heads, hidden = integer("num_attention_heads"), integer("hidden_size")
        head_dim = integer("head_dim", hidden // heads)
        return ModelConfig(
            architecture=kind,
            vocab_size=integer("vocab_size"),
            hidden_size=hidden,
            intermediate_size=integer("intermediate_size"),
            layers=integer("num_hidden_layers"),
            heads=heads,
            kv_heads=integer("num_key_value_heads", heads),
            head_dim=head_dim,
            norm_eps=need(facts, "rms_norm_eps", float, "config.json"),
            context_tokens=integer("max_position_embeddings"),
            tied=bool(facts.get("tie_word_embeddings", False)),
            ropes=(Rope(_frequencies(facts, head_dim)),),
        )

    def index(self) -> list[str]:
        return sorted(f"{name} {kind} {shape}" for name, (kind, shape) in self._shapes.items())

    def names(self) -> set[str]:
        # rotary tables that old checkpoints carry are computed here, and so is a tied head
        unused = {"lm_head.weight"} if self.config.tied else set()
        return {name for name in self._shapes if not name.endswith("rotary_emb.inv_freq")} - unused

    def largest_values(self) -> int:
        return max(int(torch.Size(shape).numel()) for _, shape in self._shapes.values())

    def read(self, name: str) -> Tensor:
        with safe_open(self._where[name], framework="pt") as opened:
            tensor: Tensor = opened.get_tensor(name)
        return tensor

    def tokenizer(self) -> TokenizerFacts:
        file = self._folder / "tokenizer.json"
        try:
            text = file.read_text()
            tokenizer = Tokenizer.from_str(text)
        except Exception as error:  # the library raises bare Exception for a bad file
            raise ModelError(f"{file.name} is not readable: {error}", code="tokenizer") from error
        settings = _read_json(self._folder / "tokenizer_config.json", missing_ok=True)
        named = {}
        for name in ("bos_token", "eos_token", "unk_token", "pad_token"):
            value = settings.get(name)
            content = value.get("content") if isinstance(value, dict) else value
            if isinstance(content, str):
                named[name] = content
        bos = tokenizer.token_to_id(named["bos_token"]) if "bos_token" in named else None
        start = tokenizer.encode("a").ids[:1]
        return TokenizerFacts(
            json=text.encode(),
            eos_token_ids=self._ends(tokenizer, named),
            bos_token_id=bos,
            add_bos=bos is not None and start == [bos],
            chat_template=self._template(settings),
            template_tokens=named,
        )

    def _ends(self, tokenizer: Tokenizer, named: dict[str, str]) -> tuple[int, ...]:
        generation = _read_json(self._folder / "generation_config.json", missing_ok=True)
        for facts in (generation, self._facts):
            ends = facts.get("eos_token_id")
            if ends is not None:
                return tuple(ends) if isinstance(ends, list) else (int(ends),)
        end = tokenizer.token_to_id(named["eos_token"]) if "eos_token" in named else None
        return () if end is None else (end,)

    def _template(self, settings: dict[str, Any]) -> str:
        file = self._folder / "chat_template.jinja"
        if file.exists():
            return file.read_text()
        template = settings.get("chat_template", "")
        if isinstance(template, list):  # several by name
            named = {str(entry.get("name")): entry.get("template") for entry in template}
            template = named.get("default", "")
        return str(template or "")


def _read_json(path: Path, *, missing_ok: bool = False) -> dict[str, Any]:
    if missing_ok and not path.exists():
        return {}
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ModelError(f"{path.name} is not readable: {error}") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path.name}: expected an object")
    return value


def _frequencies(facts: dict[str, Any], head_dim: int) -> tuple[float, ...]:
    """Both spellings: `rope_parameters`, and the older `rope_theta` with `rope_scaling`."""
    rules: dict[str, Any] = facts.get("rope_parameters") or facts.get("rope_scaling") or {}
    kind = rules.get("rope_type", rules.get("type", "default"))
    theta = float(rules.get("rope_theta", facts.get("rope_theta", 10_000.0)))
    partial = float(rules.get("partial_rotary_factor", facts.get("partial_rotary_factor", 1.0)))
    base = rope.frequencies(head_dim, theta)
    if partial != 1.0:
        raise ModelError(f"config.json: partial_rotary_factor = {partial} is not supported")
    if kind == "default":
        return tuple(base.tolist())
    if kind != "llama3":
        raise ModelError(f"config.json: rope type {kind!r} is not supported: default and llama3")
    where = "config.json rope scaling"
    scaled = rope.llama3_scaled(
        base,
        factor=need(rules, "factor", float, where),
        low=need(rules, "low_freq_factor", float, where),
        high=need(rules, "high_freq_factor", float, where),
        original_tokens=int(need(rules, "original_max_position_embeddings", int, where)),
    )
    return tuple(scaled.tolist())
