"""What a split cannot exceed: tokens a second by memory bandwidth, arithmetic and links.

Invariant: these are bounds, not forecasts: whatever a kernel loses is on top. Each comes with its
arithmetic, so that one figure can be doubted without the others. A step takes at least as long as
its dearest resource: the weights and KV that a device reads, what it multiplies, what its
all-reduces carry (Williams et al., "Roofline", 2009). Latencies of kernels and links are left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from headrace.policy.devices import Device
from headrace.policy.model_shape import ModelShape, Precision

ATTENTION_FLOPS = 4
"""Per number of a query and token that it sees: two for q · k, two for what is mixed."""
REDUCES_PER_LAYER = 2
"""After attention and after the MLP."""


@dataclass(frozen=True, slots=True)
class Bound:
    """At most so many tokens a second, by `by`; `arithmetic` says why."""

    name: str
    tokens_per_s: float
    by: str
    arithmetic: str


@dataclass(frozen=True, slots=True)
class Load:
    """What a replica works on: `streams` at once, each with `held` tokens of KV on average."""

    streams: int
    held: int


@dataclass(frozen=True, slots=True)
class _Work:
    """What one stage's device has to do for one pass over some tokens."""

    weight_bytes: float
    kv_bytes: float
    flops: float
    link_bytes: float

    def seconds(self, device: Device) -> tuple[float, str]:
        """The least time it takes, and what takes it."""
        parts = {
            "memory bandwidth": (self.weight_bytes + self.kv_bytes) / device.bandwidth,
            "arithmetic": self.flops / device.flops if device.flops else 0.0,
            "links": self.link_bytes / device.link if device.link else 0.0,
        }
        dearest = max(parts, key=lambda part: parts[part])
        return parts[dearest], dearest


def bounds(
    shape: ModelShape,
    how: Precision,
    device: Device,
    stages: Sequence[range],
    tensor: int,
    load: Load,
) -> list[Bound]:
    """Of one replica: one stream, all streams, prefill. Empty where the device's speed is unknown.

    Prefill needs the device's arithmetic, the others its memory bandwidth.
    """
    found = []
    if device.bandwidth:
        found.append(_one_stream(shape, how, device, stages, tensor, load))
        found.append(_all_streams(shape, how, device, stages, tensor, load))
    if device.flops:
        found.append(_prefill(shape, how, device, stages, tensor, load))
    return found


def _decode_work(
    shape: ModelShape,
    how: Precision,
    layers: range,
    tensor: int,
    load: Load,
    *,
    last: bool,
) -> _Work:
    """One stage's pass over one new token of each stream."""
    weights = flops = kv = 0.0
    for layer in layers:
        seen = shape.seen_tokens(layer, load.held)
        weights += shape.layer_read_bytes(layer, tensor, how, load.streams)
        kv += load.streams * seen * shape.kv_layer_bytes(tensor, how)
        flops += 2 * shape.layer_active(layer, tensor)
        flops += ATTENTION_FLOPS * shape.heads_on(tensor) * shape.head_dim * seen
    if last:
        weights += shape.head_bytes(tensor, how)
        flops += 2 * shape.vocab_on(tensor) * shape.hidden_size
    return _Work(weights, kv, load.streams * flops, _reduced(shape, how, layers, tensor, load))


def _reduced(shape: ModelShape, how: Precision, layers: range, tensor: int, load: Load) -> float:
    """Bytes that a device sends for the all-reduces of a pass: a ring's share."""
    whole = REDUCES_PER_LAYER * len(layers) * load.streams * shape.hidden_size * how.item_bytes
    return whole * 2 * (tensor - 1) / tensor


def _one_stream(
    shape: ModelShape,
    how: Precision,
    device: Device,
    stages: Sequence[range],
    tensor: int,
    load: Load,
) -> Bound:
    """Its token passes all stages, one after the other."""
    alone = Load(1, load.held)
    works = [
        _decode_work(shape, how, layers, tensor, alone, last=layers is stages[-1])
        for layers in stages
    ]
    times = [work.seconds(device) for work in works]
    total = sum(seconds for seconds, _ in times)
    read = sum(work.weight_bytes + work.kv_bytes for work in works)
    kv = sum(work.kv_bytes for work in works)
    return Bound(
        "decode, one stream",
        1 / total,
        max(times)[1],
        f"{_gb(read)} read a token on each device of TP{tensor} ({_gb(kv)} of it KV of "
        f"{load.held:,} tokens) at {_speed(device)}: {total * 1e3:.2f} ms",
    )


def _all_streams(
    shape: ModelShape,
    how: Precision,
    device: Device,
    stages: Sequence[range],
    tensor: int,
    load: Load,
) -> Bound:
    """As many groups of streams are under way as there are stages; the dearest sets the pace."""
    group = Load(max(1, load.streams // len(stages)), load.held)
    works = [
        _decode_work(shape, how, layers, tensor, group, last=layers is stages[-1])
        for layers in stages
    ]
    seconds, by = max(work.seconds(device) for work in works)
    work = max(works, key=lambda work: work.seconds(device)[0])
    told = {
        "memory bandwidth": f"{_gb(work.weight_bytes)} of weights and {_gb(work.kv_bytes)} of KV "
        f"at {_speed(device)}",
        "arithmetic": f"{work.flops / 1e12:.2f} Tflop at {device.flops / 1e12:,.0f} Tflop/s",
        "links": f"{_gb(work.link_bytes)} at {device.link / 1e9:,.0f} GB/s",
    }[by]
    filled = min(load.streams, group.streams * len(stages))
    return Bound(
        f"decode, {filled} streams",
        group.streams / seconds if filled >= len(stages) else filled / (seconds * len(stages)),
        by,
        f"{group.streams} tokens a pass of the dearest stage: {told}, {seconds * 1e3:.2f} ms",
    )


def _prefill(
    shape: ModelShape,
    how: Precision,
    device: Device,
    stages: Sequence[range],
    tensor: int,
    load: Load,
) -> Bound:
    """Long prompts in full batches: weights are read once for many tokens, so arithmetic counts."""
    dearest, by, flops, sent = 0.0, "arithmetic", 0.0, 0.0
    for layers in stages:
        work = sum(
            2 * shape.layer_active(i, tensor)
            # a row of a prompt sees half of it on average
            + ATTENTION_FLOPS
            * shape.heads_on(tensor)
            * shape.head_dim
            * shape.seen_tokens(i, load.held)
            / 2
            for i in layers
        )
        carried = _reduced(shape, how, layers, tensor, Load(1, 0))
        times = {"arithmetic": work / device.flops}
        times["links"] = carried / device.link if device.link else 0.0
        name = max(times, key=lambda part: times[part])
        if times[name] > dearest:
            dearest, by, flops, sent = times[name], name, work, carried
    told = (
        f"{flops / 1e9:,.1f} Gflop a token at {device.flops / 1e12:,.0f} Tflop/s"
        if by == "arithmetic"
        else f"{sent / 1e6:.2f} MB a token over links of {device.link / 1e9:,.0f} GB/s"
    )
    return Bound("prefill", 1 / dearest, by, f"dearest stage: {told}, {dearest * 1e6:.1f} us")


def _speed(device: Device) -> str:
    return f"{device.bandwidth / 1e9:,.0f} GB/s"


def _gb(size_bytes: float) -> str:
    return f"{size_bytes / 1e9:,.2f} GB"
