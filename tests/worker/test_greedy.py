"""Promise 6: greedy output equals the reference implementation's, however it was computed."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from headrace.types import Band, FinishReason, pack_tokens
from headrace_worker.loading import LoadedModel
from headrace_worker.policy.speculation import Guesser
from worker.builders import (
    Output,
    finish_all,
    guesses_from,
    logits_of,
    make_engine,
    make_job,
    random_tokens,
    take_export,
)
from worker.conftest import NEW_TOKENS, Reference


def jobs_of(reference: Reference, prefix: str = "p"):
    return [
        make_job(f"{prefix}{i}", prompt, max_tokens=NEW_TOKENS)
        for i, prompt in enumerate(reference.prompts)
    ]


def assert_equal(out: Output, reference: Reference, prefix: str = "p") -> None:
    for i, expected in enumerate(reference.outputs):
        assert out.tokens[f"{prefix}{i}"] == expected, f"prompt {i}"
        assert out.finishes[f"{prefix}{i}"].reason is FinishReason.LENGTH


def test_the_prompts_are_of_mixed_length(reference: Reference) -> None:
    """The shortest has one block, the longest several chunks, and no two are the same."""
    lengths = sorted(map(len, reference.prompts))
    assert len(lengths) == 20
    assert lengths[0] < 4 and lengths[-1] > 256


def test_logits_equal_the_reference(smollm2: LoadedModel, reference: Reference) -> None:
    """Every row of several prompts agrees to within 1e-4 of the logits' scale."""
    for index in (0, 8, 15, 17):
        prompt = reference.prompts[index]
        with torch.inference_mode():
            expected = reference.model(torch.tensor([prompt])).logits[0]
        torch.testing.assert_close(logits_of(smollm2, prompt), expected, rtol=1e-4, atol=1e-4)


def test_alone(smollm2: LoadedModel, reference: Reference) -> None:
    """One prompt at a time, each with an empty cache before it."""
    out = Output()
    for job in jobs_of(reference):
        single = finish_all(make_engine(smollm2, 1024), [job])
        out.tokens |= single.tokens
        out.finishes |= single.finishes
        assert single.cached[job.id] == 0
    assert_equal(out, reference)


def test_eight_at_a_time_with_other_traffic_cold_and_warm(
    smollm2: LoadedModel, reference: Reference
) -> None:
    """Strangers of another tenant sample beside the prompts; the second round hits the cache."""
    engine = make_engine(smollm2, max_running=8, step_tokens_max=256)

    def round_of(name: str) -> Output:
        strangers = [
            make_job(
                f"{name}-stranger{i}",
                random_tokens(20 + 37 * i, i, 49_000),
                max_tokens=20,
                temperature=0.9,
                band=Band(i % 3),
                salt=b"stranger",
            )
            for i in range(4)
        ]
        return finish_all(engine, [*strangers, *jobs_of(reference, name)])

    cold = round_of("cold")
    assert_equal(cold, reference, "cold")
    warm = round_of("warm")
    assert_equal(warm, reference, "warm")
    for i, prompt in enumerate(reference.prompts):
        # whole blocks, and at least one token is left to compute
        assert warm.cached[f"warm{i}"] == (len(prompt) - 1) // 16 * 16


def test_chunked_at_32_tokens(smollm2: LoadedModel, reference: Reference) -> None:
    """No step computes more than 32 tokens, so long prompts arrive in a dozen pieces."""
    engine = make_engine(smollm2, max_running=20, step_tokens_max=32)
    out = finish_all(engine, jobs_of(reference))
    assert_equal(out, reference)
    assert len(out.stories["p19"].chunks) >= 8
    assert max(tokens for tokens, _, _ in out.stories["p19"].chunks) <= 32


