"""What is refused by name, and the values at which it is not.

Invariant: a field that OpenAI or the open servers define and that would change the output is either
honoured or, unless it has its neutral value, refused with `unsupported_parameter`; it is never
silently ignored. Fields that nobody defined are let through, as clients send new ones at any time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from headrace.errors import CallerError

Neutral = Callable[[Any], bool]


def only(*values: Any) -> Neutral:
    """Neutral is null or one of `values`; `False` is not taken for 0, nor 1 for True."""
    return lambda value: (
        value is None
        or any(
            value == known and isinstance(value, bool) == isinstance(known, bool)
            for known in values
        )
    )


def _text_format(value: Any) -> bool:
    return value is None or (isinstance(value, dict) and value.get("type") == "text")


def _empty_options(value: Any) -> bool:
    return value is None or (
        isinstance(value, dict) and all(item in (None, "none") for item in value.values())
    )


_NEUTRAL_ANY: dict[str, Neutral] = {
    "functions": only([]),
    "function_call": only("none", "auto"),
    "moderation": only({}),
    "reasoning_effort": only("none"),
    "verbosity": only("medium"),
    "background": only(False),
    "use_beam_search": only(False),
    "length_penalty": only(1, 1.0),
    "early_stopping": only(False),
    "allowed_token_ids": only([]),
    "logits_processors": only([]),
    "truncate_prompt_tokens": only(),
    "skip_special_tokens": only(True),
    "return_tokens_as_token_ids": only(False),
    "guided_whitespace_pattern": only(),
    "structural_tag": only(),
}

NEUTRAL_CHAT: dict[str, Neutral] = _NEUTRAL_ANY | {
    "modalities": only(["text"]),
    "audio": only(),
    "web_search_options": only(),
    "echo": only(False),
    "best_of": only(1),
    "suffix": only(""),
}

NEUTRAL_COMPLETION: dict[str, Neutral] = _NEUTRAL_ANY | {
    "tools": only([]),
    "tool_choice": only("none", "auto"),
    "suffix": only(""),
    "top_logprobs": only(0),
}

NEUTRAL_RESPONSE: dict[str, Neutral] = _NEUTRAL_ANY | {
    "reasoning": _empty_options,
    "truncation": only("disabled"),
    "conversation": only(),
    "prompt": only(),
    "context_management": only([]),
    "n": only(1),
    "best_of": only(1),
    "max_tokens": only(),
    "max_completion_tokens": only(),
    "echo": only(False),
    "suffix": only(""),
    "logprobs": only(False),
    "prompt_logprobs": only(),
    "response_format": _text_format,
}


_INSTEAD = {"functions": "use 'tools'", "function_call": "use 'tool_choice'"}


def refuse_unsupported(body: Mapping[str, Any], neutral: Mapping[str, Neutral]) -> None:
    """Raises CallerError (`unsupported_parameter`) for the first field that is not neutral."""
    for field, is_neutral in neutral.items():
        if field in body and not is_neutral(body[field]):
            raise CallerError(
                f"{field!r} is not supported here with this value: "
                f"{_INSTEAD.get(field, 'leave it out')}",
                param=field,
                code="unsupported_parameter",
            )


def refuse_in_messages(body: Mapping[str, Any]) -> None:
    """Raises CallerError for a field of a message that rendering would drop."""
    messages = body.get("messages")
    if not isinstance(messages, list):
        return
    for at, message in enumerate(messages):
        for field in ("function_call", "audio", "refusal"):
            if isinstance(message, dict) and message.get(field):
                raise CallerError(
                    f"'{field}' in a message is not supported",
                    param=f"messages[{at}].{field}",
                    code="unsupported_parameter",
                )


ITEMS = ("message", "function_call", "function_call_output")


def refuse_other_items(body: Mapping[str, Any]) -> None:
    """Raises CallerError for the first item of `input` that is of another type than ITEMS."""
    items = body.get("input")
    for at, item in enumerate(items if isinstance(items, list) else ()):
        kind = item.get("type") if isinstance(item, dict) else None
        if isinstance(kind, str) and kind not in ITEMS:
            raise CallerError(
                f"input[{at}].type: {kind[:100]!r} is not supported here, only {ITEMS} are",
                param=f"input[{at}].type",
                code="unsupported_parameter",
            )
