"""Mistral: Llama's layers, whose rows may see a window only.

Source: Jiang et al., "Mistral 7B", 2023.
"""

from __future__ import annotations

from headrace_worker.model.decoder import Decoder


class Mistral(Decoder):
    """The plain decoder; the window is a value."""
