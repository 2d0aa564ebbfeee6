"""The items of a response's output: a message, or a call. Each says the events of its life.

Invariant: an item is opened once and closed once; what it has said joined is what it holds when it
is closed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from headrace_gateway.api.tool_replies import new_call_id

Json = dict[str, Any]


class Item(ABC):
    """`at` is its place in the output."""

    def __init__(self, item_id: str, at: int) -> None:
        self._id = item_id
        self._at = at

    def opening(self) -> list[Json]:
        return [self._item_event("added", self.told("in_progress"))]

    def closing(self, status: str) -> list[Json]:
        """`status`: completed or incomplete."""
        return [*self._closing(), self._item_event("done", self.told(status))]

    @abstractmethod
    def told(self, status: str) -> Json:
        """The item as it stands in an output."""

    @abstractmethod
    def _closing(self) -> list[Json]: ...

    def _item_event(self, what: str, item: Json) -> Json:
        return {"type": f"response.output_item.{what}", "output_index": self._at, "item": item}

    def _place(self) -> Json:
        return {"item_id": self._id, "output_index": self._at}


class MessageItem(Item):
    """Text of the assistant, in one part."""

    def __init__(self, suffix: str, at: int) -> None:
        super().__init__(f"msg_{suffix}", at)
        self._text: list[str] = []
        self._logprobs: list[Json] = []
        self._opened = False

    def opening(self) -> list[Json]:
        made = super().opening()
        self._opened = True
        return [*made, self._part_event("content_part.added", part=self._part())]

    def delta(self, text: str, logprobs: list[Json]) -> Json:
        self.add(text)
        self._logprobs += logprobs
        return self.delta_event(text, logprobs)

    def add(self, text: str) -> None:
        """Take `text`, of which the caller tells."""
        self._text.append(text)

    def delta_event(self, text: str, logprobs: list[Json]) -> Json:
        return self._part_event("output_text.delta", delta=text, logprobs=logprobs)

    def told(self, status: str) -> Json:
        return {
            "id": self._id,
            "type": "message",
            "role": "assistant",
            "status": status,
            "content": [self._part()] if self._opened else [],
        }

    def _closing(self) -> list[Json]:
        text = "".join(self._text)
        return [
            self._part_event("output_text.done", text=text, logprobs=self._logprobs),
            self._part_event("content_part.done", part=self._part()),
        ]

    def _part_event(self, what: str, **fields: Any) -> Json:
        return {"type": f"response.{what}", **self._place(), "content_index": 0, **fields}

    def _part(self) -> Json:
        return {
            "type": "output_text",
            "text": "".join(self._text),
            "annotations": [],
            "logprobs": list(self._logprobs),
        }


class CallItem(Item):
    """A call of the function `name`."""

    def __init__(self, suffix: str, at: int, name: str) -> None:
        super().__init__(f"fc_{suffix}", at)
        self._name = name
        self._call_id = new_call_id()
        self._arguments: list[str] = []

    def delta(self, arguments: str) -> Json:
        self._arguments.append(arguments)
        return self._arguments_event("delta", delta=arguments)

    def told(self, status: str) -> Json:
        return {
            "id": self._id,
            "type": "function_call",
            "status": status,
            "call_id": self._call_id,
            "name": self._name,
            "arguments": "".join(self._arguments),
        }

    def _closing(self) -> list[Json]:
        return [self._arguments_event("done", arguments="".join(self._arguments))]

    def _arguments_event(self, what: str, **fields: Any) -> Json:
        return {
            "type": f"response.function_call_arguments.{what}",
            **self._place(),
            **fields,
        }
