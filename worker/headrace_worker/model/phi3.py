"""Phi-3, Phi-3.5 and Phi-4: Llama's layers from checkpoints with fused matrices.

Source: Abdin et al., "Phi-3 Technical Report", 2024. Long contexts are LongRoPE, some sizes rotate
a part of each head, some have a window: all values.
"""

from __future__ import annotations

from headrace_worker.model.decoder import Decoder
from headrace_worker.model.layers import LayerNames


class Phi3(Decoder):
    """The plain decoder; q, k, v and gate, up stand in one matrix each."""

    names = LayerNames(qkv=("self_attn.qkv_proj",), gate_up=("mlp.gate_up_proj",))
