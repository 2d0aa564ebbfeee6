"""What every kind of model file is read into before the model itself is built."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from torch import Tensor

from headrace.errors import ModelError
from headrace_worker.model.config import ModelConfig


@dataclass(frozen=True, slots=True)
class TokenizerFacts:
    """What a gateway needs to turn text into tokens; see ModelRecord."""

    json: bytes
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None
    add_bos: bool
    chat_template: str
    template_tokens: dict[str, str]


class Tensors(Protocol):
    """Named tensors, read one at a time."""

    def names(self) -> set[str]:
        """The tensors it has, under Hugging Face's names."""
        ...

    def read(self, name: str) -> Tensor:
        """One tensor, dequantized, in the shape and row order of a Hugging Face checkpoint."""
        ...

    def stored_bytes(self, name: str) -> int:
        """What the tensor takes in its file."""
        ...

    def largest_values(self) -> int:
        """Numbers in the largest tensor."""
        ...


class Source(Tensors, Protocol):
    """An opened model. Opening has checked the architecture; no weight is read yet."""

    config: ModelConfig
    files: tuple[Path, ...]
    in_four_bits: bool
    """Whether its linear layers, but for the head, stand on grids of 16 levels for 32 columns."""

    def index(self) -> list[str]:
        """Name, type and shape of each tensor, a line each, sorted."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape that `read` gives."""
        ...

    def read_part(self, name: str, rows: Sequence[range], columns: range | None) -> Tensor:
        """What `read` would give of `rows`, one run after the other, and of `columns`.

        None: all columns. Of the file no more is read than these take, or little more: see there.
        """
        ...

    def tokenizer(self) -> TokenizerFacts:
        """Raises ModelError for a tokenizer that is not supported."""
        ...


def need(facts: dict[str, object], key: str, kind: type[int] | type[float], where: str) -> float:
    """A number that must be there. Raises ModelError naming the key."""
    value = facts.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ModelError(f"{where}: {key} is {value!r}, expected a number")
    return kind(value)
