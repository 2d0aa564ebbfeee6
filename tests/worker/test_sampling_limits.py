"""Options that cannot be carried out are refused by name, and those that can never raise."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from headrace.types import LOGPROBS_MAX, Sampling
from headrace_worker.sampling.choosing import Choosing
from headrace_worker.sampling.limits import (
    BAD_WORD_TOKENS_MAX,
    BAD_WORDS_MAX,
    BIAS_MAX,
    LOGIT_BIAS_MAX,
    PENALTY_MAX,
    REPETITION_PENALTY_MAX,
    STOP_TOKENS_MAX,
    TEMPERATURE_MAX,
    refuse,
)
from headrace_worker.sampling.sampler import Row
from worker.both import sample

VOCAB = 2000
NAN, INF = float("nan"), float("inf")

BAD: list[tuple[str, Any]] = [
    *[("temperature", value) for value in (-0.1, 100.1, NAN, INF)],
    *[(name, value) for name in ("top_p", "typical_p") for value in (0.0, -1.0, 1.01, NAN)],
    *[("min_p", value) for value in (-0.01, 1.01, NAN)],
    *[(f"{name}_penalty", v) for name in ("presence", "frequency") for v in (-2.1, 2.1, NAN)],
    *[("repetition_penalty", value) for value in (0.0, -1.0, 100.1, NAN, INF)],
    *[(name, v) for name in ("logprobs", "prompt_logprobs") for v in (-2, LOGPROBS_MAX + 1)],
    *[(name, -1) for name in ("top_k", "min_tokens", "max_tokens")],
    ("max_tokens", 0),
    *[("logit_bias", ((5, value),)) for value in (-100.1, 100.1, NAN, INF)],
    *[("logit_bias", ((token, 1.0),)) for token in (-1, VOCAB)],
    ("logit_bias", ((5, 1.0), (5, 2.0))),
    ("logit_bias", tuple((token, 1.0) for token in range(LOGIT_BIAS_MAX + 1))),
    *[("stop_token_ids", (token,)) for token in (-1, VOCAB)],
    ("stop_token_ids", (1,) * (STOP_TOKENS_MAX + 1)),
    *[("bad_words", ((1, token),)) for token in (-1, VOCAB)],
    ("bad_words", ((1,), ())),
    ("bad_words", ((1,),) * (BAD_WORDS_MAX + 1)),
    ("bad_words", ((1,) * (BAD_WORD_TOKENS_MAX + 1),)),
]


@pytest.mark.parametrize(("name", "value"), BAD, ids=lambda value: str(value)[:20])
def test_a_bad_value_is_refused_by_name(name: str, value: object) -> None:
    options = {"max_tokens": 5, name: value}
    problem = refuse(Sampling(**options), VOCAB)  # type: ignore[arg-type]
    assert problem is not None and name in problem


def test_no_output_needs_prompt_logprobs() -> None:
    assert refuse(Sampling(max_tokens=0, prompt_logprobs=0), VOCAB) is None
    assert refuse(Sampling(max_tokens=0, logprobs=5), VOCAB) is not None


TOKENS = st.integers(0, VOCAB - 1) | st.sampled_from([0, VOCAB - 1])
ACCEPTED = st.builds(
    Sampling,
    max_tokens=st.integers(1, 2**31),
    temperature=st.floats(0, TEMPERATURE_MAX),
    top_p=st.floats(0, 1, exclude_min=True),
    top_k=st.integers(0, 2**31),
    seed=st.integers(-(2**63), 2**64),
    min_p=st.floats(0, 1),
    typical_p=st.floats(0, 1, exclude_min=True),
    presence_penalty=st.floats(-PENALTY_MAX, PENALTY_MAX),
    frequency_penalty=st.floats(-PENALTY_MAX, PENALTY_MAX),
    repetition_penalty=st.floats(0, REPETITION_PENALTY_MAX, exclude_min=True),
    logit_bias=st.lists(
        st.tuples(TOKENS, st.floats(-BIAS_MAX, BIAS_MAX)), max_size=5, unique_by=lambda p: p[0]
    ).map(tuple),
    min_tokens=st.integers(0, 2**31),
    bad_words=st.lists(st.lists(TOKENS, min_size=1, max_size=3).map(tuple), max_size=4).map(tuple),
    stop_token_ids=st.lists(TOKENS, max_size=3).map(tuple),
    logprobs=st.integers(-1, LOGPROBS_MAX),
)


@given(sampling=ACCEPTED, scale=st.sampled_from([0.0, 1.0, 1e30, 3e37]), seed=st.integers(0, 99))
def test_what_passes_gives_a_token(sampling: Sampling, scale: float, seed: int) -> None:
    """Nothing that is let through raises, warns or fails to choose, on the wildest of logits."""
    assert refuse(sampling, VOCAB) is None
    source = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, VOCAB, generator=source) * scale
    logits[1, torch.rand(VOCAB, generator=source) < 0.9] = -torch.inf
    logits[1, 3] = 0.0
    ends = frozenset(sampling.stop_token_ids)
    choosing = Choosing(sampling, [0, VOCAB - 1, 7, 7], 2, ends, VOCAB)
    chosen = sample(logits, [Row(choosing), Row(choosing, (7, VOCAB - 1))])
    assert all(choice is not None and 0 <= choice.token < VOCAB for choice in chosen)
