"""Speculation: what is guessed, how long, when not at all; and that no text depends on it."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from scipy import stats

from headrace.types import Job
from headrace_worker.engine import Engine
from headrace_worker.loading import LoadedModel
from headrace_worker.policy.speculation import (
    GUESS_TOKENS_MAX,
    PLAIN_EVERY_STEPS,
    PROBE_EVERY_TOKENS,
    PROBE_TOKENS,
    Economy,
    Guesser,
)
from worker.builders import finish_all, logits_of, make_engine, make_job, random_tokens

MANY = 100
DRAWS = 3_000


def test_the_longest_match_is_continued() -> None:
    """The last tokens decide, the most recent occurrence of the longest run goes first."""
    guess = Guesser().guess([1, 2, 3, 4, 9, 9, 3, 4, 7, 7, 1, 2, 3, 4], 0.0, 3)
    assert guess == (9, 9, 3), "four tokens matched at the start, two of them later as well"
    assert Guesser().guess([3, 4, 5, 3, 4, 6, 3, 4], 0.0, 1) == (6,), "the latest of equal ones"
    assert Guesser().guess([1, 2, 3], 0.0, MANY) == ()
    assert Guesser().guess([7], 0.0, MANY) == ()


def test_a_loop_is_guessed_past_its_end() -> None:
    """A period shorter than the guess goes on round."""
    assert Guesser().guess([5, 6, 7, 5, 6, 7, 5, 6], 0.0, 7) == (7, 5, 6, 7, 5, 6, 7)


def test_the_index_grows_with_the_tokens() -> None:
    """Guessing now and then finds the same as guessing from the start would."""
    source = random.Random(3)
    tokens = [source.randrange(3) for _ in range(300)]
    grown = Guesser()
    for length in range(1, len(tokens), 7):
        known = tokens[:length]
        assert grown.guess(known, 0.0, 5) == Guesser().guess(known, 0.0, 5)


def test_length_follows_what_comes_true_and_what_a_row_costs() -> None:
    """Free rows: as long as allowed. Dear rows: as far as they are likely enough to pay."""
    loop = [1, 2] * 8
    assert len(Guesser().guess(loop, 0.0, MANY)) == GUESS_TOKENS_MAX
    lucky, unlucky = Guesser(), Guesser()
    lucky.note(4, 4)
    for _ in range(12):
        unlucky.note(4, 0)
    lengths = [len(lucky.guess(loop, price, MANY)) for price in (0.1, 0.6, 0.8)]
    assert lengths == sorted(lengths, reverse=True) and lengths[0] > lengths[-1] > 0
    assert len(unlucky.guess(loop, 0.3, MANY)) == PROBE_TOKENS, "one short try"
    silent = [len(unlucky.guess([1, 2] * 8 + [1, 2][: at % 2], 0.3, MANY)) for at in range(2)]
    assert silent == [0, 0], "then silence"
    later = [1, 2] * (8 + PROBE_EVERY_TOKENS // 2)
    assert len(unlucky.guess(later, 0.3, MANY)) == PROBE_TOKENS, "and another try"


def test_the_economy_is_measured() -> None:
    """No price before a plain step; then what rows added to it, in tokens; a plain one in turn."""
    economy = Economy()
    assert economy.price(4) is None
    economy.note(4, 0, 20.0)
    assert economy.price(4) == 0.0
    for _ in range(PLAIN_EVERY_STEPS - 1):
        economy.note(4, 10, 70.0)
    price = economy.price(4)
    assert price is not None and 0.99 < price <= 1.0, "5 ms a row, a token is worth 20 ms / 4"
    assert economy.price(1) is None, "alone, a step costs something else"
    economy.note(4, 10, 70.0)
    assert economy.price(4) is None, "a plain step is due"
    economy.note(4, 0, 20.0)
    assert economy.price(4) is not None


def repetitive(seed: int) -> list[int]:
    """A prompt that speaks in loops, so that there is something to guess."""
    return (random_tokens(5, seed, 9) * 9)[: 30 + seed]


def test_guessing_never_changes_a_text(tiny: LoadedModel) -> None:
    """Greedy and sampled, alone and in a crowd, in a tiny pool: the same as without guessing."""
    jobs = [
        make_job(
            f"j{i}",
            repetitive(i),
            max_tokens=40,
            temperature=(0.0, 0.05, 1.0)[i % 3],
            top_p=0.9,
            seed=i,
        )
        for i in range(6)
    ]
    plain = finish_all(make_engine(tiny, speculation=False), jobs)
    alone = {}
    for job in jobs:
        out = finish_all(make_engine(tiny), [job])
        alone |= out.tokens
    crowd = finish_all(make_engine(tiny), jobs)
    squeezed = finish_all(make_engine(tiny, 160), jobs)
    assert plain.tokens == alone == crowd.tokens == squeezed.tokens
    stories = crowd.stories.values()
    assert sum(s.guessed_right for s in stories) > 0, "some guesses came true"
    assert any(s.guessed > s.guessed_right for s in stories), "and some did not"
    looping = [make_job("a", repetitive(0), max_tokens=200)]
    slow, fast = (finish_all(make_engine(tiny, speculation=on), looping) for on in (False, True))
    assert fast.tokens == slow.tokens and fast.steps < 0.8 * slow.steps
    assert sum(s.guessed for s in plain.stories.values()) == 0
    assert sum(s.preemptions for s in squeezed.stories.values()) > 0


def test_guesses_leave_no_trace_in_the_prefix_cache(tiny: LoadedModel) -> None:
    """KV of wrong guesses is never found: a second run over the first one's blocks is the same."""
    engine = make_engine(tiny)
    job = make_job("a", repetitive(2), max_tokens=60)
    first = finish_all(engine, [job])
    continued = repetitive(2) + first.tokens["a"]
    again = finish_all(engine, [make_job("b", continued, max_tokens=30)])
    assert again.cached["b"] >= len(continued) - 32
    fresh = finish_all(
        make_engine(tiny, speculation=False), [make_job("b", continued, max_tokens=30)]
    )
    assert again.tokens == fresh.tokens


