"""Which splits of a model fit a fleet, what each holds and could do, and which one to take.

Invariant: pure arithmetic over a model's shape and a fleet's figures; a split either fits, with the
KV tokens that it has room for and its limits, or is refused with the division or the sum that does
not come out. Tensor parallel stays within a host, whose links carry its all-reduces; stages and
replicas may cross hosts. Data parallel is more workers, so a split is repeated as often as it fits.

The order of those that fit is one score: tokens a second over all replicas, by the bound of a full
batch; where no speed is known, tokens of KV over all replicas. Of equals the one with the fewest
devices a replica: less to send, and less that fails together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from headrace.errors import SettingsError
from headrace.policy.devices import GIB, Fleet
from headrace.policy.limits import Bound, Load, bounds
from headrace.policy.model_shape import ModelShape, Precision, whole_blocks
from headrace.policy.splits import (
    pipeline_refusal,
    replication,
    split_layers,
    tensor_refusal,
    unevenness,
)
from headrace.types import BLOCK_TOKENS

MEMORY_SHARE = {"gpu": 0.92, "cpu": 0.8}
"""Of a device's memory, what a worker may take: allocators fragment, a machine has other work."""
RUNTIME_BYTES = {"gpu": GIB, "cpu": GIB // 2}
"""Python, torch, a CUDA context, libraries' workspaces, buffers of collectives."""
KV_TOKENS_MIN = 2_048
"""A replica that holds fewer tokens of KV serves nobody."""
SPLITS_MAX = 4_096


@dataclass(frozen=True, slots=True)
class Wish:
    """What is asked of each replica.

    `context_tokens`: the longest request to serve, 0 for all that the model can. `streams`: jobs at
    a time. `held_tokens`: what a job holds on average. `step_tokens`: a step's budget. `tensor`,
    `pipeline`: this split and no other, 0 for any.
    """

    context_tokens: int = 0
    streams: int = 64
    held_tokens: int = 2_048
    step_tokens: int = 2_048
    tensor: int = 0
    pipeline: int = 0

    def __post_init__(self) -> None:
        for name in ("context_tokens", "tensor", "pipeline"):
            if getattr(self, name) < 0:
                raise SettingsError(f"{name} = {getattr(self, name)} is negative")
        for name in ("streams", "held_tokens", "step_tokens"):
            if getattr(self, name) < 1:
                raise SettingsError(f"{name} = {getattr(self, name)} is below 1")


@dataclass(frozen=True, slots=True)
class StageMemory:
    """One device of a stage: what its memory goes to, in bytes; `kv_bytes` is what is left."""

    layers: range
    weights_bytes: int
    step_bytes: int
    runtime_bytes: int
    usable_bytes: int
    kv_token_bytes: int

    @property
    def kv_bytes(self) -> int:
        return self.usable_bytes - self.weights_bytes - self.step_bytes - self.runtime_bytes

    @property
    def kv_tokens(self) -> int:
        return whole_blocks(max(0, self.kv_bytes) // self.kv_token_bytes)

    def told(self) -> str:
        """The sum, in words."""
        left = (
            f"leave {_gib(self.kv_bytes)} GiB for KV, {self.kv_token_bytes:,} bytes a token"
            if self.kv_bytes > 0
            else f"are {_gib(-self.kv_bytes)} GiB too many"
        )
        return (
            f"weights {_gib(self.weights_bytes)} + step {_gib(self.step_bytes)} + runtime "
            f"{_gib(self.runtime_bytes)} GiB of {_gib(self.usable_bytes)} usable {left}"
        )


@dataclass(frozen=True, slots=True)
class Split:
    """One way to lay a model over a fleet. `refusal` empty: it fits.

    `kv_tokens` are a replica's; `bounds` too. `unused`: devices that are left over. `reasons`: what
    an operator should know of it.
    """

    tensor: int
    pipeline: int
    replicas: int = 0
    unused: int = 0
    stages: tuple[StageMemory, ...] = ()
    kv_tokens: int = 0
    bounds: tuple[Bound, ...] = ()
    reasons: tuple[str, ...] = ()
    refusal: str = ""

    @property
    def fits(self) -> bool:
        return not self.refusal

    @property
    def devices(self) -> int:
        """Of one replica."""
        return self.tensor * self.pipeline

    @property
    def score(self) -> float:
        """See the module: higher is better."""
        full = [bound.tokens_per_s for bound in self.bounds if bound.name.startswith("decode, ")]
        return self.replicas * (full[-1] if full else self.kv_tokens)


@dataclass(frozen=True, slots=True)
class Topology:
    """All splits of a model over a fleet: those that fit, the best first; those that do not."""

    fitting: tuple[Split, ...]
    refused: tuple[Split, ...]
    notes: tuple[str, ...] = field(default=())


def plan(shape: ModelShape, how: Precision, fleet: Fleet, wish: Wish) -> Topology:
    """Every split that could be, judged. Raises SettingsError for a wish that cannot be."""
    if wish.context_tokens > shape.context_tokens:
        raise SettingsError(
            f"a context of {wish.context_tokens:,} tokens is more than the model's "
            f"{shape.context_tokens:,}"
        )
    splits = [judge(shape, how, fleet, wish, *sizes) for sizes in _sizes(fleet, wish)]
    fitting = sorted(
        (split for split in splits if split.fits),
        key=lambda split: (-split.score, split.devices, split.pipeline),
    )
    refused = tuple(split for split in splits if not split.fits)
    return Topology(tuple(fitting), refused, tuple(_notes(shape, how, fleet)))


def _sizes(fleet: Fleet, wish: Wish) -> list[tuple[int, int]]:
    """(tensor, pipeline) worth looking at: powers of two, what divides the fleet, what is asked."""

    def steps(most: int, of: int) -> list[int]:
        powers = {1 << i for i in range(most.bit_length())}
        divisors = {i for i in range(1, most + 1) if of % i == 0}
        return sorted(size for size in powers | divisors if size <= most)

    tensors = [wish.tensor] if wish.tensor else steps(_tensor_max(fleet), fleet.per_host)
    stages = [wish.pipeline] if wish.pipeline else steps(fleet.count, fleet.count)
    asked = bool(wish.tensor and wish.pipeline)
    sizes = [(t, p) for t in tensors for p in stages if asked or t * p <= fleet.count]
    return (sizes or [(tensors[0], stages[0])])[:SPLITS_MAX]


def _tensor_max(fleet: Fleet) -> int:
    """Machines of a CPU fleet may be split over: their links are what they are."""
    return fleet.per_host if fleet.device.kind == "gpu" else fleet.count


def judge(
    shape: ModelShape, how: Precision, fleet: Fleet, wish: Wish, tensor: int, pipeline: int
) -> Split:
    """One split: what it holds and could do, or why it cannot be."""
    refusal = (
        _fleet_refusal(fleet, tensor, pipeline)
        or tensor_refusal(shape, tensor)
        or pipeline_refusal(shape, pipeline)
    )
    if refusal:
        return Split(tensor, pipeline, refusal=refusal)
    runs = stage_layers(shape, pipeline)
    stages = tuple(
        _memory(shape, how, fleet, wish, tensor, runs, stage) for stage in range(pipeline)
    )
    tokens = min(stage.kv_tokens for stage in stages)
    refusal = _memory_refusal(shape, wish, stages, tokens)
    if refusal:
        return Split(tensor, pipeline, stages=stages, kv_tokens=tokens, refusal=refusal)
    replicas = _replicas(fleet, tensor, pipeline)
    held = min(wish.held_tokens, wish.context_tokens or shape.context_tokens, tokens)
    load = Load(max(1, min(wish.streams, tokens // held)), held)
    return Split(
        tensor,
        pipeline,
        replicas,
        fleet.count - replicas * tensor * pipeline,
        stages,
        tokens,
        tuple(bounds(shape, how, fleet.device, runs, tensor, load)),
        tuple(_reasons(shape, wish, tensor, tokens, load)),
    )


def _fleet_refusal(fleet: Fleet, tensor: int, pipeline: int) -> str:
    if tensor > _tensor_max(fleet):
        return f"TP {tensor} needs {tensor} devices in one host, there are {fleet.per_host}"
    if tensor * pipeline > fleet.count:
        return f"{tensor} x {pipeline} = {tensor * pipeline} devices, there are {fleet.count}"
    return ""


def _replicas(fleet: Fleet, tensor: int, pipeline: int) -> int:
    """How often the split fits: a stage's devices are in one host."""
    if fleet.device.kind == "cpu":
        return fleet.count // (tensor * pipeline)
    return fleet.hosts * (fleet.per_host // tensor) // pipeline


def stage_layers(shape: ModelShape, pipeline: int) -> list[range]:
    """The layers of each stage, as workers deal them; the head weighs on the last one."""
    costs = [shape.layer_cost(i) for i in range(shape.layers)]
    return split_layers(costs, pipeline, head=shape.embedding_values)


def _memory(
    shape: ModelShape,
    how: Precision,
    fleet: Fleet,
    wish: Wish,
    tensor: int,
    runs: Sequence[range],
    stage: int,
) -> StageMemory:
    layers, kind = runs[stage], fleet.device.kind
    first, last = stage == 0, stage == len(runs) - 1
    weights = sum(shape.layer_bytes(i, tensor, how) for i in layers)
    weights += shape.embedding_bytes(tensor, how) if first else 0
    if last:
        weights += shape.hidden_size * how.item_bytes
        # where nothing repacks it, a tied head is the embedding itself
        same = shape.tied and first and how.quantization == "none" and kind == "gpu"
        weights += 0 if same else shape.head_bytes(tensor, how)
    return StageMemory(
        layers,
        weights,
        _step_bytes(shape, how, wish, tensor, last=last),
        RUNTIME_BYTES[kind],
        int(fleet.device.memory_bytes * MEMORY_SHARE[kind]),
        len(layers) * shape.kv_layer_bytes(tensor, how),
    )


def _step_bytes(shape: ModelShape, how: Precision, wish: Wish, tensor: int, *, last: bool) -> int:
    """What a step's tensors take: a layer's widest at a time, and logits of all streams."""
    qkv = (shape.heads_on(tensor) + 2 * shape.kv_heads_on(tensor)) * shape.head_dim
    inner = shape.columns_on(tensor)
    if shape.experts and len(shape.expert_layers) == shape.layers:
        inner = -(-shape.experts_per_token * shape.expert_size // tensor)
    widest = 4 * shape.hidden_size + max(2 * qkv, 3 * inner)
    rows = wish.step_tokens * widest * how.item_bytes
    # float32, beside those in the model's dtype
    logits = wish.streams * shape.vocab_size * (4 + how.item_bytes) if last else 0
    return rows + logits


def _memory_refusal(
    shape: ModelShape, wish: Wish, stages: Sequence[StageMemory], tokens: int
) -> str:
    tightest = min(stages, key=lambda stage: stage.kv_tokens)
    if tightest.kv_bytes < 0:
        return f"does not fit: {tightest.told()}"
    least = wish.context_tokens or min(KV_TOKENS_MIN, shape.context_tokens)
    least = -(-least // BLOCK_TOKENS) * BLOCK_TOKENS
    if tokens < least:
        return f"room for {tokens:,} tokens of KV, {least:,} are needed: {tightest.told()}"
    return ""


def _reasons(shape: ModelShape, wish: Wish, tensor: int, tokens: int, load: Load) -> list[str]:
    reasons = unevenness(shape, tensor)
    copies = replication(shape, tensor)
    if copies > 1:
        reasons.append(
            f"{shape.kv_heads} KV heads on {tensor} devices: each is held {copies} times, so "
            f"KV takes {copies} times its memory"
        )
    if not wish.context_tokens and tokens < shape.context_tokens:
        reasons.append(
            f"requests up to {tokens:,} tokens: the model's {shape.context_tokens:,} do not fit"
        )
    if load.streams < wish.streams:
        reasons.append(
            f"{load.streams} streams of {load.held:,} tokens fit at once, not {wish.streams}"
        )
    return reasons


def _notes(shape: ModelShape, how: Precision, fleet: Fleet) -> list[str]:
    notes = [fleet.assumed] if fleet.assumed else []
    if fleet.device.kind == "gpu" and how.quantization != "none":
        notes.append(f"{how.quantization} weights run in CPU workers only so far")
    if fleet.device.kind == "gpu" and how.kv_dtype != "auto":
        notes.append("int8 KV runs in CPU workers only so far: flash-attn reads the model's dtype")
    if shape.windows:
        windowed = sum(1 for window in shape.windows if window)
        notes.append(
            f"{windowed} of {shape.layers} layers see a window only; their KV is kept whole"
        )
    return notes


def _gib(size_bytes: int) -> str:
    return f"{size_bytes / GIB:,.1f}"
