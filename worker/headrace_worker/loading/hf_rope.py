"""Rotary settings of a config.json: which kind of scaling, with which numbers.

Invariant: what is not given has transformers' value; a kind that is not computed is refused by
name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from headrace.errors import ModelError
from headrace_worker.loading.source import need
from headrace_worker.model import rope
from headrace_worker.model.config import Rope

_WHERE = "config.json rope scaling"
_ORIGINAL = "original_max_position_embeddings"


class _Rules:
    """One rotary table's settings, the model's own beside them."""

    def __init__(self, rules: Mapping[str, Any], facts: Mapping[str, Any], rotated: int) -> None:
        self.rules, self.facts, self.rotated = rules, facts, rotated
        self.theta = float(rules.get("rope_theta") or facts.get("rope_theta") or 10_000.0)

    def number(self, key: str) -> float:
        return need(dict(self.rules), key, float, _WHERE)

    def optional(self, key: str, default: float) -> float:
        return default if self.rules.get(key) is None else self.number(key)

    @property
    def original_tokens(self) -> int:
        """What the model was trained with; the top of config.json goes first."""
        for facts in (self.facts, self.rules):
            if facts.get(_ORIGINAL) is not None:
                return int(need(dict(facts), _ORIGINAL, int, _WHERE))
        return int(self.facts["max_position_embeddings"])

    @property
    def factor(self) -> float:
        """How many times the original context the model's own is."""
        implied: float = self.facts["max_position_embeddings"] / self.original_tokens
        return self.optional("factor", implied)


def _plain(r: _Rules) -> Rope:
    return rope.plain(r.rotated, r.theta)


def _linear(r: _Rules) -> Rope:
    return rope.linear(r.rotated, r.theta, r.number("factor"))


def _llama3(r: _Rules) -> Rope:
    return rope.llama3(
        r.rotated,
        r.theta,
        factor=r.number("factor"),
        low=r.number("low_freq_factor"),
        high=r.number("high_freq_factor"),
        original_tokens=r.original_tokens,
    )


def _yarn(r: _Rules) -> Rope:
    factor = r.factor
    scale, scale_all = r.optional("mscale", 0.0), r.optional("mscale_all_dim", 0.0)
    attention = rope.yarn_attention_factor(factor)
    if scale and scale_all:
        attention = rope.yarn_attention_factor(factor, scale)
        attention /= rope.yarn_attention_factor(factor, scale_all)
    return rope.yarn(
        r.rotated,
        r.theta,
        factor=factor,
        original_tokens=r.original_tokens,
        attention_factor=r.optional("attention_factor", attention),
        beta_fast=r.optional("beta_fast", 0.0) or 32.0,
        beta_slow=r.optional("beta_slow", 0.0) or 1.0,
        truncate=bool(r.rules.get("truncate", True)),
    )


def _longrope(r: _Rules) -> Rope:
    original = r.original_tokens
    implied = rope.longrope_attention_factor(r.factor, original)
    return rope.longrope(
        r.rotated,
        r.theta,
        short=_numbers(r.rules, "short_factor"),
        long=_numbers(r.rules, "long_factor"),
        original_tokens=original,
        attention_factor=r.optional("attention_factor", implied),
    )


_KINDS: dict[str, Callable[[_Rules], Rope]] = {
    "default": _plain,
    # it stretches what lies beyond max_position_embeddings, and no sequence gets there
    "dynamic": _plain,
    "linear": _linear,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
}

_OLD_PHI_NAMES = {"su": "longrope", "yarn": "longrope"}


def rope_rules(facts: Mapping[str, Any]) -> Mapping[str, Any]:
    """The settings of a model with one rotary table, in either spelling; {} for plain ones.

    Raises ModelError where there are several, by type of layer.
    """
    rules = facts.get("rope_scaling") or facts.get("rope_parameters") or {}
    if not isinstance(rules, dict):
        raise ModelError(f"{_WHERE} is {rules!r}, expected an object")
    nested = [key for key, value in rules.items() if isinstance(value, dict)]
    if nested:
        raise ModelError(f"{_WHERE} for {', '.join(nested)} is not supported for this model")
    return rules


def read_rope(
    rules: Mapping[str, Any], facts: Mapping[str, Any], head_dim: int, *, partial: bool
) -> Rope:
    """The rotary table that `rules` describe, for the model whose config.json is `facts`.

    `partial`: whether the family can rotate a part of each head; Phi is the one that does, and the
    one that has older names for LongRoPE. Raises ModelError for a kind that is not known.
    """
    kind = _kind(rules, old_names=partial)
    part = rules.get("partial_rotary_factor", facts.get("partial_rotary_factor"))
    part = 1.0 if part is None else float(part)
    if part != 1.0 and not partial:
        raise ModelError(f"config.json: partial_rotary_factor = {part} is not supported")
    if kind not in _KINDS:
        raise ModelError(
            f"config.json: rope type {kind!r} is not supported; supported: {', '.join(_KINDS)}"
        )
    return _KINDS[kind](_Rules(rules, facts, int(head_dim * part)))


def yarn_context(rules: Mapping[str, Any], declared: int) -> int:
    """The context in tokens: `declared`, or what YaRN makes of the original one.

    Who adds YaRN to a model's config.json leaves max_position_embeddings as it was.
    """
    original, factor = rules.get(_ORIGINAL), rules.get("factor")
    if _kind(rules, old_names=False) != "yarn":
        return declared
    if not isinstance(original, int) or not isinstance(factor, int | float):
        return declared
    return max(declared, int(original * factor))


def _kind(rules: Mapping[str, Any], *, old_names: bool) -> str:
    kind = str(rules.get("rope_type") or rules.get("type") or "default")
    return _OLD_PHI_NAMES.get(kind, kind) if old_names else kind


def _numbers(rules: Mapping[str, Any], key: str) -> list[float]:
    values = rules.get(key)
    if not isinstance(values, list) or not all(isinstance(v, int | float) for v in values):
        raise ModelError(f"{_WHERE}: {key} is {values!r}, expected a list of numbers")
    return [float(value) for value in values]
