"""Every sampling option: from the body into the job, or refused by name."""

from __future__ import annotations

import asyncio
from dataclasses import fields, replace
from typing import Any

import openai
import pytest

from headrace.types import NO_LOGPROBS, FinishReason, Job, Sampling
from headrace_gateway.generation import Chunk
from support.api import (
    MODEL,
    ScriptedFleet,
    Step,
    encode,
    make_record,
    running_gateway,
    say,
    tiny_tokenizer,
)

VALID: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}]},
    "/v1/completions": {"model": MODEL, "prompt": "Hi"},
    "/v1/responses": {"model": MODEL, "input": "Hi"},
}
CHAT, COMPLETIONS, RESPONSES = VALID
EVERYTHING: dict[str, Any] = {
    "temperature": 0, "top_p": 0.5, "top_k": 7, "min_p": 0.25, "typical_p": 0.75,
    "presence_penalty": -2, "frequency_penalty": 1.5, "repetition_penalty": 1.25,
    "logit_bias": {"5": -100, "300": 2.5}, "seed": 11, "stop_token_ids": [6, 7],
    "ignore_eos": True, "min_tokens": 3, "stop": ["x", "y"],
}  # fmt: skip


def test_a_jobs_own_sampling_is_that_of_all_but_for_two_fields() -> None:
    """`of_job` names every field: one that it forgot would have its default here."""
    other: dict[type, Any] = {bool: True, str: "x", tuple: (1,)}
    values = {
        each.name: other.get(type(each.default), number)
        for number, each in enumerate(fields(Sampling), 100)
    }
    sampling = Sampling(**values)
    assert sampling.of_job(7, 9) == replace(sampling, max_tokens=7, seed=9)


@pytest.mark.parametrize("path", VALID)
async def test_every_option_reaches_the_job(path: str) -> None:
    limit = "max_output_tokens" if path == RESPONSES else "max_tokens"
    async with running_gateway() as g:
        status, answer = await g.post(path, VALID[path] | EVERYTHING | {limit: 9})
        assert status == 200, answer
        assert g.fleet.jobs[0].sampling == Sampling(
            max_tokens=9,
            temperature=0.0,
            top_p=0.5,
            top_k=7,
            seed=11,
            stop_token_ids=(6, 7),
            ignore_eos=True,
            min_p=0.25,
            typical_p=0.75,
            presence_penalty=-2.0,
            frequency_penalty=1.5,
            repetition_penalty=1.25,
            logit_bias=((5, -100.0), (300, 2.5)),
            min_tokens=3,
        )


@pytest.mark.parametrize("path", VALID)
async def test_defaults_change_nothing(path: str) -> None:
    """Without options, and with every option null, the model's own distribution is sampled."""
    nulls = dict.fromkeys([*EVERYTHING, "bad_words", "include_stop_str_in_output"])
    async with running_gateway() as g:
        for body in (VALID[path], VALID[path] | nulls, VALID[path] | {"top_k": -1}):
            status, answer = await g.post(path, body)
            assert status == 200, answer
        for job in g.fleet.jobs:
            assert job.sampling == Sampling(job.sampling.max_tokens, seed=job.sampling.seed)


async def test_options_reach_the_job_over_a_websocket() -> None:
    async with running_gateway() as g, g.http.ws_connect(RESPONSES) as socket:
        create = {"type": "response.create", **VALID[RESPONSES], **EVERYTHING}
        await socket.send_json(create)
        assert (await socket.receive_json(timeout=5))["type"] == "response.created"
        sampling = g.fleet.jobs[0].sampling
        assert (sampling.min_p, sampling.logit_bias[0]) == (0.25, (5, -100.0))
        await socket.send_json(create | {"min_p": 2, "stream_id": "a"})
        while (event := await socket.receive_json(timeout=5))["type"] != "error":
            pass
        assert event["error"]["param"] == "min_p"


async def test_bad_words_are_banned_at_the_start_and_after_a_space() -> None:
    """As vLLM does it: each word as it is written, and with a space before it."""
    async with running_gateway() as g:
        await g.post(CHAT, VALID[CHAT] | {"bad_words": ["lazy dog", " mill", "again"]})
        words = g.fleet.jobs[0].sampling.bad_words
        texts = [tiny_tokenizer().decode(list(word)) for word in words]
        assert texts == ["lazy dog", " lazy dog", " mill", "again", " again"]
        status, answer = await g.post(CHAT, VALID[CHAT] | {"bad_words": ["a", ""]})
        assert (status, answer["error"]["param"]) == (400, "bad_words[1]")  # type: ignore[index]


