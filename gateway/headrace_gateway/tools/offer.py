"""What a request offers a model to call, and how free the model is to do so.

Invariant: an Offer has at least one function, their names differ, and `only` names one of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any

NO_PARAMETERS: dict[str, Any] = {"type": "object", "properties": {}}


class Freedom(StrEnum):
    """AUTO: text, calls or both; REQUIRED: calls and nothing else."""

    AUTO = "auto"
    REQUIRED = "required"


@dataclass(frozen=True, slots=True)
class Function:
    """One function. `param` is the request's field that its parameters came from, for errors."""

    name: str
    description: str
    parameters: dict[str, Any]
    strict: bool
    param: str

    def for_template(self) -> dict[str, Any]:
        """As transformers hands it to chat templates; they count on every one of these keys."""
        return {
            "type": "function",
            "function": {
                "name": self.name,
                "description": self.description,
                "parameters": self.parameters,
            },
        }


@dataclass(frozen=True, slots=True)
class Offer:
    """`only`: the one function that must be called. `parallel`: several calls in one message."""

    functions: tuple[Function, ...]
    freedom: Freedom = Freedom.AUTO
    only: str | None = None
    parallel: bool = True

    @property
    def callable_functions(self) -> tuple[Function, ...]:
        """Those that may be called; the model is told of all of them."""
        return tuple(f for f in self.functions if self.only in (None, f.name))

    @property
    def names(self) -> frozenset[str]:
        return frozenset(function.name for function in self.callable_functions)
