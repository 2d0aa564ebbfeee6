"""Qwen2 and Qwen2.5: Llama's layers with biases on q, k and v, windows in the upper ones if at all.

Source: Yang et al., "Qwen2 Technical Report", 2024.
"""

from __future__ import annotations

from headrace_worker.model.decoder import Decoder


class Qwen2(Decoder):
    """The plain decoder; biases and windows are values."""
