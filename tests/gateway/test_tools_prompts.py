"""What a model reads of functions, calls and results: by its own template's way, or by ours."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from headrace.clock import ManualClock
from headrace.errors import CallerError
from headrace_gateway.templates import TEMPLATES_MAX, ChatTemplates
from headrace_gateway.tools.conversation import has_calls, prepared
from headrace_gateway.tools.dialects import Dialect, Dialects
from headrace_gateway.tools.formats import Format, parser_for
from headrace_gateway.tools.offer import Function
from support import tools as t
from support.api import CHATML, make_record

Message = dict[str, Any]
FUNCTIONS = [t.weather(), t.time()]


def call(number: int, city: str, name: str = "get_weather") -> Message:
    return {
        "id": f"call_{number:032x}",
        "type": "function",
        "function": {"name": name, "arguments": {"city": city}},
    }


def result(number: int, content: str) -> Message:
    call_id = f"call_{number:032x}"
    return {"role": "tool", "tool_call_id": call_id, "name": "get_weather", "content": content}


USER: Message = {"role": "user", "content": "Rain in Köln or Rome?"}
CALLS: Message = {
    "role": "assistant",
    "content": "",
    "tool_calls": [call(1, 'Köln "am Rhein"'), call(2, "Rome")],
}
TALK: list[Message] = [
    {"role": "system", "content": "Be brief."},
    USER,
    CALLS,
    result(2, "sun"),
    result(1, "rain"),
]
FORMATS: list[tuple[str, Dialect]] = [
    (t.QWEN, Dialect(Format.HERMES)),
    (t.HERMES, Dialect(Format.HERMES)),
    (t.LLAMA, Dialect(Format.LLAMA, one_call=True)),
    (t.MISTRAL, Dialect(Format.MISTRAL_LIST, short_ids=True)),
    (t.MISTRAL_NAMED, Dialect(Format.MISTRAL_NAMED, short_ids=True)),
    (t.TEXT_ARGUMENTS, Dialect(Format.HERMES, text_arguments=True)),
    (t.XML, Dialect(Format.HERMES, own=True)),
    (CHATML, Dialect(Format.HERMES, own=True)),
    (t.NO_SYSTEM, Dialect(Format.HERMES, own=True, system_role=False)),
]


def dialect_of(template: str) -> Dialect:
    return Dialects(ChatTemplates(ManualClock())).of(t.tool_record(template))


def render(template: str, messages: list[Message], functions: list[Function]) -> str:
    made, tools = prepared(messages, functions, dialect_of(template))
    return ChatTemplates(ManualClock()).render(t.tool_record(template), made, tools)


@pytest.mark.parametrize(("template", "dialect"), FORMATS)
def test_a_dialect_is_found_by_what_the_template_does(template: str, dialect: Dialect) -> None:
    """Formats, ids, arguments' form: nothing of it stands in the model's record."""
    assert dialect_of(template) == dialect


@pytest.mark.parametrize("template", [template for template, _ in FORMATS])
@pytest.mark.parametrize("offered", [0, 1, 2])
def test_prompts_are_what_transformers_makes_of_the_same_messages(
    template: str, offered: int
) -> None:
    """Letter by letter, with and without functions offered; and everything stands in them."""
    from transformers import PreTrainedTokenizerFast

    dialect, record = dialect_of(template), t.tool_record(template)
    messages, tools = prepared(TALK, FUNCTIONS[:offered], dialect)
    if not dialect.system_role and not offered:
        messages = messages[1:]
    mine = ChatTemplates(ManualClock()).render(record, messages, tools)
    reference = PreTrainedTokenizerFast(
        tokenizer_object=t.tool_tokenizer(), chat_template=template, **record.template_tokens
    )
    assert mine == reference.apply_chat_template(
        messages, tools=tools, tokenize=False, add_generation_prompt=True
    )
    for said in ("Köln or Rome", "am Rhein", "sun", "rain"):
        assert said in mine
    assert ("Today's weather" in mine, "get_time" in mine) == (offered > 0, offered > 1)


@pytest.mark.parametrize("template", [t.QWEN, t.HERMES, t.TEXT_ARGUMENTS, t.XML, CHATML])
def test_calls_are_written_again_as_the_parser_reads_them(template: str) -> None:
    """What a model said comes back to it in its own words."""
    prompt = render(template, TALK, FUNCTIONS)
    parser = parser_for(Format.HERMES, frozenset({"get_weather"}))
    events = [*parser.push(prompt), *parser.finish()]
    found = [json.loads(delta) for e in events if (delta := getattr(e, "delta", None))]
    assert found == [{"city": 'Köln "am Rhein"'}, {"city": "Rome"}]


def test_one_call_a_message_puts_each_result_behind_its_call() -> None:
    """Llama 3's template refuses several calls: they become several turns."""
    said = {**CALLS, "content": "I'll look."}
    prompt = render(t.LLAMA, [USER, said, result(2, "sun"), result(1, "rain"), USER], FUNCTIONS)
    order = [prompt.index(text) for text in ("am Rhein", '"rain"', '"Rome"', '"sun"')]
    assert order == sorted(order)
    assert prompt.count("<|assistant|>") == 3
    assert prompt.endswith("Rain in Köln or Rome?<|eot|><|assistant|>\n\n")


