"""Model code by architecture. Adding one: a module here and a line in `ARCHITECTURES`."""

from __future__ import annotations

from headrace.errors import ModelError
from headrace_worker.model.config import ModelConfig
from headrace_worker.model.decoder import Decoder
from headrace_worker.model.gemma3 import Gemma3
from headrace_worker.model.llama import Llama
from headrace_worker.model.mistral import Mistral
from headrace_worker.model.mixtral import Mixtral
from headrace_worker.model.phi3 import Phi3
from headrace_worker.model.qwen2 import Qwen2
from headrace_worker.model.qwen3 import Qwen3
from headrace_worker.model.qwen3_moe import Qwen3Moe
from headrace_worker.model.smollm3 import SmolLM3
from headrace_worker.model.weights import Weights

ARCHITECTURES: dict[str, type[Decoder]] = {
    "llama": Llama,
    "smollm3": SmolLM3,
    "mistral": Mistral,
    "mixtral": Mixtral,
    "qwen2": Qwen2,
    "qwen3": Qwen3,
    "qwen3_moe": Qwen3Moe,
    "gemma3_text": Gemma3,
    "phi3": Phi3,
}
"""By Hugging Face's `model_type`."""


def architecture(name: str) -> type[Decoder]:
    """The model class for `name`. Raises ModelError with the known ones."""
    try:
        return ARCHITECTURES[name]
    except KeyError:
        known = ", ".join(sorted(ARCHITECTURES))
        raise ModelError(
            f"architecture {name!r} is not supported; supported: {known}", code="architecture"
        ) from None


__all__ = ["ARCHITECTURES", "Decoder", "ModelConfig", "Weights", "architecture"]
