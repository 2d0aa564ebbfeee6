"""Structured output through the engine: a random model, which says anything, held to a grammar."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import pytest
from tokenizers import Tokenizer

from headrace import grammars
from headrace.grammars import Grammars, Matcher
from headrace.types import Band, FinishReason, Job
from headrace_worker.engine import Engine
from headrace_worker.loading import LoadedModel
from headrace_worker.policy.speculation import Guesser
from headrace_worker.results import StepResult
from worker.builders import Output, make_engine, make_job, random_tokens

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "the_wheel": {"type": "string", "maxLength": 12},
        "turns": {"type": "integer", "minimum": 0, "maximum": 99},
        "mill": {"enum": ["open", "closed", "headrace"]},
    },
    "required": ["the_wheel", "turns", "mill"],
    "additionalProperties": False,
}
GRAMMAR = grammars.json_schema(SCHEMA)


@pytest.fixture(scope="module")
def compiler(tiny: LoadedModel) -> Grammars:
    return Grammars(tiny.record)


def held(id: str = "a", *, seed: int = 1, **changes: Any) -> Job:
    """A job held to SCHEMA: a warm one, as a random model's greedy text runs in circles."""
    facts = {"max_tokens": 300, "temperature": 1.0, "grammar": GRAMMAR, "ignore_eos": False}
    return make_job(id, random_tokens(9, seed), seed=seed, **(facts | changes))


def run(
    engine: Engine,
    compiler: Grammars,
    jobs: list[Job],
    *,
    matchers: dict[str, Matcher] | None = None,
) -> Output:
    """Steps until all have ended, integrity checked."""
    out = Output()
    for job in jobs:
        grammar = job.sampling.grammar
        matcher = (matchers or {}).get(job.id) or (compiler.compile(grammar) if grammar else None)
        engine.add(job, (), matcher)
    while engine.has_work:
        note(out, engine.step())
        engine.check_integrity()
    return out


def note(out: Output, result: StepResult) -> None:
    out.steps += 1
    for delta in result.deltas:
        assert len(out.tokens.setdefault(delta.job, [])) == delta.first - out.cached.get(
            delta.job, 0
        )
        out.tokens[delta.job].extend(delta.tokens)
        out.deltas.append(delta)
        if delta.finish is not None:
            out.finishes[delta.job] = delta.finish
    out.stories.update({story.job: story for story in result.stories})


def text_of(tiny: LoadedModel, tokens: list[int]) -> str:
    tokenizer = Tokenizer.from_buffer(tiny.record.tokenizer_json)
    text: str = tokenizer.decode(tokens, skip_special_tokens=True)
    return text


def test_a_random_model_keeps_to_the_schema(tiny: LoadedModel, compiler: Grammars) -> None:
    """Every text that ends validates; what has only one continuation is not sampled."""
    jobs = [held(f"j{seed}", seed=seed) for seed in range(12)]
    out = run(make_engine(tiny), compiler, jobs)
    for job in jobs:
        assert out.finishes[job.id].reason is FinishReason.STOP
        jsonschema.validate(json.loads(text_of(tiny, out.tokens[job.id])), SCHEMA)
        story = out.stories[job.id]
        assert 0 < story.forced < story.output_tokens
    assert len({tuple(tokens) for tokens in out.tokens.values()}) == len(jobs)


def test_forcing_and_guessing_change_no_text(tiny: LoadedModel, compiler: Grammars) -> None:
    """Token by token (with logprobs nothing is forced), guessed, or forced: the same."""
    plain = run(make_engine(tiny, speculation=False), compiler, [held(logprobs=0)])
    guessed = run(make_engine(tiny), compiler, [held(logprobs=0)])
    forced = run(make_engine(tiny), compiler, [held()])
    assert plain.stories["a"].forced == 0 < forced.stories["a"].forced
    assert plain.tokens == guessed.tokens == forced.tokens
    assert forced.steps < plain.steps
    told = [item for delta in plain.deltas for item in delta.logprobs]
    assert len(told) == len(plain.tokens["a"])


