"""What a client may send to chat and completions, field by field.

Invariant: whatever passes here and `unsupported.py` is honoured. Fields that the two endpoints
share with the Responses API stand in `Common`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, Field, StringConstraints

from headrace.policy.priority import LEVELS_MAX
from headrace.types import LOGPROBS_MAX, NO_LOGPROBS, Band
from headrace_gateway.api.caching import CacheOptions, Caching, Mark, plain_caching, tool_marks
from headrace_gateway.api.deadlines import DeadlineField
from headrace_gateway.api.formats import Format, FormatFields, ResponseFormat
from headrace_gateway.api.messages import Message, ShortText, chat_conversation
from headrace_gateway.api.sampling_fields import INT32_MAX, SamplingFields, TokenId
from headrace_gateway.api.tool_schemas import (
    ChatToolChoice,
    ChatTools,
    Mode,
    make_offer,
    refuse_other_tools,
)
from headrace_gateway.api.unsupported import (
    NEUTRAL_CHAT,
    NEUTRAL_COMPLETION,
    refuse_in_messages,
    refuse_unsupported,
)
from headrace_gateway.api.validation import STRICT, bad_value, validate
from headrace_gateway.tools.offer import Offer

CHOICES_MAX = 8
BEST_OF_MAX = 20
MESSAGES_MAX = 4_096
METADATA_MAX = 16
COMPLETION_TOKENS = 16
"""OpenAI's default `max_tokens` of the completions endpoint; chat defaults to what fits."""

ModelName = Annotated[str, StringConstraints(min_length=1, max_length=200)]
Metadata = Annotated[
    dict[Annotated[str, StringConstraints(max_length=64)], ShortText],
    Field(max_length=METADATA_MAX),
]
MaxTokens = Annotated[int, Field(ge=1, le=INT32_MAX)]
Alternatives = Annotated[int, Field(ge=0, le=LOGPROBS_MAX)]
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


class Common(SamplingFields, FormatFields):
    """What all three generation endpoints share, and how each says what it wants generated."""

    prompt_param: ClassVar[str]
    default_tokens: ClassVar[int | None] = None
    """Output tokens where no limit is asked for; None means as many as fit."""

    model: ModelName
    stream: bool | None = None
    service_tier: Tier | None = None
    priority: int | None = Field(None, ge=-LEVELS_MAX, le=LEVELS_MAX)
    deadline_ms: DeadlineField | None = None
    prompt_cache_key: ShortText | None = None
    prompt_cache_options: CacheOptions | None = None
    user: ShortText | None = None
    metadata: Metadata | None = None
    store: bool | None = None

    @property
    def caching(self) -> Caching:
        """What becomes of the prompt in the cache, but for breakpoints in it."""
        return plain_caching(self.prompt_cache_options)

    @property
    def asked_tokens(self) -> tuple[int | None, str]:
        """The limit on the output and the field it came from."""
        raise AssertionError("each endpoint has a field of its own")

    @property
    def jobs_a_prompt(self) -> tuple[int, str]:
        """How many generations each prompt gets and the field that says so."""
        return 1, "n"

    @property
    def alternatives(self) -> int:
        """Sampling.logprobs: how many most probable tokens to report beside each output token."""
        return NO_LOGPROBS

    @property
    def prompt_alternatives(self) -> tuple[int, str]:
        """Sampling.prompt_logprobs, the same for the prompt's tokens, and the field it is from."""
        return NO_LOGPROBS, "prompt_logprobs"


class StreamOptions(BaseModel):
    model_config = STRICT

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class Choices(Common):
    """What chat and completions share beyond that."""

    n: int | None = Field(None, ge=1, le=CHOICES_MAX)
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    prompt_logprobs: Alternatives | None = None

    @property
    def wants_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def jobs_a_prompt(self) -> tuple[int, str]:
        return self.n or 1, "n"

    @property
    def prompt_alternatives(self) -> tuple[int, str]:
        asked = NO_LOGPROBS if self.prompt_logprobs is None else self.prompt_logprobs
        return asked, "prompt_logprobs"

    def openai_format(self) -> Format | None:
        wanted = self.response_format
        return None if wanted is None else wanted.format("response_format")

    def check_together(self) -> None:
        """What no field can say alone. Raises CallerError."""
        if self.stream and self.prompt_logprobs is not None:
            raise bad_value("prompt_logprobs", "not available in streams")