def test_a_resumed_job_guesses_too(tiny: LoadedModel) -> None:
    """From any cut the text goes on as it did."""
    job = make_job("a", repetitive(1), max_tokens=30)
    whole = finish_all(make_engine(tiny), [job]).tokens["a"]
    for cut in (1, 7, 29):
        resumed = make_job("a", repetitive(1), max_tokens=30, logged=whole[:cut])
        assert finish_all(make_engine(tiny), [resumed]).tokens["a"] == whole[cut:]


def test_sampled_tokens_follow_the_model(
    tiny: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chi-square of each position against the model, guessed or not; the draws are the same."""
    prompt = repetitive(3)
    with torch.inference_mode():
        first = torch.softmax(logits_of(tiny, prompt)[-1].double() / 0.4, -1)
        likely = int(first.argmax())
        second = torch.softmax(logits_of(tiny, [*prompt, likely])[-1].double() / 0.4, -1)
    # every job guesses the likeliest pair, so that a wrong acceptance would make it too frequent
    pair = [likely, int(second.argmax())]
    monkeypatch.setattr(Guesser, "guess", lambda *_: (pair[1], 0))
    jobs = [
        make_job(f"j{seed}", prompt, max_tokens=4, temperature=0.4, seed=seed)
        for seed in range(DRAWS)
    ]
    plain, _ = in_rounds(make_engine(tiny, speculation=False), jobs)
    tokens, guessed = in_rounds(make_engine(tiny), jobs)
    assert tokens == plain and guessed > DRAWS / 2
    firsts = [tokens[0] for tokens in plain.values()]
    seconds = [tokens[1] for tokens in plain.values() if tokens[0] == likely]
    assert len(seconds) > 300
    for drawn, model in ((firsts, first), (seconds, second)):
        assert p_value(drawn, model) > 1e-4
        assert p_value(drawn, model.roll(1)) < 1e-4, "the test tells distributions apart"


def in_rounds(engine: Engine, jobs: list[Job]) -> tuple[dict[str, list[int]], int]:
    """All outputs, and how many tokens were guessed; nobody waits, so guessing is allowed."""
    tokens: dict[str, list[int]] = {}
    guessed = 0
    for start in range(0, len(jobs), 60):
        out = finish_all(engine, jobs[start : start + 60])
        tokens |= out.tokens
        guessed += sum(story.guessed for story in out.stories.values())
    return tokens, guessed


def p_value(drawn: list[int], model: torch.Tensor) -> float:
    """Of the chi-square test, tokens expected less than five times taken as one."""
    expected = model.numpy() * len(drawn)
    counts = np.bincount(drawn, minlength=len(expected))
    common = expected >= 5
    observed = [*counts[common], counts[~common].sum()]
    wanted = [*expected[common], expected[~common].sum()]
    return float(stats.chisquare(observed, np.array(wanted) * sum(observed) / sum(wanted)).pvalue)