def test_speculated(
    smollm2: LoadedModel, reference: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guesses that come true, and some that part from the text in the middle: the same text."""
    texts = [p + o for p, o in zip(reference.prompts, reference.outputs, strict=True)]
    monkeypatch.setattr(Guesser, "guess", guesses_from(texts))
    out = finish_all(make_engine(smollm2), jobs_of(reference))
    assert_equal(out, reference)
    guessed = sum(story.guessed for story in out.stories.values())
    right = sum(story.guessed_right for story in out.stories.values())
    assert 0.3 * guessed < right < guessed


def test_under_preemption(smollm2: LoadedModel, reference: Reference) -> None:
    """The pool holds the longest prompt and little else, so sequences keep giving way."""
    longest = max(map(len, reference.prompts)) + NEW_TOKENS
    engine = make_engine(smollm2, longest + 48)
    out = finish_all(engine, jobs_of(reference))
    assert_equal(out, reference)
    assert sum(story.preemptions for story in out.stories.values()) > 0


def test_resumed(smollm2: LoadedModel, reference: Reference) -> None:
    """Jobs that another worker had brought 1, 13 or 23 tokens far go on after them."""
    outputs = reference.outputs
    done = [(1, 13, 23)[i % 3] for i in range(20)]
    jobs = [
        make_job(
            f"p{i}",
            prompt,
            max_tokens=NEW_TOKENS,
            logged=reference.outputs[i][: done[i]],
            attempt=2,
        )
        for i, prompt in enumerate(reference.prompts)
    ]
    out = finish_all(make_engine(smollm2), jobs)
    firsts = {delta.job: delta.first for delta in reversed(out.deltas)}
    for i in range(20):
        assert out.tokens[f"p{i}"] == outputs[i][done[i] :]
        assert firsts[f"p{i}"] == done[i]
    assert {delta.attempt for delta in out.deltas} == {2}


def test_blocks_travel_between_engines(smollm2: LoadedModel, reference: Reference) -> None:
    """One engine's KV goes to another, which computes less and says the same."""
    first, second = make_engine(smollm2), make_engine(smollm2)
    longest = make_job("p", reference.prompts[19], max_tokens=NEW_TOKENS)
    sent = finish_all(first, [longest]).blocks
    missing = second.missing_blocks(longest).hashes
    assert len(missing) == (len(longest.prompt) - 1) // 16
    assert first.missing_blocks(longest).hashes == []
    second.add(longest, [sent[block_hash] for block_hash in missing])
    second.check_integrity()
    out = finish_all(second)
    assert out.tokens["p"] == reference.outputs[19]
    assert out.stories["p"].cached_imported == len(missing) * 16
    assert out.cached["p"] == len(missing) * 16
    # what came from the cache service is not offered to it again
    assert not out.blocks.keys() & set(missing)


def test_moved_to_another_engine(smollm2: LoadedModel, reference: Reference) -> None:
    """A real model in float32, all prompts at once, from one engine to another after a token."""
    prefill, decode = make_engine(smollm2, step_tokens_max=128), make_engine(smollm2)
    jobs = {
        f"p{i}": make_job(f"p{i}", prompt, max_tokens=NEW_TOKENS)
        for i, prompt in enumerate(reference.prompts)
    }
    for job in jobs.values():
        prefill.add(replace(job, move_to="d", move_address="tcp://127.0.0.1:1"))
    firsts: dict[str, list[int]] = {}
    there = []
    while prefill.has_work:
        result = prefill.step()
        firsts |= {delta.job: list(delta.tokens) for delta in result.deltas}
        payloads = [take_export(export) for export in result.lent]
        decode.take_in(payloads, Band.STANDARD, "t")
        there += [
            replace(jobs[s.job], attempt=2, logged=pack_tokens(firsts[s.job]))
            for s in result.handed
        ]
    rest = finish_all(decode, there)
    for number, expected in enumerate(reference.outputs):
        name = f"p{number}"
        assert [*firsts[name], *rest.tokens[name]] == expected, f"prompt {number}"