class ChatRequest(Choices):
    prompt_param = "messages"

    messages: Annotated[list[Message], Field(min_length=1, max_length=MESSAGES_MAX)]
    tools: ChatTools | None = None
    tool_choice: Mode | ChatToolChoice | None = None
    parallel_tool_calls: bool | None = None
    max_tokens: MaxTokens | None = None
    max_completion_tokens: MaxTokens | None = None
    logprobs: bool | None = None
    top_logprobs: Alternatives | None = None

    @property
    def asked_tokens(self) -> tuple[int | None, str]:
        # the newer name goes first
        if self.max_completion_tokens is not None:
            return self.max_completion_tokens, "max_completion_tokens"
        return self.max_tokens, "max_tokens"

    @property
    def alternatives(self) -> int:
        return (self.top_logprobs or 0) if self.logprobs else NO_LOGPROBS

    def offer(self) -> Offer | None:
        """The functions that may be called. Raises CallerError."""
        functions = [
            tool.function.function(f"tools[{at}].function")
            for at, tool in enumerate(self.tools or ())
        ]
        choice = self.tool_choice
        named = choice.function if isinstance(choice, ChatToolChoice) else choice
        return make_offer(functions, named, parallel=self.parallel_tool_calls is not False)

    def conversation(self) -> tuple[list[dict[str, Any]], list[Mark]]:
        """The messages in transformers' form, and their breakpoints. Raises CallerError."""
        tools = tool_marks([(tool, tool.function) for tool in self.tools or ()])
        made, marks = chat_conversation(self.messages, len(tools))
        return made, tools + marks

    def check_together(self) -> None:
        super().check_together()
        if self.top_logprobs and not self.logprobs:
            raise bad_value("top_logprobs", "needs 'logprobs': true")


class CompletionRequest(Choices):
    """`prompt`: a text, texts, token ids, or lists of token ids."""

    prompt_param = "prompt"
    default_tokens = COMPLETION_TOKENS

    prompt: (
        str
        | Annotated[list[str], Field(min_length=1)]
        | Annotated[list[TokenId], Field(min_length=1)]
        | Annotated[list[Annotated[list[TokenId], Field(min_length=1)]], Field(min_length=1)]
    )
    max_tokens: Annotated[int, Field(ge=0, le=INT32_MAX)] | None = None
    best_of: int | None = Field(None, ge=1, le=BEST_OF_MAX)
    echo: bool | None = None
    logprobs: Alternatives | None = None

    @property
    def prompts(self) -> list[str | list[int]]:
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [[token for token in self.prompt if isinstance(token, int)]]
        return [item for item in self.prompt if not isinstance(item, int)]

    @property
    def asked_tokens(self) -> tuple[int | None, str]:
        return self.max_tokens, "max_tokens"

    @property
    def jobs_a_prompt(self) -> tuple[int, str]:
        return super().jobs_a_prompt if self.best_of is None else (self.best_of, "best_of")

    @property
    def chooses(self) -> bool:
        """Whether fewer choices are told than are generated."""
        return self.best_of is not None and self.best_of > (self.n or 1)

    @property
    def alternatives(self) -> int:
        if self.logprobs is not None:
            return self.logprobs
        return 0 if self.chooses else NO_LOGPROBS

    @property
    def prompt_alternatives(self) -> tuple[int, str]:
        asked, param = super().prompt_alternatives
        if self.echo and self.logprobs is not None and self.logprobs > asked:
            asked, param = self.logprobs, "logprobs"
        # an engine that shall say nothing at all still has something to do: the prompt's logprobs
        return (max(asked, 0) if self.max_tokens == 0 else asked), param

    def check_together(self) -> None:
        super().check_together()
        if self.best_of is not None and self.best_of < (self.n or 1):
            raise bad_value("best_of", f"must not be less than n={self.n}")
        if self.chooses and self.stream:
            raise bad_value("best_of", "the best of several cannot be streamed: leave out 'stream'")
        if self.max_tokens == 0 and not self.echo and self.prompt_logprobs is None:
            raise bad_value("max_tokens", "0 needs 'echo': true or 'prompt_logprobs'")


def parse_chat(body: Mapping[str, Any]) -> ChatRequest:
    """`body` as a ChatRequest. Raises CallerError naming the field."""
    refuse_unsupported(body, NEUTRAL_CHAT)
    refuse_other_tools(body)
    refuse_in_messages(body)
    parsed = validate(ChatRequest, body)
    parsed.check_together()
    return parsed


def parse_completion(body: Mapping[str, Any]) -> CompletionRequest:
    """`body` as a CompletionRequest. Raises CallerError naming the field."""
    refuse_unsupported(body, NEUTRAL_COMPLETION)
    parsed = validate(CompletionRequest, body)
    parsed.check_together()
    return parsed
