"""Qwen3: no biases; queries and keys are normalized per head before they are rotated.

Source: Yang et al., "Qwen3 Technical Report", 2025.
"""

from __future__ import annotations

from headrace_worker.model.decoder import Decoder


class Qwen3(Decoder):
    """The plain decoder; the norms of queries and keys are a value."""
