"""How a request steers what becomes of its prompt in the cache: fields, breakpoints, positions.

OpenAI's `prompt_cache_options` and `prompt_cache_breakpoint`, and Anthropic's `cache_control`, mean
the same here, on a part, a message or a tool: the prompt up to there is worth keeping, for a time.
Of several
breakpoints the last one counts, for the longest time that any asks: blocks before it are kept with
it anyway. Invariant: a position is never behind the tokens that the prompt up to the breakpoint
makes, whatever the chat template does to the messages.
Rejected: rendering the messages up to the breakpoint alone, which templates may refuse (they may
want a user's message, or one after each answer).
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Protocol

from pydantic import AfterValidator, BaseModel

from headrace.types import CacheMode, pack_tokens
from headrace_gateway.api.validation import STRICT, bad_value
from headrace_gateway.tools.offer import NO_PARAMETERS, Function

BREAKPOINTS_MAX = 4
TTL_MS_MAX = 7 * 24 * 3_600_000
BREAKPOINT_TTL_MS = 30 * 60_000
"""OpenAI's, where a breakpoint or the options do not say."""
CONTROL_TTL_MS = 5 * 60_000
"""Anthropic's."""
OPTIONS_PARAM = "prompt_cache_options"

_TTL = re.compile(r"([1-9][0-9]{0,5})(s|m|h|d)")
_UNIT_MS = {"s": 1_000, "m": 60_000, "h": 3_600_000, "d": 86_400_000}
_MARK = "\ue0b7"
"""Stands in no template; where a text has it anyway, the position is a character off at most."""


def ttl_ms(text: str) -> int:
    """Milliseconds of `30m`, `12h` and the like. Raises ValueError."""
    match = _TTL.fullmatch(text)
    if match is None:
        raise ValueError("a time like 90s, 30m, 12h or 1d")
    found = int(match[1]) * _UNIT_MS[match[2]]
    if found > TTL_MS_MAX:
        raise ValueError(f"at most {TTL_MS_MAX // _UNIT_MS['d']}d")
    return found


def _check_ttl(text: str) -> str:
    ttl_ms(text)
    return text


Ttl = Annotated[str, AfterValidator(_check_ttl)]


class CacheOptions(BaseModel):
    """`mode` explicit: nothing but what breakpoints name is written into the cache service.

    `ttl`: how long it is kept at least. `prewarm`: compute and keep the prompt, generate nothing.
    """

    model_config = STRICT

    mode: Literal["implicit", "explicit"] | None = None
    ttl: Ttl | None = None
    prewarm: bool | None = None


class Breakpoint(BaseModel):
    model_config = STRICT

    ttl: Ttl | None = None


class CacheControl(BaseModel):
    model_config = STRICT

    type: Literal["ephemeral"]
    ttl: Ttl | None = None


class Marked(BaseModel):
    """What may end in a breakpoint."""

    model_config = STRICT

    prompt_cache_breakpoint: bool | Breakpoint | None = None
    cache_control: CacheControl | None = None

    def breakpoint_ttl_ms(self) -> int | None:
        """None for no breakpoint, 0 for one that does not say how long."""
        if self.cache_control is not None:
            ttl = self.cache_control.ttl
            return CONTROL_TTL_MS if ttl is None else ttl_ms(ttl)
        if isinstance(self.prompt_cache_breakpoint, Breakpoint):
            ttl = self.prompt_cache_breakpoint.ttl
            return 0 if ttl is None else ttl_ms(ttl)
        return 0 if self.prompt_cache_breakpoint else None


class MarkedPart(Marked):
    """A part of a message."""

    type: str
    text: str


TOOLS = -1


@dataclass(frozen=True, slots=True)
class Mark:
    """A breakpoint in a conversation: message number, characters of its content, and its TTL.

    Message TOOLS: behind the tool of number `offset`.
    """

    message: int
    offset: int
    ttl_ms: int


def marks_in(
    content: str | Sequence[MarkedPart] | None,
    message: int,
    param: str,
    earlier: int,
    whole: Marked | None = None,
) -> list[Mark]:
    """The breakpoints in one message's content, whose parts are joined by line breaks.

    `earlier` is how many came before it. `whole` is the message itself, which may be marked too.
    Raises CallerError when they are too many.
    """
    marks: list[Mark] = []
    offset = -1
    for at, part in enumerate(() if content is None or isinstance(content, str) else content):
        offset += 1 + len(part.text)
        found_ms = part.breakpoint_ttl_ms()
        if found_ms is not None:
            marks.append(Mark(message, offset, found_ms))
            _check_count(earlier + len(marks), f"{param}[{at}]")
    found_ms = None if whole is None else whole.breakpoint_ttl_ms()
    if found_ms is not None:
        marks.append(Mark(message, len(content or "") if offset < 0 else offset, found_ms))
        _check_count(earlier + len(marks), param)
    return marks


