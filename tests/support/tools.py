"""Builders for tests of tool calling: functions, a vocabulary with markers, chat templates.

The templates are ours, in the forms that the families use: Qwen and Hermes write `<tool_call>`,
Llama 3 a bare object and only one call a message, Mistral `[TOOL_CALLS]` in its two ways.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from tokenizers import AddedToken, Tokenizer

from headrace.types import Finish, FinishReason, Job, ModelRecord
from headrace_gateway.generation import Chunk
from headrace_gateway.tools.offer import Function
from support.api import ScriptedFleet, Step, make_record, tiny_tokenizer

SPECIAL = ("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]", "<|python_tag|>")

CITY = {
    "type": "object",
    "properties": {"city": {"type": "string", "description": "A <b>city</b>"}},
    "required": ["city"],
    "additionalProperties": False,
}
WEATHER_TOOL: dict[str, Any] = {
    "type": "function",
    "function": {"name": "get_weather", "description": "Today's weather", "parameters": CITY},
}
TIME_TOOL: dict[str, Any] = {"type": "function", "function": {"name": "get_time"}}


def weather(*, strict: bool = False) -> Function:
    return Function("get_weather", "Today's weather", CITY, strict, "tools[0].function.parameters")


def time() -> Function:
    nothing = {"type": "object", "properties": {}}
    return Function("get_time", "", nothing, False, "tools[1].function.parameters")


@cache
def tool_tokenizer() -> Tokenizer:
    """The tiny tokenizer with markers: Mistral's and Llama's special, Hermes' plain tokens."""
    tokenizer = Tokenizer.from_str(tiny_tokenizer().to_str())
    tokenizer.add_special_tokens([AddedToken(text, normalized=False) for text in SPECIAL])
    plain = ("<tool_call>", "</tool_call>")
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in plain])
    return tokenizer


def tool_record(template: str, name: str = "tools") -> ModelRecord:
    return make_record(name, chat_template=template, tokenizer=tool_tokenizer())


def tokens_of(text: str) -> list[int]:
    """As a model would say it: markers are the tokens that they are."""
    ids: list[int] = tool_tokenizer().encode(text, add_special_tokens=False).ids
    return ids


def speak(text: str, *, per_chunk: int = 1, reason: FinishReason = FinishReason.STOP) -> list[Step]:
    """Steps that deliver `text`, the end-of-turn token after it, and the finish."""
    tokens = [*tokens_of(text), *([2] if reason is FinishReason.STOP else [])]
    chunks = [tuple(tokens[at : at + per_chunk]) for at in range(0, len(tokens), per_chunk)]
    return [*map(Chunk, chunks[:-1], [None] * len(chunks)), Chunk(chunks[-1], Finish(reason))]


def tool_fleet(template: str, *texts: str, per_chunk: int = 1) -> ScriptedFleet:
    """One model, `tools`, whose jobs say `texts`, one each."""
    said = list(texts)

    def script(job: Job) -> list[Step]:
        return speak(said.pop(0), per_chunk=per_chunk)

    return ScriptedFleet(tool_record(template), script=script)


def prompt_of(job: Job) -> str:
    text: str = tool_tokenizer().decode(list(job.prompt), skip_special_tokens=False)
    return text