BAD: dict[str, list[Any]] = {
    "top_k": [-2, 1.5, "3"],
    "min_p": [-0.1, 1.1, "x", True],
    "typical_p": [0, 1.5, []],
    "presence_penalty": [-2.1, 2.1, "x", True],
    "frequency_penalty": [-2.1, 2.1, {}],
    "repetition_penalty": [0, -1, 2.1, "x"],
    "logit_bias": [[], "x", {str(t): 1 for t in range(1_025)}, {"400": 1}, {"4294967296": 1}],
    "logit_bias.5": [{"5": 101}, {"5": -101}, {"5": "x"}, {"5": None}, {"5": True}],
    "logit_bias.x": [{"x": 1}],
    "logit_bias.-1": [{"-1": 1}],
    "logit_bias.05": [{"05": 1}],
    "min_tokens": [-1, 1.5, "x", 1_999],
    "stop_token_ids": ["x", [400], list(range(65))],
    "stop_token_ids[1]": [[1, -1], [1, 2**32], [1, "x"]],
    "bad_words": ["x", ["a"] * 129],
    "bad_words[0]": [[5], [""], ["x" * 257]],
    "include_stop_str_in_output": ["x", 1],
    "use_beam_search": [True],
    "length_penalty": [1.5],
    "allowed_token_ids": [[1]],
    "skip_special_tokens": [False],
    "truncate_prompt_tokens": [5],
    "suffix": ["x"],
}