def tool_marks(tools: Sequence[Sequence[Marked]]) -> list[Mark]:
    """The breakpoints behind tools, each of which may be marked in several places.

    Raises CallerError when they are too many.
    """
    marks: list[Mark] = []
    for at, places in enumerate(tools):
        found = [ms for place in places if (ms := place.breakpoint_ttl_ms()) is not None]
        if found:
            marks.append(Mark(TOOLS, at, max(found)))
            _check_count(len(marks), f"tools[{at}]")
    return marks


def _check_count(count: int, param: str) -> None:
    if count > BREAKPOINTS_MAX:
        raise bad_value(param, f"at most {BREAKPOINTS_MAX} breakpoints a request")


@dataclass(frozen=True, slots=True)
class Caching:
    """What a request wants of the cache service.

    `marked_tokens` of its prompt stand before its last breakpoint, None where there is none.
    """

    mode: CacheMode = CacheMode.IMPLICIT
    ttl_ms: int = 0
    prewarm: bool = False
    marked_tokens: int | None = None

    def until_tokens(self, prompt_tokens: int) -> int:
        """Job.cache_until_tokens of a prompt."""
        if self.marked_tokens is not None:
            return self.marked_tokens
        kept = self.ttl_ms and self.mode is CacheMode.IMPLICIT
        return prompt_tokens if self.prewarm or kept else 0

    def attributes(self, prompt_tokens: int) -> dict[str, str | int | bool]:
        """For a turn's span; nothing where nothing was asked for."""
        if self == AS_USUAL:
            return {}
        return {
            "headrace.cache.mode": self.mode.value,
            "headrace.cache.ttl_ms": self.ttl_ms,
            "headrace.cache.until_tokens": self.until_tokens(prompt_tokens),
            "headrace.cache.prewarm": self.prewarm,
        }


AS_USUAL = Caching()


class Encoder(Protocol):
    """A turn, as far as positions need it."""

    def render(self, messages: list[dict[str, Any]], tools: Any) -> str: ...

    async def encode(self, text: str, *, add_bos: bool) -> array[int]: ...


def plain_caching(options: CacheOptions | None, *, prewarm: bool = False) -> Caching:
    """The Caching of a request without breakpoints."""
    if options is None and not prewarm:
        return AS_USUAL
    options = options or CacheOptions()
    return Caching(
        CacheMode(options.mode or "implicit"),
        ttl_ms(options.ttl) if options.ttl else 0,
        prewarm or bool(options.prewarm),
    )


async def marked_caching(
    turn: Encoder,
    wanted: Caching,
    marks: Sequence[Mark],
    messages: list[dict[str, Any]],
    tools: Any,
    prompt: array[int],
) -> Caching:
    """`wanted`, and up to the last of `marks` in `messages`, of which `prompt` was made."""
    if not marks:
        return wanted
    ends: list[int] = []
    text = turn.render(messages, tools)
    in_messages = [mark for mark in marks if mark.message != TOOLS]
    if in_messages:
        last = max(in_messages, key=lambda mark: (mark.message, mark.offset))
        ends.append(_shared(text, turn.render(_marked(messages, last), tools)))
    behind = [mark.offset for mark in marks if mark.message == TOOLS]
    if behind and tools is not None:
        ends.append(_end_of_tool(turn, text, messages, tools, max(behind)))
    if not ends:
        return wanted
    before = text[: max(ends)]
    tokens = await turn.encode(before, add_bos=False)
    return Caching(
        wanted.mode,
        max(mark.ttl_ms or wanted.ttl_ms or BREAKPOINT_TTL_MS for mark in marks),
        wanted.prewarm,
        _shared(pack_tokens(tokens), prompt),
    )


def _end_of_tool(
    turn: Encoder, text: str, messages: list[dict[str, Any]], tools: Any, number: int
) -> int:
    """Where in `text` the tool of that number has ended, whatever comes behind it.

    Templates write tools in their order, so the text is the same up to there with nothing behind
    it and with another tool; where one counts them first, less is the same.
    """
    functions = tools.offer.functions[: number + 1]
    other = Function(_MARK, _MARK, NO_PARAMETERS, strict=False, param="")
    return min(
        _shared(text, turn.render(messages, tools.offering(changed)))
        for changed in (functions, (*functions, other))
    )


def _marked(messages: list[dict[str, Any]], mark: Mark) -> list[dict[str, Any]]:
    """`messages` with a character more, where the breakpoint stands."""
    made, message = list(messages), dict(messages[mark.message])
    content = message["content"]
    message["content"] = content[: mark.offset] + _MARK + content[mark.offset :]
    made[mark.message] = message
    return made


def _shared(one: Any, other: Any) -> int:
    """How much of two texts, or arrays, is the same from their start on."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