QWEN = """\
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}
        {{- messages[0].content + '\\n' }}
    {%- endif %}
    {{- "Tools:" }}
    {%- for tool in tools %}
        {{- "\\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- "\\nAnswer with <tool_call>\\n{\\"name\\": <name>}\\n</tool_call><|im_end|>\\n" }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == "user" or (message.role == "assistant" and not message.tool_calls) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
    {%- elif message.role == "assistant" %}
        {{- '<|im_start|>' + message.role }}
        {%- if message.content %}
            {{- '\\n' + message.content }}
        {%- endif %}
        {%- for tool_call in message.tool_calls %}
            {%- set tool_call = tool_call.function %}
            {{- '\\n<tool_call>\\n{"name": "' }}
            {{- tool_call.name }}
            {{- '", "arguments": ' }}
            {{- tool_call.arguments | tojson }}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == "tool" %}
        {%- if loop.first or messages[loop.index0 - 1].role != "tool" %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\\n<tool_response>\\n' }}
        {{- message.content }}
        {{- '\\n</tool_response>' }}
        {%- if loop.last or messages[loop.index0 + 1].role != "tool" %}
            {{- '<|im_end|>\\n' }}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""

HERMES = """\
{%- macro type_of(schema) %}{{ {"string": "str"}[schema.type] or "Any" }}{% endmacro %}
{{- bos_token }}
{%- if tools %}
    {{- '<|im_start|>system\\n<tools>' }}
    {%- for tool in tools %}
        {%- set tool = tool.function %}
        {{- '{"name": "' + tool.name + '", "signature": "' + tool.name + '(' }}
        {%- for name, fields in tool.parameters.properties | items %}
            {{- name + ": " + type_of(fields) + ("" if loop.last else ", ") }}
        {%- endfor %}
        {{- ') - ' + tool.description + '", "parameters": ' + tool.parameters | tojson + '}' }}
    {%- endfor %}
    {{- '</tools><|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == "assistant" and message.tool_calls is defined %}
        {{- '<|im_start|>assistant' }}
        {%- for call in message.tool_calls %}
            {{- '\\n<tool_call>\\n{"arguments": ' + call.function.arguments | tojson }}
            {{- ', "name": "' + call.function.name + '"}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == "tool" %}
        {%- if not message.name is defined %}
            {{- raise_exception("a result needs a name") }}
        {%- endif %}
        {{- '<|im_start|>tool\\n<tool_response>\\n{"name": "' + message.name + '", "content": ' }}
        {{- message.content | tojson + '}\\n</tool_response><|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}
"""

LLAMA = """\
{{- bos_token }}
{%- if not tools is defined %}
    {%- set tools = none %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|system|>\\n\\n" }}
{%- if tools is not none %}
    {{- "Environment: ipython\\n" }}
{%- endif %}
{{- system_message + "<|eot|>" }}
{%- if tools is not none %}
    {%- set first_user_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
    {{- '<|user|>\\n\\nAnswer {"name": name, "parameters": {}}.\\n\\n' }}
    {%- for t in tools %}
        {{- t | tojson(indent=4) }}
        {{- "\\n\\n" }}
    {%- endfor %}
    {{- first_user_message + "<|eot|>" }}
{%- endif %}
{%- for message in messages %}
    {%- if not (message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|' + message['role'] + '|>\\n\\n' + message['content'] | trim + '<|eot|>' }}
    {%- elif 'tool_calls' in message %}
        {%- if not message.tool_calls|length == 1 %}
            {{- raise_exception("only single calls") }}
        {%- endif %}
        {%- set tool_call = message.tool_calls[0].function %}
        {{- '<|assistant|>\\n\\n{"name": "' + tool_call.name + '", "parameters": ' }}
        {{- tool_call.arguments | tojson }}
        {{- "}<|eot|>" }}
    {%- else %}
        {{- "<|ipython|>\\n\\n" }}
        {%- if message.content is mapping or message.content is iterable %}
            {{- message.content | tojson }}
        {%- endif %}
        {{- "<|eot|>" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|assistant|>\\n\\n' }}
{%- endif %}
"""

_MISTRAL = """\
{%- if messages[0].role == "system" %}
    {%- set system_message = messages[0].content %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{%- set user_messages = loop_messages | selectattr("role", "equalto", "user") | list %}
{%- set turns = namespace(index=0) %}
{%- for message in loop_messages %}
    {%- if message.role in ("user", "assistant") and not message.tool_calls is defined %}
        {%- if (message.role == "user") != (turns.index % 2 == 0) %}
            {{- raise_exception("roles must alternate") }}
        {%- endif %}
        {%- set turns.index = turns.index + 1 %}
    {%- endif %}
{%- endfor %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message.role == "user" %}
        {%- if tools and message == user_messages[-1] %}
            {{- "[AVAILABLE_TOOLS]" + tools | tojson + "[/AVAILABLE_TOOLS]" }}
        {%- endif %}
        {%- if loop.last and system_message is defined %}
            {{- "[INST]" + system_message + "\\n\\n" + message.content + "[/INST]" }}
        {%- else %}
            {{- "[INST]" + message.content + "[/INST]" }}
        {%- endif %}
    {%- elif message.tool_calls is defined and message.tool_calls is not none %}
        CALLS
        {{- eos_token }}
    {%- elif message.role == "assistant" %}
        {{- message.content + eos_token }}
    {%- elif message.role == "tool" %}
        {%- if not message.tool_call_id is defined or message.tool_call_id|length != 9 %}
            {{- raise_exception("ids are nine letters and digits") }}
        {%- endif %}
        {{- '[TOOL_RESULTS]{"content": ' + message.content|string + ', "call_id": "' }}
        {{- message.tool_call_id + '"}[/TOOL_RESULTS]' }}
    {%- else %}
        {{- raise_exception("only user, assistant and tool") }}
    {%- endif %}
{%- endfor %}
"""

MISTRAL = _MISTRAL.replace(
    "CALLS",
    """\
{{- "[TOOL_CALLS] [" }}
        {%- for tool_call in message.tool_calls %}
            {%- set out = tool_call.function|tojson %}
            {{- out[:-1] }}
            {%- if not tool_call.id is defined or tool_call.id|length != 9 %}
                {{- raise_exception("ids are nine letters and digits") }}
            {%- endif %}
            {{- ', "id": "' + tool_call.id + '"}' }}
            {{- "]" if loop.last else ", " }}
        {%- endfor %}""",
)

MISTRAL_NAMED = _MISTRAL.replace(
    "CALLS",
    """\
{%- for tool_call in message.tool_calls %}
            {{- "[TOOL_CALLS]" + tool_call.function.name + "[ARGS]" }}
            {{- tool_call.function.arguments|tojson }}
        {%- endfor %}""",
)

TEXT_ARGUMENTS = QWEN.replace("tool_call.arguments | tojson", "tool_call.arguments + ''")
"""Takes arguments as JSON text, as OpenAI's API has them."""

XML = QWEN.replace(
    """{{- '", "arguments": ' }}""", """{{- '", "arguments": {"x": <parameter>' }}"""
)
"""Knows functions, and writes calls in a way that nobody here reads."""

NO_SYSTEM = (
    "{% for message in messages %}{% if message.role not in ['user', 'assistant'] or "
    "(message.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('user and assistant take turns') }}{% endif %}"
    "<{{ message.role }}>{{ message.content }}{% endfor %}<assistant>"
)
"""Knows neither functions nor a system role, and insists on turns."""
