"""Chat templates: what they may do, what they may not, and who is told when they refuse."""

from __future__ import annotations

import pytest

from headrace.clock import ManualClock
from headrace.errors import CallerError
from headrace_gateway.templates import ChatTemplates
from support.api import CHATML, make_record

USER = [{"role": "user", "content": "Hi"}]


def render(template: str, messages: list[dict[str, str]] = USER, **options: int) -> str:
    return ChatTemplates(ManualClock(), **options).render(
        make_record(chat_template=template), messages
    )


def test_chatml_ends_where_the_assistant_begins() -> None:
    assert render(CHATML) == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


def test_blocks_are_trimmed_and_loop_controls_work() -> None:
    template = "{% for m in messages %}\n    {% break %}\n{% endfor %}\n{{ bos_token }}x"
    assert render(template) == "<|endoftext|>x"


def test_tojson_keeps_text_as_it_is_and_the_generation_tag_means_nothing() -> None:
    template = "{{ {'a': '<é>'} | tojson }}{% generation %}b{% endgeneration %}"
    assert render(template) == '{"a": "<é>"}b'


def test_strftime_now_reads_the_gateways_clock() -> None:
    assert render("{{ strftime_now('%Y') }}") == "2023"


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[7].content.x }}", "no element 7"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{% for i in range(10**9) %}{% endfor %}", "Range too big"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{% endif %}", "cannot be read"),
        ("", "no chat template"),
    ],
)
def test_a_template_that_fails_is_a_400_that_says_why(template: str, said: str) -> None:
    with pytest.raises(CallerError, match=said) as caught:
        render(template)
    assert caught.value.status == 400


def test_output_is_bounded_while_it_is_made() -> None:
    template = "{% for i in range(90000) %}{{ i }} {% endfor %}"
    with pytest.raises(CallerError, match="exceeds 1000 characters"):
        render(template, chars_max=1_000)


def test_a_template_is_compiled_once_for_each_model() -> None:
    templates = ChatTemplates(ManualClock())
    record = make_record()
    assert templates._template(record) is templates._template(record)