def test_a_grammar_binds_its_own_job_only(tiny: LoadedModel, compiler: Grammars) -> None:
    """In a crowd, in a pool that is too small, after preemptions: all texts as when alone."""
    jobs = [held(f"h{i}", seed=i, max_tokens=140) for i in range(4)]
    jobs += [make_job(f"f{i}", random_tokens(20, i), temperature=1.0, seed=i) for i in range(4)]
    jobs += [held("vip", seed=9, max_tokens=140, band=Band.INTERACTIVE)]
    alone: dict[str, list[int]] = {}
    for job in jobs:
        alone |= run(make_engine(tiny), compiler, [job]).tokens
    small = make_engine(tiny, 160, step_tokens_max=24, max_running=9)
    crowd = run(small, compiler, jobs)
    assert crowd.tokens == alone
    assert sum(story.preemptions for story in crowd.stories.values()) > 0


def test_a_job_resumes_anywhere(tiny: LoadedModel, compiler: Grammars) -> None:
    """Also within a forced run: what was logged and what follows are the same text."""
    whole = run(make_engine(tiny), compiler, [held()]).tokens["a"]
    engine = make_engine(tiny)
    for cut in range(1, len(whole)):
        out = Output()
        out.cached["a"] = cut  # where its deltas begin
        engine.add(held(logged=whole[:cut]), (), compiler.compile(GRAMMAR))
        while engine.has_work:
            note(out, engine.step())
        assert whole[:cut] + out.tokens["a"] == whole, f"cut at {cut}"


def test_an_output_that_is_all_forced(tiny: LoadedModel, compiler: Grammars) -> None:
    """It needs no step at all; a limit within it ends it there."""
    only = grammars.choice(["the wheel turns the mill"])
    engine = make_engine(tiny)
    out = run(engine, compiler, [held(grammar=only)])
    assert text_of(tiny, out.tokens["a"]) == "the wheel turns the mill"
    assert out.finishes["a"].reason is FinishReason.STOP
    short = run(engine, compiler, [held("b", grammar=only, max_tokens=2)])
    assert short.tokens["b"] == out.tokens["a"][:2]
    assert short.finishes["b"].reason is FinishReason.LENGTH


def test_a_log_that_does_not_match_costs_its_own_job(tiny: LoadedModel, compiler: Grammars) -> None:
    """Output that the grammar refuses ends its job in an error; the next one is served."""
    engine = make_engine(tiny)
    out = Output()
    engine.add(held(logged=[250, 251]), (), compiler.compile(GRAMMAR))
    out.cached["a"] = 2
    while engine.has_work:
        note(out, engine.step())
    assert out.finishes["a"].reason is FinishReason.ERROR
    assert "grammar" in out.finishes["a"].error
    assert run(engine, compiler, [held("b")]).finishes["b"].reason is FinishReason.STOP


def test_a_grammar_that_gives_up_costs_its_own_job(tiny: LoadedModel, compiler: Grammars) -> None:
    """Out of fuel in mid-text: an error that says so, the stream beside it goes on."""
    failing = compiler.compile(GRAMMAR)
    jobs = [held(), make_job("calm", random_tokens(9, 3), max_tokens=30)]
    engine = make_engine(tiny)
    engine.add(jobs[0], (), failing)
    engine.add(jobs[1])
    out = Output()
    while engine.has_work:
        if out.steps == 3:
            failing.failure = "out of fuel"
        note(out, engine.step())
        engine.check_integrity()
    assert out.finishes["a"].reason is FinishReason.ERROR
    assert "out of fuel" in out.finishes["a"].error
    assert out.tokens["calm"] == run(make_engine(tiny), compiler, [jobs[1]]).tokens["calm"]


@pytest.mark.parametrize("method", ["mask", "masks", "accept", "forced"])
def test_a_grammar_that_breaks_costs_its_own_job(
    tiny: LoadedModel, compiler: Grammars, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """Whatever the library raises, the engine goes on and the stream beside it is whole."""
    monkeypatch.setattr(Guesser, "guess", lambda *_: (1, 2))
    engine, out = make_engine(tiny), Output()
    calm = make_job("calm", random_tokens(9, 3), max_tokens=30)
    matcher = compiler.compile(GRAMMAR)

    def broken(*_: object) -> None:
        raise ValueError("a bug of theirs")

    engine.add(held(logprobs=0 if method == "mask" else -1), (), matcher)
    engine.add(calm)
    while engine.has_work:
        if out.steps == 3:
            setattr(matcher, method, broken)
        note(out, engine.step())
        engine.check_integrity()
    assert out.finishes["a"].reason is FinishReason.ERROR
    assert "a bug of theirs" in out.finishes["a"].error
    assert out.tokens["calm"] == run(make_engine(tiny), compiler, [calm]).tokens["calm"]
