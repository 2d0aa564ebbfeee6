"""Which part of a model each rank holds.

A stage holds consecutive layers; the tensor ranks of a stage hold, of each of its layers, some
heads, some of the MLP's inner columns, some experts whole; and some rows of the vocabulary.
Source: Shoeybi et al., "Megatron-LM", 2019.

Invariant: every part is a run of consecutive numbers, the runs of all tensor ranks cover the whole
in the order of the ranks, and no query head is apart from its KV head. Runs may differ by a unit.
Rejected: equal runs only, which refuses models of 3 KV heads on 2 ranks, or a vocabulary of an odd
size, where an uneven split costs little; splitting each expert, whose narrow matrices multiply
slowly, and which needs every rank for every token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from headrace.errors import ModelError
from headrace_worker.model.config import ModelConfig

RANKS_MAX = 64
UNIT_MAX = 64
"""Columns and vocabulary rows are dealt in units of this many: what int8 rotates together."""
UNITS_EACH = 8
"""A rank shall have so many units at least, so that runs that differ by one are nearly equal."""


@dataclass(frozen=True, slots=True)
class Shape:
    """How many tensor ranks a stage has, and how many stages there are."""

    tensor: int = 1
    pipeline: int = 1

    def __post_init__(self) -> None:
        if self.tensor < 1 or self.pipeline < 1 or self.ranks > RANKS_MAX:
            raise ModelError(
                f"{self.tensor} tensor ranks in each of {self.pipeline} stages are "
                f"{self.ranks} ranks, not from 1 to {RANKS_MAX}"
            )

    @property
    def ranks(self) -> int:
        return self.tensor * self.pipeline

    def place(self, rank: int) -> tuple[int, int]:
        """(stage, tensor rank within it)."""
        assert 0 <= rank < self.ranks, "no such rank"
        return divmod(rank, self.tensor)

    def stage_ranks(self, stage: int) -> range:
        """The ranks that hold a stage's layers together."""
        return range(stage * self.tensor, (stage + 1) * self.tensor)


