"""The native kernels draw what numpy draws: bit for bit, row by row, and in whole engines.

Where there is no compiler, or no processor that the kernels know, what needs them is skipped. All
other tests of the sampler compare both as well: see both.py.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.types import NO_LOGPROBS, Sampling
from headrace_worker.engine import Engine
from headrace_worker.loading import LoadedModel, load_model
from headrace_worker.native.abi import Library
from headrace_worker.native.draws import weigh_by
from headrace_worker.policy.speculation import Guesser
from headrace_worker.sampling import sampler
from headrace_worker.sampling.choosing import Choosing
from headrace_worker.sampling.sampler import Row
from headrace_worker.sampling.weights import GRID, TEMPERATURE_MIN, VOCAB_MAX, total, weigh
from worker.both import noise, sample
from worker.builders import (
    finish_all,
    guesses_from,
    make_engine,
    make_job,
    random_tokens,
    write_hf_folder,
)

KINDS = ("normal", "ties", "flat", "gaps", "large", "peaked", "coarse")
SIZES = (1, 2, 5, 31, 32, 33, 63, 100, 700, 1025, 4111, 33_000)
OPTIONS: list[dict[str, Any]] = [
    {"temperature": 1.0},
    {"temperature": 0.8, "top_p": 0.95},
    {"temperature": 0.7, "top_k": 40},
    {"temperature": 1.2, "min_p": 0.05},
    {"temperature": 1.0, "top_k": 50, "top_p": 0.9, "min_p": 0.01},
    {"temperature": 1.0, "top_p": 0.9, "repetition_penalty": 1.2, "logprobs": 2},
    {"temperature": 1.0, "typical_p": 0.9},
    {"temperature": 0.0},
]


def row_of(vocab: int, seed: int, position: int = 0, **options: Any) -> Row:
    sampling = Sampling(max_tokens=999, seed=seed, **options)
    return Row(Choosing(sampling, [0] * (2 + position), 2, frozenset(), vocab))


# --- weights


@given(
    logits=st.lists(st.floats(-200, 200, width=32) | st.just(-np.inf), min_size=1, max_size=80),
    temperature=st.sampled_from([1e-300, 0.01, 0.5, 1.0, 1.7, 100.0]),
)
def test_weights_are_near_the_exponential(logits: list[float], temperature: float) -> None:
    """Within a few roundings of float32 and half of GRID; 1 for the best, a multiple of GRID.

    Of the temperature, or of TEMPERATURE_MIN: logits nearer than that to each other are alike.
    """
    values = np.array(logits, np.float32)
    best = values.max()
    if not np.isfinite(best):
        return
    with np.errstate(over="ignore"):
        weights = weigh(values, best, temperature, None).astype(np.float64)
        least = max(temperature, TEMPERATURE_MIN)
        distance = np.minimum(-(values.astype(np.float64) - float(best)) / least, 1e3)
    exact = np.exp(-distance)
    assert (np.abs(weights - exact) <= exact * (4e-7 + 1.3e-7 * distance) + GRID / 2).all()
    assert weights.max() == 1
    assert (weights / GRID == np.rint(weights / GRID)).all()


def test_sums_of_weights_are_exact() -> None:
    """Of the largest vocabulary, in any order: what fractions add up to."""
    logits = noise("normal", 1, 20_000, 1)[0]
    weights = weigh(logits, logits.max(), 2.0, None)
    exact = sum(map(Fraction, weights.tolist()))
    assert Fraction(total(weights)) == exact
    assert Fraction(float(np.cumsum(weights[::-1], dtype=np.float64)[-1])) == exact
    assert Fraction(VOCAB_MAX) / Fraction(GRID) <= 2**53


@pytest.mark.parametrize("kind", KINDS)
def test_the_kernels_weigh_bit_for_bit(library: Library, each_isa: str, kind: str) -> None:
    for count in SIZES:
        [logits] = noise(kind, 1, count, count)
        best = logits.max()
        if not np.isfinite(best):
            continue
        for temperature in (1e-300, 0.3, 1.0, 1.1, 100.0):
            with np.errstate(over="ignore"):
                expected = weigh(logits, best, temperature, None)
            found = weigh_by(library, logits, best, temperature, np.empty_like(logits))
            assert found.tobytes() == expected.tobytes(), (count, temperature)


# --- tokens


@st.composite
def drawing(draw: st.DrawFn) -> dict[str, Any]:
    """Options of a row that draws."""
    return draw(
        st.fixed_dictionaries(
            {"temperature": st.sampled_from([1e-5, 0.1, 0.4, 0.8, 1.0, 1.3, 3.0, 100.0])},
            optional={
                "top_k": st.sampled_from([1, 2, 3, 7, 40, 50, 300, 1500, 5000, 1 << 40]),
                "min_p": st.sampled_from([1e-12, 1e-9, 1e-5, 0.01, 0.05, 0.2, 0.9, 1.0]),
                "top_p": st.sampled_from(
                    [1e-9, 0.05, 0.3, 0.5, 0.9, 0.95, 0.999, 1 - 1e-7, 1 - 2**-53]
                ),
            },
        )
    )


@settings(deadline=None, max_examples=120)
@given(
    options=st.lists(drawing(), min_size=1, max_size=8),
    vocab=st.sampled_from(SIZES),
    kind=st.sampled_from(KINDS),
    seed=st.integers(-5, 2**64),
    position=st.integers(0, 100),
)
def test_the_kernels_draw_the_same(
    library: Library, options: list[dict[str, Any]], vocab: int, kind: str, seed: int, position: int
) -> None:
    rows = [row_of(vocab, seed + i, position, **each) for i, each in enumerate(options)]
    chosen = sample(noise(kind, len(rows), vocab, seed % 1000), rows)
    assert None not in chosen or kind == "gaps"


def test_each_instruction_set_draws_the_same(library: Library, each_isa: str) -> None:
    """Large vocabularies, whose widths are multiples of a page and of nothing."""
    for vocab in (32_768, 50_257, 131_072):
        for kind in ("normal", "peaked", "ties"):
            logits = noise(kind, len(OPTIONS), vocab, vocab)
            sample(logits, [row_of(vocab, i, i, **o) for i, o in enumerate(OPTIONS)])


def test_threads_and_company_do_not_show(library: Library) -> None:
    """Alone or beside others, by one thread or three, and from several threads at once."""
    vocab = 5000
    logits = noise("normal", 40, vocab, 5)
    rows = [row_of(vocab, i, i, **OPTIONS[i % len(OPTIONS)]) for i in range(len(logits))]

    def choose(which: list[int]) -> list[Any]:
        return sampler.sample(logits[which], [rows[i] for i in which], None, library)

    everybody = list(range(len(rows)))
    alone = [choose([i])[0] for i in everybody]
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert choose(everybody) == alone
            assert choose(everybody[::-1]) == alone[::-1]
    finally:
        torch.set_num_threads(before)
    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(choose, [everybody] * 6)) == [alone] * 6


def test_rows_that_are_no_numbers_choose_nothing(library: Library) -> None:
    """NaN, infinity and nothing at all cost that row only, wherever they stand."""
    for vocab in (20, 1001):
        for place in (0, 7, vocab - 1):
            logits = noise("normal", 4 * len(OPTIONS), vocab, place)
            logits[1::4, place] = np.nan
            logits[2::4, place] = np.inf
            logits[3::4] = -np.inf
            rows = [row_of(vocab, i, **OPTIONS[i // 4]) for i in range(len(logits))]
            chosen = sample(logits, rows)
            assert [c is None for c in chosen] == [False, True, True, True] * len(OPTIONS)


# --- engines


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    folder: Path = tmp_path_factory.mktemp("tiny")
    write_hf_folder(folder, vocab_size=600)
    return load_model(folder, "test", "float32")


def texts(engine: Engine, prompts: list[list[int]], **changes: Any) -> dict[str, list[int]]:
    jobs = [
        # some rows are scored beside those that draw
        make_job(
            f"j{i}",
            prompt,
            max_tokens=24,
            seed=i,
            prompt_logprobs=1 if i % 5 == 0 else NO_LOGPROBS,
            **OPTIONS[i % len(OPTIONS)],
            **changes,
        )
        for i, prompt in enumerate(prompts)
    ]
    return finish_all(engine, jobs).tokens


def test_engines_say_the_same_with_and_without(
    library: Library, tiny: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Many jobs together, by numpy; alone; with guesses; taken over in the middle."""
    prompts = [random_tokens(5 + 7 * i % 40, i) for i in range(16)]
    by_numpy = make_engine(tiny)
    by_numpy._runner._library = None
    expected = texts(by_numpy, prompts)
    engine = make_engine(tiny)
    assert engine._runner._steps.draws, "its steps draw"
    assert texts(engine, prompts) == expected
    half = [
        replace(job, attempt=2)
        for job in (
            make_job(
                f"j{i}", p, max_tokens=24, seed=i, logged=expected[f"j{i}"][:11],
                **OPTIONS[i % len(OPTIONS)],
            )
            for i, p in enumerate(prompts)
        )
    ]  # fmt: skip
    rest = finish_all(make_engine(tiny, max_running=3), half).tokens
    assert rest == {name: said[11:] for name, said in expected.items()}
    whole = [p + expected[f"j{i}"] for i, p in enumerate(prompts)]
    monkeypatch.setattr(Guesser, "guess", guesses_from(whole))
    assert texts(make_engine(tiny, speculation=True), prompts) == expected
