"""Logprobs in the shapes of OpenAI's three endpoints, and of vLLM's `prompt_logprobs`.

The scripted engine scores token t with -1 - t / 1000 and always has one that is more probable.
"""

from __future__ import annotations

import math
from typing import Any

import pytest

from headrace.types import Finish, FinishReason, Job, TokenLogprobs
from headrace_gateway.generation import Chunk
from headrace_gateway.tokens import ModelTokenizer
from support.api import (
    MODEL,
    ScriptedFleet,
    Step,
    encode,
    logprobs_of,
    make_record,
    running_gateway,
    say,
)

HI = [{"role": "user", "content": "Hi"}]
TEXT = "Hello, 😀 naïve wörld"
CHAT, COMPLETIONS, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
TOKENIZER = ModelTokenizer(make_record())
LOGPROBS = "message.output_text.logprobs"


def spelled(token: int) -> str:
    return raw(token).decode(errors="replace")


def raw(token: int) -> bytes:
    """The bytes of one token, from the vocabulary's own spelling."""
    return TOKENIZER.bytes_of(token)


def check_entries(entries: list[dict[str, Any]], tokens: list[int], top: int) -> None:
    """Every entry is exactly what the engine reported of its token."""
    assert [bytes(entry["bytes"]) for entry in entries] == [raw(token) for token in tokens]
    for entry, token in zip(entries, tokens, strict=True):
        reported = logprobs_of(token, top)
        assert entry["token"] == spelled(token)
        assert entry["logprob"] == reported.logprob
        assert [
            (each["token"], each["logprob"], bytes(each["bytes"])) for each in entry["top_logprobs"]
        ] == [(spelled(other), logprob, raw(other)) for other, logprob in reported.top]


@pytest.mark.parametrize("per_chunk", [1, 3, 100])
async def test_chat(per_chunk: int) -> None:
    """Whole and streamed alike; the end of turn is no part of the content, as at OpenAI."""
    fleet = ScriptedFleet(script=lambda job: say(TEXT, per_chunk=per_chunk))
    async with running_gateway(fleet) as g:
        answer = await g.openai.chat.completions.create(
            model=MODEL, messages=HI, logprobs=True, top_logprobs=3
        )
        logprobs = answer.choices[0].logprobs
        assert logprobs is not None
        assert logprobs.refusal is None
        whole = [entry.to_dict() for entry in logprobs.content or []]
        check_entries(whole, encode(TEXT), 3)
        assert b"".join(bytes(entry["bytes"]) for entry in whole).decode() == TEXT
        stream = await g.openai.chat.completions.create(
            model=MODEL, messages=HI, logprobs=True, top_logprobs=3, stream=True
        )
        entries: list[dict[str, Any]] = []
        text = ""
        async for chunk in stream:
            choice = chunk.choices[0]
            text += choice.delta.content or ""
            for entry in (choice.logprobs and choice.logprobs.content) or []:
                entries.append(entry.to_dict())
            # a chunk's logprobs are those of its text, not of what comes or of what was
            assert b"".join(bytes(e["bytes"]) for e in entries).decode() == text
        assert entries == whole
        async with g.openai.chat.completions.stream(
            model=MODEL, messages=HI, logprobs=True, top_logprobs=3
        ) as helper:
            final = await helper.get_final_completion()
        assert final.choices[0].logprobs is not None
        assert [e.to_dict() for e in final.choices[0].logprobs.content or []] == whole


async def test_chat_without_alternatives_and_without_logprobs() -> None:
    async with running_gateway(ScriptedFleet(script=lambda job: say("one"))) as g:
        _, answer = await g.post(CHAT, {"model": MODEL, "messages": HI, "logprobs": True})
        [choice] = answer["choices"]  # type: ignore[misc]
        check_entries(choice["logprobs"]["content"], encode("one"), 0)
        _, answer = await g.post(CHAT, {"model": MODEL, "messages": HI})
        [choice] = answer["choices"]  # type: ignore[misc]
        assert choice["logprobs"] is None