@pytest.mark.parametrize("path", VALID)
async def test_a_value_out_of_range_is_refused_by_the_name_of_its_field(path: str) -> None:
    async with running_gateway() as g:
        assert make_record().vocab_size < 400
        for param, values in BAD.items():
            for value in values:
                field = param.partition(".")[0].partition("[")[0]
                status, answer = await g.post(path, VALID[path] | {field: value})
                assert status == 400, (param, value, answer)
                assert answer["error"]["param"] == param, (value, answer)  # type: ignore[index]
        assert not g.fleet.jobs


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        (COMPLETIONS, {"n": 3, "best_of": 2}, "best_of"),
        (COMPLETIONS, {"best_of": 2, "stream": True}, "best_of"),
        (COMPLETIONS, {"best_of": 21}, "best_of"),
        (COMPLETIONS, {"best_of": 20, "prompt": ["a", "b"]}, "best_of"),
        (COMPLETIONS, {"max_tokens": 0}, "max_tokens"),
        (COMPLETIONS, {"min_tokens": 17}, "min_tokens"),
        (COMPLETIONS, {"min_tokens": 5, "max_tokens": 4}, "min_tokens"),
        (COMPLETIONS, {"logprobs": 21}, "logprobs"),
        (COMPLETIONS, {"logprobs": True}, "logprobs"),
        (COMPLETIONS, {"top_logprobs": 2}, "top_logprobs"),
        (COMPLETIONS, {"prompt_logprobs": -1}, "prompt_logprobs"),
        (COMPLETIONS, {"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
        (CHAT, {"max_tokens": 0}, "max_tokens"),
        (CHAT, {"logprobs": 2}, "logprobs"),
        (CHAT, {"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        (CHAT, {"top_logprobs": 2}, "top_logprobs"),
        (CHAT, {"logprobs": False, "top_logprobs": 2}, "top_logprobs"),
        (CHAT, {"best_of": 2}, "best_of"),
        (CHAT, {"echo": True}, "echo"),
        (CHAT, {"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
        (RESPONSES, {"top_logprobs": 2}, "top_logprobs"),
        (RESPONSES, {"include": "x"}, "include"),
        (RESPONSES, {"n": 2}, "n"),
        (RESPONSES, {"max_tokens": 5}, "max_tokens"),
        (RESPONSES, {"logprobs": True}, "logprobs"),
        (RESPONSES, {"echo": True}, "echo"),
    ],
)
async def test_what_does_not_go_together_is_refused(
    path: str, fields: dict[str, Any], param: str
) -> None:
    async with running_gateway() as g:
        status, answer = await g.post(path, VALID[path] | fields)
        assert status == 400, answer
        assert answer["error"]["param"] == param, answer  # type: ignore[index]
        assert not g.fleet.jobs


async def test_what_would_not_fit_a_reply_stream_is_refused() -> None:
    """26,000 prompt tokens with 21 numbers each would be one entry of more than 6 MB."""
    async with running_gateway(ScriptedFleet(make_record(context_tokens=30_000))) as g:
        body = {"model": MODEL, "prompt": [5] * 26_000, "echo": True, "logprobs": 20}
        status, answer = await g.post(COMPLETIONS, body)
        assert (status, answer["error"]["param"]) == (400, "logprobs")  # type: ignore[index]
        status, answer = await g.post(COMPLETIONS, body | {"prompt_logprobs": 20, "logprobs": 1})
        assert (status, answer["error"]["param"]) == (400, "prompt_logprobs")  # type: ignore[index]


async def test_the_best_of_several_by_their_mean_logprob() -> None:
    """Five jobs a prompt, the two most probable are told, the best first, all are counted.

    The engine scores token t with -1 - t / 1000, so that lower ids are more probable.
    """

    def script(job: Job) -> list[Step]:
        index = int(job.id.rpartition("-")[2])
        tokens = [200, 50, 100, 10, 150][index % 5]
        # a long choice is no worse than a short one: the mean counts, not the sum
        count = 1 + index % 5
        return [
            Chunk((tokens,) * count, None),
            *say("", reason=FinishReason.STOP),
        ]

    async with running_gateway(ScriptedFleet(script=script)) as g:
        answer = await g.openai.completions.create(
            model=MODEL, prompt=["a", "b"], n=2, best_of=5, max_tokens=9
        )
        spell = tiny_tokenizer().decode
        assert [choice.text for choice in answer.choices] == [spell([10] * 4), spell([50] * 2)] * 2
        assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
        assert all(choice.logprobs is None for choice in answer.choices), "nobody asked for them"
        assert len(g.fleet.jobs) == 10
        assert {job.sampling.logprobs for job in g.fleet.jobs} == {0}
        assert answer.usage is not None
        assert answer.usage.completion_tokens == 2 * sum(count + 1 for count in range(1, 6))
        g.fleet.generations.clear()
        await g.openai.completions.create(model=MODEL, prompt="a", n=2, best_of=2)
        assert [job.sampling.logprobs for job in g.fleet.jobs] == [NO_LOGPROBS] * 2


async def test_stop_strings_do_not_count_before_min_tokens() -> None:
    """'STOP' comes twice: the first ends nothing, as only the second is late enough."""
    never = asyncio.Event()
    before, stop = encode("one STOP two"), encode(" STOP")
    steps = [*(Chunk((token,), None) for token in before + stop), never]

    async with running_gateway(ScriptedFleet(script=lambda job: list(steps))) as g:
        for path in VALID:
            late, early = len(before) + 1, 1
            for least, text in ((late, "one STOP two "), (early, "one ")):
                _, answer = await g.post(path, VALID[path] | {"stop": "STOP", "min_tokens": least})
                assert text_of(answer) == text
        await g.settled()


async def test_the_stop_string_can_stay_in_the_text() -> None:
    """Of two that stand at one place the one that was complete first, not what follows it."""
    steps = [Chunk(tuple(encode("one STOPPED two")), None), asyncio.Event()]
    async with running_gateway(ScriptedFleet(script=lambda job: list(steps))) as g:
        for path in VALID:
            fields = {"stop": ["STOPPED", "STOP"], "include_stop_str_in_output": True}
            _, answer = await g.post(path, VALID[path] | fields)
            assert text_of(answer) == "one STOP"


def text_of(answer: dict[str, Any]) -> str:
    if "output" in answer:
        return str(answer["output"][0]["content"][0]["text"])
    choice = answer["choices"][0]
    return str(choice["text"] if "text" in choice else choice["message"]["content"])


async def test_what_the_engine_would_refuse_is_refused_at_the_door() -> None:
    """Token ids outside the vocabulary, wherever they stand, in the client's own error type."""
    async with running_gateway() as g:
        for fields in ({"logit_bias": {"9999": 1}}, {"stop_token_ids": [9_999]}):
            with pytest.raises(openai.BadRequestError, match="9999 is outside the vocabulary"):
                await g.openai.completions.create(model=MODEL, prompt="Hi", extra_body=fields)


def test_a_job_differs_from_its_neighbours_in_seed_alone() -> None:
    """n jobs of a request: the same Sampling but for the seed, which makes them differ."""

    async def run() -> list[Sampling]:
        async with running_gateway() as g:
            await g.post(CHAT, VALID[CHAT] | EVERYTHING | {"n": 3})
            return [job.sampling for job in g.fleet.jobs]

    first, second, third = asyncio.run(run())
    assert (first.seed, second.seed, third.seed) == (11, 12, 13)
    assert replace(second, seed=11) == replace(third, seed=11) == first
