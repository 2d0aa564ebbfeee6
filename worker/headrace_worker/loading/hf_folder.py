"""Models as Hugging Face folders: config.json, safetensors, tokenizer.json.

Invariant: only data is read. No pickle, no code from the folder (`auto_map` is ignored), and a
setting that would change the computation and is not implemented stops the load by name.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer
from torch import Tensor

from headrace.errors import ModelError
from headrace_worker.loading.hf_config import read_config
from headrace_worker.loading.source import TokenizerFacts

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_BYTES = {"F32": 4, "F16": 2, "BF16": 2}
"""Types of weights that are read, with their sizes."""

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")

_OTHER_TOKENIZERS = ("tokenizer.model", "tekken.json", "spiece.model")

_TEXT_PREFIXES = ("language_model.", "model.language_model.")
_OTHER_PARTS = re.compile(r"(model\.)?(vision_tower|multi_modal_projector)\.")
"""Weights of a larger model beside its text part."""


@dataclass(frozen=True, slots=True)
class _Stored:
    """Where a tensor lies: its file, its name there, its type and shape."""

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def values(self) -> int:
        return math.prod(self.shape)


class HfSource:
    """An opened folder. Raises ModelError when it cannot be run.

    Files stay mapped while it lives: a weight that keeps its type is never copied.
    """

    in_four_bits = False

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._facts = _read_json(folder / "config.json")
        read = read_config(self._facts)
        self.config = read.model
        self.files = self._weight_files()
        self._opened = {file: _open(file) for file in self.files}
        self._tensors = self._list_tensors(read.prefixed)

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
                raise ModelError(self._no_weights(file.name))
        return tuple(files)

    def _no_weights(self, missing: str) -> str:
        pickles = sorted(f.name for kind in _PICKLES for f in self._folder.glob(kind))
        if not pickles:
            return f"{self._folder.name} has no {missing}: safetensors only"
        return (
            f"{self._folder.name} has its weights as pickle ({pickles[0]}), which runs code when "
            f"it is read: safetensors only. Convert it with transformers: "
            f"from_pretrained(…).save_pretrained(…)"
        )

    def _list_tensors(self, prefixed: bool) -> dict[str, _Stored]:
        tensors = {}
        for file, opened in self._opened.items():
            for name in opened.keys():  # noqa: SIM118 (it is no mapping)
                part = opened.get_slice(name)
                stored = _Stored(file, name, part.get_dtype(), tuple(part.get_shape()))
                if prefixed and _OTHER_PARTS.match(name):
                    continue
                tensors[_without_prefix(name) if prefixed else name] = stored
        for name, stored in tensors.items():
            if stored.dtype not in _BYTES:
                raise ModelError(f"tensor {name} has type {stored.dtype}, which is not supported")
        return tensors

    def index(self) -> list[str]:
        return sorted(f"{t.name} {t.dtype} {t.shape}" for t in self._tensors.values())

    def names(self) -> set[str]:
        # rotary tables that old checkpoints carry are computed here, and so is a tied head
        unused = {"lm_head.weight"} if self.config.tied else set()
        return {name for name in self._tensors if not name.endswith("rotary_emb.inv_freq")} - unused

    def largest_values(self) -> int:
        return max(stored.values for stored in self._tensors.values())

    def stored_bytes(self, name: str) -> int:
        stored = self._tensors[name]
        return stored.values * _BYTES[stored.dtype]

    def read(self, name: str) -> Tensor:
        stored = self._tensors[name]
        tensor: Tensor = self._opened[stored.file].get_tensor(stored.name)
        return tensor

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensors[name].shape

    def read_part(self, name: str, rows: Sequence[range], columns: range | None) -> Tensor:
        """Exactly these rows' and columns' bytes leave the file, or whole pages of them."""
        stored = self._tensors[name]
        whole = self._opened[stored.file].get_slice(stored.name)
        parts: list[Tensor] = [
            whole[run.start : run.stop]
            if columns is None
            else whole[run.start : run.stop, columns.start : columns.stop]
            for run in rows
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def tokenizer(self) -> TokenizerFacts:
        file = self._folder / "tokenizer.json"
        if not file.exists():
            raise ModelError(self._no_tokenizer(), code="tokenizer")
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

    def _no_tokenizer(self) -> str:
        other = next((f for f in _OTHER_TOKENIZERS if (self._folder / f).exists()), None)
        if other is None:
            return f"{self._folder.name} has no tokenizer.json"
        return (
            f"{self._folder.name} has its tokenizer as {other} only, which is not supported. Make "
            f"a tokenizer.json of it with transformers: "
            f"AutoTokenizer.from_pretrained(…).save_pretrained(…)"
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


def _open(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{file.name} is not readable: {error}") from error


def _without_prefix(name: str) -> str:
    """`language_model.model.layers…` or `model.language_model.layers…` as `model.layers…`."""
    for prefix in _TEXT_PREFIXES:
        if name.startswith(prefix):
            rest = name.removeprefix(prefix)
            return rest if rest.startswith(("model.", "lm_head.")) else f"model.{rest}"
    return name