async def test_completions() -> None:
    """`top_logprobs` are maps by text that always hold the token itself; the end is told too."""
    async with running_gateway(ScriptedFleet(script=lambda job: say(TEXT))) as g:
        tokens = [*encode(TEXT), 2]
        for top in (0, 1, 5):
            answer = await g.openai.completions.create(
                model=MODEL, prompt="Hi", logprobs=top, max_tokens=50
            )
            logprobs = answer.choices[0].logprobs
            assert logprobs is not None
            assert logprobs.tokens == [spelled(token) for token in tokens]
            assert logprobs.token_logprobs == [logprobs_of(t, 0).logprob for t in tokens]
            assert logprobs.top_logprobs is not None
            for found, token in zip(logprobs.top_logprobs, tokens, strict=True):
                pairs = [(token, logprobs_of(token, 0).logprob), *logprobs_of(token, top).top]
                # sorted so that of equal texts, which halves of characters have, the best stays
                assert found == dict(sorted((spelled(t), p) for t, p in pairs))
            assert logprobs.text_offset is not None
            ends = [*logprobs.text_offset[1:], len(TEXT)]
            for token, begin, end in zip(tokens, logprobs.text_offset, ends, strict=True):
                assert TEXT[begin:end] in ("", spelled(token), "😀", "ï", "ö")
            texts: dict[str, list[Any]] = {"tokens": [], "text_offset": [], "token_logprobs": []}
            text = ""
            stream = await g.openai.completions.create(
                model=MODEL, prompt="Hi", logprobs=top, max_tokens=50, stream=True
            )
            async for chunk in stream:
                text += chunk.choices[0].text
                for name, values in texts.items():
                    values += getattr(chunk.choices[0].logprobs, name, None) or []
            assert text == TEXT
            assert texts == {name: getattr(logprobs, name) for name in texts}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("kind", ["text", "ids", "bos"])
async def test_echo_with_logprobs_scores_the_prompt(kind: str, stream: bool) -> None:
    """What evaluation harnesses send: `echo`, `logprobs`, one token or none to generate."""
    text = "the lazy dog, 😀"
    prompt: Any = text if kind != "ids" else encode(text)
    tokens = [*([0] if kind == "bos" else []), *encode(text)]
    record = make_record(add_bos=kind == "bos")
    for asked, more in ((0, []), (1, encode("x"))):
        fleet = ScriptedFleet(record, script=lambda job: say("x", reason=FinishReason.LENGTH))
        async with running_gateway(fleet) as g:
            body = {"model": MODEL, "prompt": prompt, "echo": True, "logprobs": 2,
                    "max_tokens": asked, "stream": stream}  # fmt: skip
            choice = await one_choice(g, body)
            sampling = g.fleet.jobs[0].sampling
            assert (sampling.max_tokens, sampling.prompt_logprobs) == (asked, 2)
            assert choice["text"] == text + "x" * asked
            assert choice["finish_reason"] == "length"
            logprobs = choice["logprobs"]
            assert logprobs["tokens"] == [spelled(token) for token in [*tokens, *more]]
            scores = [logprobs_of(token, 0).logprob for token in [*tokens, *more]]
            assert logprobs["token_logprobs"] == [None, *scores[1:]]
            assert logprobs["top_logprobs"][0] is None
            for token, top in zip(tokens[1:], logprobs["top_logprobs"][1:], strict=False):
                texts = {spelled(token): logprobs_of(token, 0).logprob, spelled(token + 1): -0.5}
                assert top == texts, "equal texts, which halves of characters have, count once"
            shown = [(o, t) for o, t in zip(logprobs["text_offset"], tokens, strict=False) if t]
            assert all(
                text.startswith(spelled(t), o) for o, t in shown if "\ufffd" not in spelled(t)
            )
            assert logprobs["text_offset"][0] == 0
            if more:
                assert logprobs["text_offset"][-1] == len(text)


async def one_choice(g: Any, body: dict[str, Any]) -> dict[str, Any]:
    """The only choice of an answer; a streamed one is put together again."""
    if not body["stream"]:
        _, answer = await g.post(COMPLETIONS, body)
        choice: dict[str, Any] = answer["choices"][0]
        return choice
    made: dict[str, Any] = {"text": "", "logprobs": None, "finish_reason": None}
    async for chunk in await g.openai.completions.create(**body):
        choice = chunk.choices[0].to_dict()
        made["text"] += choice["text"]
        made["finish_reason"] = choice.get("finish_reason")
        if made["logprobs"] is None:
            made["logprobs"] = choice["logprobs"]
        elif choice.get("logprobs"):
            for name, values in choice["logprobs"].items():
                made["logprobs"][name] += values
    return made


async def test_echo_without_logprobs() -> None:
    """Several prompts and choices: each begins with its own prompt, streamed or not."""
    async with running_gateway(ScriptedFleet(script=lambda job: say("x"))) as g:
        for prompt in (["ab", "c"], [encode("ab"), encode("c")]):
            options: dict[str, Any] = {"model": MODEL, "prompt": prompt, "echo": True, "n": 2}
            answer = await g.openai.completions.create(**options)
            assert [choice.text for choice in answer.choices] == ["abx", "abx", "cx", "cx"]
            texts = [""] * 4
            async for chunk in await g.openai.completions.create(**options, stream=True):
                texts[chunk.choices[0].index] += chunk.choices[0].text
            assert texts == ["abx", "abx", "cx", "cx"]
        answer = await g.openai.completions.create(
            model=MODEL, prompt="ab", echo=True, max_tokens=0
        )
        assert (answer.choices[0].text, answer.choices[0].logprobs) == ("ab", None)
        assert answer.usage is not None
        assert answer.usage.completion_tokens == 0


