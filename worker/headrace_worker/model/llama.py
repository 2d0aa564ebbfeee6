"""Llama 2 and 3, and models of their shape under that name (SmolLM2, TinyLlama, Yi).

Source: Touvron et al., "LLaMA", 2023; Grattafiori et al., "The Llama 3 Herd of Models", 2024.
"""

from __future__ import annotations

from headrace_worker.model.decoder import Decoder


class Llama(Decoder):
    """The plain decoder; biases and rotary scaling are values."""
