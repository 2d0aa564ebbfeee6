"""What a client may send, field by field, and what it is told when it sends something else.

Invariant: a field that OpenAI defines and that would change the output is either honoured or,
unless it has its neutral value, refused with `unsupported_parameter`; it is never silently ignored.
Fields that nobody defined are let through, as OpenAI's own clients send new ones at any time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from headrace.errors import CallerError
from headrace.types import Band

CHOICES_MAX = 8
STOPS_MAX = 4
STOP_CHARS_MAX = 256
STOP_TOKENS_MAX = 64
MESSAGES_MAX = 4_096
PARTS_MAX = 4_096
METADATA_MAX = 16
INT64_MIN, INT64_MAX = -(2**63), 2**63 - 1

STRICT = ConfigDict(extra="allow", strict=True, frozen=True)

ModelName = Annotated[str, StringConstraints(min_length=1, max_length=200)]
Stop = Annotated[str, StringConstraints(min_length=1, max_length=STOP_CHARS_MAX)]
ShortText = Annotated[str, StringConstraints(max_length=512)]
Metadata = Annotated[
    dict[Annotated[str, StringConstraints(max_length=64)], ShortText],
    Field(max_length=METADATA_MAX),
]
MaxTokens = Annotated[int, Field(ge=1, le=2**31 - 1)]
TokenId = Annotated[int, Field(ge=0, le=2**32 - 1)]
Tier = Literal["auto", "default", "flex", "priority", "fast", "scale", "ultrafast"]

_BANDS = {
    "flex": Band.BATCH,
    "priority": Band.INTERACTIVE,
    "fast": Band.INTERACTIVE,
    "ultrafast": Band.INTERACTIVE,
}
_TIERS = {Band.INTERACTIVE: "priority", Band.STANDARD: "default", Band.BATCH: "flex"}


def band_of(tier: Tier | None) -> Band:
    """The Band that a `service_tier` asks for; `scale`, which buys nothing here, is `default`."""
    return _BANDS.get(tier or "auto", Band.STANDARD)


def tier_of(band: Band) -> str:
    """The `service_tier` that a response states for the Band it was served in."""
    return _TIERS[band]


class Common(BaseModel):
    """What all three generation endpoints share."""

    model_config = STRICT

    model: ModelName
    stream: bool | None = None
    temperature: float | None = Field(None, ge=0, le=2, allow_inf_nan=False)
    top_p: float | None = Field(None, gt=0, le=1, allow_inf_nan=False)
    top_k: int | None = Field(None, ge=0, le=2**31 - 1)
    seed: int | None = Field(None, ge=INT64_MIN, le=INT64_MAX)
    service_tier: Tier | None = None
    user: ShortText | None = None
    metadata: Metadata | None = None
    store: bool | None = None
    ignore_eos: bool | None = None
    stop_token_ids: list[TokenId] | None = Field(None, max_length=STOP_TOKENS_MAX)


class StreamOptions(BaseModel):
    model_config = STRICT

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class Choices(Common):
    """What chat and completions share beyond that."""

    n: int | None = Field(None, ge=1, le=CHOICES_MAX)
    stop: Stop | Annotated[list[Stop], Field(max_length=STOPS_MAX)] | None = None
    max_tokens: MaxTokens | None = None
    stream_options: StreamOptions | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def wants_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)


class TextPart(BaseModel):
    model_config = STRICT

    type: Literal["text"]
    text: str


class Message(BaseModel):
    """One chat message. Extra fields (`name`, `tool_call_id`) reach the template as they are."""

    model_config = STRICT

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[TextPart], Field(min_length=1, max_length=PARTS_MAX)]
    name: ShortText | None = None
    tool_call_id: ShortText | None = None

    def for_template(self) -> dict[str, Any]:
        text = (
            self.content
            if isinstance(self.content, str)
            else "\n".join(part.text for part in self.content)
        )
        made = {"role": template_role(self.role), "content": text}
        if self.name is not None:
            made["name"] = self.name
        if self.tool_call_id is not None:
            made["tool_call_id"] = self.tool_call_id
        return made


def template_role(role: str) -> str:
    # `developer` is OpenAI's newer name for `system`; open models' templates know only the latter
    return "system" if role == "developer" else role


class ChatRequest(Choices):
    messages: Annotated[list[Message], Field(min_length=1, max_length=MESSAGES_MAX)]
    max_completion_tokens: MaxTokens | None = None

    @property
    def asked_tokens(self) -> tuple[int | None, str]:
        """The limit on the output and the field it came from; the newer name goes first."""
        if self.max_completion_tokens is not None:
            return self.max_completion_tokens, "max_completion_tokens"
        return self.max_tokens, "max_tokens"


class CompletionRequest(Choices):
    """`prompt`: a text, texts, token ids, or lists of token ids."""

    prompt: (
        str
        | Annotated[list[str], Field(min_length=1)]
        | Annotated[list[TokenId], Field(min_length=1)]
        | Annotated[list[Annotated[list[TokenId], Field(min_length=1)]], Field(min_length=1)]
    )

    @property
    def prompts(self) -> list[str | list[int]]:
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [[token for token in self.prompt if isinstance(token, int)]]
        return [item for item in self.prompt if not isinstance(item, int)]


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


def text_format(value: Any) -> bool:
    return value is None or (isinstance(value, dict) and value.get("type") == "text")


NEUTRAL_ANY: dict[str, Neutral] = {
    "tools": only([]),
    "tool_choice": only("none", "auto"),
    "top_logprobs": only(0),
    "moderation": only({}),
    "frequency_penalty": only(0, 0.0),
    "presence_penalty": only(0, 0.0),
    "repetition_penalty": only(1, 1.0),
    "length_penalty": only(1, 1.0),
    "min_p": only(0, 0.0),
    "min_tokens": only(0),
    "use_beam_search": only(False),
    "logit_bias": only({}),
    "reasoning_effort": only("none"),
    "verbosity": only("medium"),
    "background": only(False),
}

NEUTRAL_CHAT: dict[str, Neutral] = NEUTRAL_ANY | {
    "functions": only([]),
    "function_call": only("none", "auto"),
    "response_format": text_format,
    "logprobs": only(False),
    "modalities": only(["text"]),
    "audio": only(),
    "web_search_options": only(),
}

NEUTRAL_COMPLETION: dict[str, Neutral] = NEUTRAL_ANY | {
    "best_of": only(1),
    "echo": only(False),
    "suffix": only(""),
    "logprobs": only(),
    "response_format": text_format,
}


def refuse_unsupported(body: Mapping[str, Any], neutral: Mapping[str, Neutral]) -> None:
    """Raises CallerError (`unsupported_parameter`) for the first field that is not neutral."""
    for field, is_neutral in neutral.items():
        if field in body and not is_neutral(body[field]):
            raise CallerError(
                f"{field!r} is not supported here with this value: leave it out",
                param=field,
                code="unsupported_parameter",
            )


def refuse_tool_calls(body: Mapping[str, Any]) -> None:
    """Raises CallerError for an assistant message that calls tools: rendering would drop them."""
    messages = body.get("messages")
    if not isinstance(messages, list):
        return
    for at, message in enumerate(messages):
        for field in ("tool_calls", "function_call", "audio", "refusal"):
            if isinstance(message, dict) and message.get(field):
                raise CallerError(
                    f"'{field}' in a message is not supported",
                    param=f"messages[{at}].{field}",
                    code="unsupported_parameter",
                )


R = TypeVar("R", bound=BaseModel)


def validate(kind: type[R], body: Mapping[str, Any]) -> R:
    """`body` as a `kind`. Raises CallerError naming the field in `param`."""
    try:
        return kind.model_validate(dict(body))
    except ValidationError as error:
        raise _field_error(error, body) from error


def _field_error(error: ValidationError, body: Mapping[str, Any]) -> CallerError:
    """The problem deepest in the body: with alternatives (string or list) it is what was meant."""
    problems = [
        (_field_path(e["loc"], body, missing=e["type"] == "missing"), e["type"], e["msg"])
        for e in error.errors(include_url=False, include_context=False, include_input=False)
    ]
    path, kind, _ = max(problems, key=lambda problem: len(problem[0]))
    reasons = dict.fromkeys(message for where, _, message in problems if where == path)
    where = _spell(path)
    return CallerError(
        f"{where or 'body'}: {'; or '.join(reasons)}"[:1_000],
        param=where or None,
        code="missing_required_parameter" if kind == "missing" else "invalid_value",
    )


def _field_path(
    loc: tuple[int | str, ...], body: Mapping[str, Any], *, missing: bool
) -> tuple[int | str, ...]:
    """`loc` without the names of union members, which stand in no body."""
    path: list[int | str] = []
    here: Any = body
    for at, part in enumerate(loc):
        if isinstance(part, int) and isinstance(here, list) and part < len(here):
            here = here[part]
            path.append(part)
        elif isinstance(part, str) and isinstance(here, dict):
            if part in here:
                here = here[part]
                path.append(part)
            elif missing and at == len(loc) - 1:
                path.append(part)
    return tuple(path)


def _spell(path: tuple[int | str, ...]) -> str:
    spelled = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)
    return spelled.lstrip(".")[:200]