async def test_prompt_logprobs_in_vllms_shape() -> None:
    """A map by token id for each prompt token but the first, with ranks where they are known."""
    async with running_gateway(ScriptedFleet(script=lambda job: say("x"))) as g:
        prompt = encode("the lazy dog")
        body = {"model": MODEL, "prompt": prompt, "prompt_logprobs": 1, "logprobs": 0, "echo": True}
        _, answer = await g.post(COMPLETIONS, body)
        [choice] = answer["choices"]  # type: ignore[misc]
        assert choice["prompt_logprobs"] == [None] + [
            {
                str(token + 1): {"logprob": -0.5, "rank": 1, "decoded_token": spelled(token + 1)},
                str(token): {
                    "logprob": -1 - token / 1_000, "rank": None, "decoded_token": spelled(token),
                },
            }
            for token in prompt[1:]
        ]  # fmt: skip
        tops = choice["logprobs"]["top_logprobs"][1:]
        assert [len(top) for top in tops] == [1] * len(tops), "fewer were asked for there"
        _, answer = await g.post(CHAT, {"model": MODEL, "messages": HI, "prompt_logprobs": 0})
        found = answer["prompt_logprobs"]
        assert isinstance(found, list)
        assert len(found) == len(g.fleet.jobs[-1].prompt)
        assert [next(iter(entry)) for entry in found[1:]] == [
            str(token) for token in g.fleet.jobs[-1].prompt[1:]
        ]


async def test_responses() -> None:
    """In the deltas, in the `done` event and in the part, when `include` asks for them."""
    async with running_gateway(ScriptedFleet(script=lambda job: say(TEXT))) as g:
        options: dict[str, Any] = {
            "model": MODEL, "input": "Hi", "include": [LOGPROBS], "top_logprobs": 2,
        }  # fmt: skip
        answer = await g.openai.responses.create(**options)
        part = answer.to_dict()["output"][0]["content"][0]  # type: ignore[index]
        check_entries(part["logprobs"], encode(TEXT), 2)
        assert answer.top_logprobs == 2
        events = [
            e.to_dict() async for e in await g.openai.responses.create(**options, stream=True)
        ]
        deltas = [e for e in events if e["type"] == "response.output_text.delta"]
        assert [entry for e in deltas for entry in e["logprobs"]] == part["logprobs"]  # type: ignore[attr-defined]
        [done] = [e for e in events if e["type"] == "response.output_text.done"]
        assert done["logprobs"] == part["logprobs"]
        plain = await g.openai.responses.create(model=MODEL, input="Hi")
        assert plain.to_dict()["output"][0]["content"][0]["logprobs"] == []  # type: ignore[index]


async def test_what_json_has_no_number_for_is_told_as_the_lowest() -> None:
    """A banned token has a probability of zero; nothing that is not JSON leaves the gateway."""
    odd = TokenLogprobs(-math.inf, ((7, -0.25), (8, -math.inf), (9, math.nan)))

    async def ask(path: str, **body: Any) -> Any:
        async with g.http.post(path, json={"model": MODEL, **body}) as response:
            assert "NaN" not in await response.text()
            assert "Infinity" not in await response.text()
            return await response.json()

    class Odd(ScriptedFleet):
        async def submit(self, job: Job, span: Any) -> Any:
            generation = await super().submit(job, span)
            generation.steps[:] = [
                Chunk((5,), Finish(FinishReason.LENGTH), logprobs=(odd,), prompt_logprobs=(odd,))
            ]
            return generation

    async with running_gateway(Odd()) as g:
        answer = await ask(CHAT, messages=HI, logprobs=True, top_logprobs=3)
        [entry] = answer["choices"][0]["logprobs"]["content"]
        assert entry["logprob"] == -9999.0
        assert [top["logprob"] for top in entry["top_logprobs"]] == [-0.25, -9999.0, -9999.0]
        answer = await ask(COMPLETIONS, prompt=[3, 4], logprobs=3, echo=True, prompt_logprobs=3)
        assert answer["choices"][0]["logprobs"]["token_logprobs"] == [None, -9999.0, -9999.0]
        assert answer["choices"][0]["prompt_logprobs"][1]["4"]["logprob"] == -9999.0


async def test_several_choices_have_logprobs_of_their_own() -> None:
    def script(job: Job) -> list[Step]:
        return say("abc"[int(job.id.rpartition("-")[2])])

    async with running_gateway(ScriptedFleet(script=script)) as g:
        answer = await g.openai.chat.completions.create(
            model=MODEL, messages=HI, n=3, logprobs=True
        )
        for choice, letter in zip(answer.choices, "abc", strict=True):
            assert choice.logprobs is not None
            assert [entry.token for entry in choice.logprobs.content or []] == [letter]
