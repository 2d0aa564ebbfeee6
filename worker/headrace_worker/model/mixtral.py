"""Mixtral: Mistral's attention, a mixture of experts in every layer.

Source: Jiang et al., "Mixtral of Experts", 2024.
"""

from __future__ import annotations

from headrace_worker.model.decoder import Decoder
from headrace_worker.model.layers import LayerNames


class Mixtral(Decoder):
    """The plain decoder; its checkpoints number an expert's matrices."""

    names = LayerNames(
        router="block_sparse_moe.gate",
        experts="block_sparse_moe.experts",
        expert_gate_up=("w1", "w3"),
        expert_down="w2",
    )
