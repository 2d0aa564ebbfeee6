"""Qwen3-MoE: Qwen3's attention, a mixture of experts in place of most layers' MLPs.

Source: Yang et al., "Qwen3 Technical Report", 2025. Experts stand in checkpoints one by one:
`mlp.experts.N.gate_proj`, `up_proj`, `down_proj`; the router is `mlp.gate`.
"""

from __future__ import annotations

from headrace_worker.model.decoder import Decoder


class Qwen3Moe(Decoder):
    """The plain decoder; which layers have experts is a value."""
