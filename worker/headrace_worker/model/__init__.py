"""Model code by architecture. Adding one: a module here and a line in `ARCHITECTURES`."""

from __future__ import annotations

from headrace.errors import ModelError
from headrace_worker.model.config import ModelConfig
from headrace_worker.model.llama import Llama
from headrace_worker.model.weights import Weights

ARCHITECTURES: dict[str, type[Llama]] = {"llama": Llama}


def architecture(name: str) -> type[Llama]:
    """The model class for `name`. Raises ModelError with the known ones."""
    try:
        return ARCHITECTURES[name]
    except KeyError:
        known = ", ".join(sorted(ARCHITECTURES))
        raise ModelError(
            f"architecture {name!r} is not supported; supported: {known}", code="architecture"
        ) from None


__all__ = ["ARCHITECTURES", "Llama", "ModelConfig", "Weights", "architecture"]
