"""SmolLM3: Llama's layers, some of which carry no position (NoPE, `layer_ropes`).

Source: Bakouch et al., "SmolLM3", Hugging Face, 2025; Yang et al., "RoPE to NoRoPE and Back
Again", 2025.
"""

from __future__ import annotations

from headrace_worker.model.decoder import Decoder


class SmolLM3(Decoder):
    """The plain decoder; which layers are NoPE is a value."""