def test_one_call_a_message_loses_and_repeats_nothing() -> None:
    """Text stands with the first call; results of earlier calls stay where they were."""
    earlier = {"role": "assistant", "content": "", "tool_calls": [call(7, "Oslo")]}
    said = {**CALLS, "content": "I'll look."}
    talk = [USER, earlier, said, result(1, "rain"), result(7, "snow"), result(2, "sun")]
    made, _ = prepared(talk, FUNCTIONS, Dialect(Format.LLAMA, one_call=True))
    assert [message["content"] for message in made] == [
        USER["content"], "", "I'll look.", "rain", "", "sun", "snow",
    ]  # fmt: skip
    assert sum(len(message.get("tool_calls", ())) for message in made) == 3


def test_ids_become_nine_letters_where_a_template_wants_that() -> None:
    """Always the same nine for the same id, so that call and result still meet."""
    prompt = render(t.MISTRAL, TALK, FUNCTIONS)
    ids = re.findall(r'"(?:id|call_id)": "([^"]*)"', prompt)
    assert len(ids) == 4
    assert ids[:2] == [ids[3], ids[2]]
    assert all(re.fullmatch("[A-Za-z0-9]{9}", found) for found in ids)
    own = json.loads(json.dumps(TALK).replace(CALLS["tool_calls"][0]["id"], "abcDEF123"))
    assert prompt != render(t.MISTRAL, own, FUNCTIONS)
    assert '"id": "abcDEF123"' in render(t.MISTRAL, own, FUNCTIONS)


def test_our_way_describes_functions_in_the_system_message() -> None:
    """The caller's words first, then every function, then how to call; the user's untouched."""
    prompt = render(CHATML, TALK, FUNCTIONS)
    system, user, assistant, answer, end = prompt.split("<|im_start|>")[1:]
    assert system.startswith("system\nBe brief.\n\nYou can call functions.")
    described = re.search("<tools>\n(.*)\n</tools>", system, re.DOTALL)
    assert described is not None
    listed = [json.loads(line) for line in described[1].splitlines()]
    assert listed == [function.for_template() for function in FUNCTIONS]
    assert user == "user\nRain in Köln or Rome?<|im_end|>\n"
    assert assistant == (
        'assistant\n<tool_call>\n{"name": "get_weather", "arguments": {"city": "Köln \\"am Rhein'
        '\\""}}\n</tool_call>\n<tool_call>\n{"name": "get_weather", "arguments": {"city": "Rome"}}'
        "\n</tool_call><|im_end|>\n"
    )
    assert answer == (
        "user\n<tool_response>\nsun\n</tool_response>\n<tool_response>\nrain\n</tool_response>"
        "<|im_end|>\n"
    )
    assert end == "assistant\n"


def test_our_way_without_a_system_role_keeps_the_turns() -> None:
    """All goes into the first user message; what follows results joins them."""
    prompt = render(t.NO_SYSTEM, [*TALK, USER], FUNCTIONS)
    assert re.findall("<(user|assistant)>", prompt) == ["user", "assistant", "user", "assistant"]
    assert prompt.startswith("<user>Be brief.\n\nYou can call functions.")
    assert "plain words when no function is needed.\n\nRain in Köln or Rome?<assistant>" in prompt
    assert prompt.endswith("rain\n</tool_response>\nRain in Köln or Rome?<assistant>")


def test_our_way_keeps_what_the_assistant_said_before_its_calls() -> None:
    prompt = render(CHATML, [USER, {**CALLS, "content": "I'll look."}], FUNCTIONS[:1])
    assert "assistant\nI'll look.\n<tool_call>\n{" in prompt
    assert prompt.startswith("<|im_start|>system\nYou can call functions.")


def test_messages_without_calls_need_no_dialect() -> None:
    assert not has_calls([USER, {"role": "assistant", "content": "No."}])
    assert has_calls(TALK[:3])
    assert has_calls([result(1, "rain")])


def test_what_is_prepared_leaves_the_messages_as_they_were() -> None:
    """They are rendered once; still nobody is surprised."""
    before = json.dumps(TALK)
    for template, _ in FORMATS:
        prepared(TALK, FUNCTIONS, dialect_of(template))
    assert json.dumps(TALK) == before


def test_a_model_is_examined_once_and_the_oldest_is_forgotten() -> None:
    templates = ChatTemplates(ManualClock())
    dialects = Dialects(templates)
    renders: list[str] = []
    render_once = templates.render

    def counted(record: Any, *args: Any, **options: Any) -> str:
        renders.append(record.name)
        return render_once(record, *args, **options)

    templates.render = counted  # type: ignore[method-assign]
    for number in range(TEMPLATES_MAX + 1):
        dialects.of(t.tool_record(t.QWEN, f"m{number}"))
    seen = len(renders)
    dialects.of(t.tool_record(t.QWEN, "m5"))
    assert len(renders) == seen
    dialects.of(t.tool_record(t.QWEN, "m0"))
    assert len(renders) > seen


def test_a_model_without_a_readable_template_is_a_400() -> None:
    for template, said in (("", "no chat template"), ("{% endif %}", "cannot be read")):
        with pytest.raises(CallerError, match=said):
            dialect_of(template)


def test_tojson_takes_what_transformers_takes() -> None:
    """Positional arguments in its order too: Llama's templates indent, others sort."""
    template = "{{ x | default({'b': 'é', 'a': [1]}) | tojson(true, none, [',', ':'], true) }}"
    made = ChatTemplates(ManualClock()).render(make_record(chat_template=template), [USER])
    assert made == '{"a":[1],"b":"\\u00e9"}'