@dataclass(frozen=True, slots=True)
class Part:
    """What one rank holds of the model `whole`: runs of its numbers.

    `config` is the part as a model of its own: all its numbers are this rank's, with two
    exceptions: `hidden_size`, which nobody splits, and `experts.count`, which the router needs
    whole. `vocab_size` is 0 for stages that hold neither embedding nor head.
    """

    whole: ModelConfig
    config: ModelConfig
    tensor: int
    tensor_rank: int
    first: bool
    last: bool
    layers: range
    heads: range
    kv_heads: range
    inner: range
    vocab: range
    experts: range | None

    @property
    def owns_kv(self) -> bool:
        """Whether it is the first of the ranks that hold its KV heads, if several do."""
        return self.tensor <= self.whole.kv_heads or (
            self.tensor_rank % (self.tensor // self.whole.kv_heads) == 0
        )


def run_of(total: int, parts: int, index: int, unit: int = 1) -> range:
    """The `index`-th of `parts` consecutive runs of `total`, in whole units; longer ones first."""
    units = -(-total // unit)

    def start(which: int) -> int:
        return min(total, unit * (which * (units // parts) + min(which, units % parts)))

    return range(start(index), start(index + 1))


def part_of(
    config: ModelConfig, shape: Shape, rank: int, layers: Sequence[range] | None = None
) -> Part:
    """The part of `rank`. `layers`: of each stage, in order; None for stages of equal length.

    Raises ModelError, with the numbers, for a model that cannot be split so.
    """
    refuse(config, shape)
    stage, tensor_rank = shape.place(rank)
    if layers is None:
        layers = [run_of(config.layers, shape.pipeline, i) for i in range(shape.pipeline)]
    assert [i for run in layers for i in run] == list(range(config.layers)), "each layer once"
    first, last = stage == 0, stage == shape.pipeline - 1
    kv_heads, heads = _heads(config, shape.tensor, tensor_rank)
    inner = run_of(
        config.intermediate_size,
        shape.tensor,
        tensor_rank,
        _unit(_even_unit(config.intermediate_size), config.intermediate_size, shape.tensor),
    )
    unit = _unit(UNIT_MAX, config.vocab_size, shape.tensor)
    vocab = run_of(config.vocab_size, shape.tensor, tensor_rank, unit)
    e = config.experts
    dealt = e is not None and shape.tensor > 1
    experts = run_of(e.count, shape.tensor, tensor_rank) if e is not None and dealt else None
    here = layers[stage]
    local = replace(
        config,
        vocab_size=len(vocab) if first or last else 0,
        intermediate_size=len(inner),
        layers=len(here),
        heads=len(heads),
        kv_heads=len(kv_heads),
        layer_ropes=config.layer_ropes[here.start : here.stop],
        windows=config.windows[here.start : here.stop],
        experts=e
        and replace(e, layers=tuple(i - here.start for i in e.layers if i in here), held=experts),
    )
    return Part(
        whole=config,
        config=local,
        tensor=shape.tensor,
        tensor_rank=tensor_rank,
        first=first,
        last=last,
        layers=here,
        heads=heads,
        kv_heads=kv_heads,
        inner=inner,
        vocab=vocab,
        experts=experts,
    )


def refuse(config: ModelConfig, shape: Shape) -> None:
    """Raises ModelError, with the numbers, for a model that cannot be split into `shape`."""
    ranks = f"{shape.tensor} tensor ranks"
    if shape.pipeline > config.layers:
        raise ModelError(
            f"{shape.pipeline} stages need a layer each, the model has {config.layers} layers"
        )
    if shape.tensor > config.kv_heads:
        sharing, copies = config.heads // config.kv_heads, shape.tensor // config.kv_heads
        if shape.tensor % config.kv_heads or sharing % copies:
            fits = [n for n in range(1, config.heads + 1) if _divides(config, n)]
            raise ModelError(
                f"{ranks} cannot share {config.heads} heads that use {config.kv_heads} KV heads, "
                f"{sharing} each; as many as can: {', '.join(map(str, fits))}"
            )
    e = config.experts
    if e is not None and shape.tensor > e.count:
        raise ModelError(f"{ranks} need an expert each, the model has {e.count} experts")
    dense = e is None or len(e.layers) < config.layers
    if dense and shape.tensor > config.intermediate_size:
        raise ModelError(f"{ranks} cannot share MLPs of {config.intermediate_size} columns")
    if shape.tensor > config.vocab_size:
        raise ModelError(f"{ranks} cannot share a vocabulary of {config.vocab_size} tokens")


def _divides(config: ModelConfig, tensor: int) -> bool:
    if tensor <= config.kv_heads:
        return True
    sharing = config.heads // config.kv_heads
    return not tensor % config.kv_heads and not sharing % (tensor // config.kv_heads)


def _heads(config: ModelConfig, tensor: int, rank: int) -> tuple[range, range]:
    """(KV heads, query heads). Where there are more ranks than KV heads, several hold one."""
    sharing = config.heads // config.kv_heads
    if tensor <= config.kv_heads:
        kv_heads = run_of(config.kv_heads, tensor, rank)
        return kv_heads, range(kv_heads.start * sharing, kv_heads.stop * sharing)
    held = rank // (tensor // config.kv_heads)
    return range(held, held + 1), run_of(config.heads, tensor, rank)


def _even_unit(total: int) -> int:
    """The largest power of two up to UNIT_MAX that divides `total`."""
    return min(UNIT_MAX, total & -total) if total else 1


def _unit(largest: int, total: int, parts: int) -> int:
    """`largest`, halved until every part has UNITS_EACH units, or a unit is one."""
    while largest > 1 and total < largest * parts * UNITS_EACH:
        largest //= 2
    return largest
