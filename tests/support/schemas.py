"""Random JSON schemas of the kinds that grammars enforce, and what checks values against them."""

from __future__ import annotations

import re
from collections.abc import Callable
from datetime import datetime
from random import Random
from typing import Any
from urllib.parse import urlsplit

from jsonschema import Draft202012Validator, FormatChecker

DEPTH_MAX = 4
WORDS = ("id", "name", "größe", "a b", "x/y", "~", 'quote"d', "back\\slash", "tab\t", "日本", "")
FORMATS = (
    "date", "time", "date-time", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri",
)  # fmt: skip
PATTERNS = (
    r"^[A-Z]{2}-\d{3}$", r"^(foo|ba[rz])+$", r"^\w{1,8}$", r"^[^\W\d_]{2,5}$", r"^\S+ \S+$",
    r"^\W{1,3}\D$", r"^.{3}$", r"^[a&&b[~]{1,4}$", r"a.c", r"^(?:x|y\.z)?$", r"^[\w.-]+@[\w-]+$",
    r"^\p{Lu}?[\x41-\x44]$", r"^é+$", r"^[^\s\d]{1,3}\s[^a-z]$", r"^\d{1,3}(?:,\d{3}){0,2}$",
)  # fmt: skip
UNPYTHONIC = {
    r"^\p{Lu}?[\x41-\x44]$": r"^[^\W\d_]?[\x41-\x44]$",
    r"^[a&&b[~]{1,4}$": r"^[ab\&\[~]{1,4}$",
}
"""Patterns as Python writes them, where it differs."""

Schema = dict[str, Any]


class Schemas:
    """Draws schemas that have finite values; `seed` replays them."""

    def __init__(self, seed: int) -> None:
        self._random = Random(seed)
        self._defs: dict[str, Schema] = {}

    def draw(self) -> Schema:
        """An object or an array, with `$defs` beside it where it refers to some."""
        self._defs = {}
        schema = self._random.choice([self._object, self._object, self._object, self._array])(0)
        if self._defs:
            schema["$defs"] = self._defs
        if self._random.random() < 0.3:
            schema |= {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "T"}
        return schema

    def _any(self, depth: int) -> Schema:
        leaves = [
            self._string, self._string, self._number, self._integer, self._constant,
            lambda _: {"type": self._random.choice(["boolean", "null"])}, self._nullable,
        ]  # fmt: skip
        nested = [
            self._object, self._array, self._any_of, self._one_of, self._all_of, self._reference,
        ]  # fmt: skip
        kinds: list[Callable[[int], Schema]] = leaves + (nested if depth < DEPTH_MAX else [])
        schema = self._random.choice(kinds)(depth)
        if self._random.random() < 0.2:
            schema["description"] = "says nothing about validity"
        return schema

    def _object(self, depth: int) -> Schema:
        names = self._random.sample(WORDS, self._random.randint(0, 4))
        properties = {name: self._any(depth + 1) for name in names}
        schema: Schema = {"type": "object", "properties": properties}
        style = self._random.random()
        if style < 0.5:
            schema |= {"required": names, "additionalProperties": False}
        elif style < 0.65:
            schema["required"] = [n for n in names if self._random.random() < 0.5]
        elif style < 0.75:
            schema["additionalProperties"] = self._any(depth + 1)
        elif style < 0.85:
            schema |= {"required": names, "minProperties": len(names) + 1}
            schema |= {"maxProperties": len(names) + 2, "additionalProperties": {"type": "integer"}}
        elif style < 0.95:
            schema = {"patternProperties": {"^k[0-9]+$": self._any(depth + 1)}, "type": "object"}
            schema |= {"additionalProperties": False, "maxProperties": 3}
        return schema

    def _array(self, depth: int) -> Schema:
        fewest = self._random.randint(0, 2)
        schema: Schema = {"type": "array", "items": self._any(depth + 1)}
        if self._random.random() < 0.7:
            schema |= {"minItems": fewest, "maxItems": fewest + self._random.randint(0, 2)}
        if self._random.random() < 0.2:
            schema["prefixItems"] = [self._any(depth + 1) for _ in range(2)]
            schema["items"] = self._random.choice([False, {"type": "integer"}])
            schema.pop("minItems", None)
            schema.pop("maxItems", None)
        return schema

    def _string(self, depth: int) -> Schema:
        style = self._random.random()
        if style < 0.25:
            return {"type": "string", "format": self._random.choice(FORMATS)}
        if style < 0.5:
            return {"type": "string", "pattern": self._random.choice(PATTERNS)}
        if style < 0.8:
            fewest = self._random.randint(0, 5)
            most = fewest + self._random.randint(0, 12)
            return {"type": "string", "minLength": fewest, "maxLength": most}
        return {"type": "string"}

    def _number(self, depth: int) -> Schema:
        low = round(self._random.uniform(-1_000, 1_000), self._random.randint(0, 3))
        high = low + round(self._random.uniform(0.5, 500), 2)
        edges = {"minimum": low, "maximum": high}
        if self._random.random() < 0.5:
            edges = {"exclusiveMinimum": low, "exclusiveMaximum": high}
        step = {"multipleOf": 0.25} if self._random.random() < 0.2 else {}
        return {"type": "number"} | self._random.choice([edges, edges, step, {"maximum": high}])

    def _integer(self, depth: int) -> Schema:
        low = self._random.randint(-(10 ** self._random.randint(1, 12)), 10**6)
        high = low + 10 ** self._random.randint(1, 6)
        edges: Schema = {"minimum": low, "maximum": high}
        if self._random.random() < 0.3:
            edges = {"exclusiveMinimum": low, "exclusiveMaximum": high}
        if self._random.random() < 0.3:
            edges["multipleOf"] = self._random.choice([2, 3, 5, 7])
        return {"type": "integer"} | self._random.choice([edges, edges, {}])

    def _value(self, depth: int) -> Any:
        simple = [
            None, True, False, 0, -7, 12.5, 2**53, 1e-3, "", "two words", 'a "quote"', "\n\\/",
            "😀 漢", "é",
        ]  # fmt: skip
        if depth < 2 and self._random.random() < 0.3:
            if self._random.random() < 0.5:
                return [self._value(depth + 1) for _ in range(self._random.randint(0, 2))]
            return {self._random.choice(WORDS): self._value(depth + 1)}
        return self._random.choice(simple)

    def _constant(self, depth: int) -> Schema:
        if self._random.random() < 0.4:
            return {"const": self._value(0)}
        return {"enum": [self._value(0) for _ in range(self._random.randint(1, 5))]}

    def _nullable(self, depth: int) -> Schema:
        kind = self._random.choice(["string", "integer", "number", "boolean"])
        return {"type": [kind, "null"]}

    def _any_of(self, depth: int) -> Schema:
        return {"anyOf": [self._any(depth + 1) for _ in range(self._random.randint(2, 3))]}

    def _one_of(self, depth: int) -> Schema:
        if self._random.random() < 0.5:
            return {"oneOf": [{"type": "integer"}, {"type": "boolean"}, {"type": "string"}]}
        shapes = []
        for kind in ("a", "b", "c"):
            properties = {"kind": {"const": kind}, "value": self._any(depth + 1)}
            shapes.append(
                {"type": "object", "properties": properties, "required": ["kind", "value"]}
            )
        return {"oneOf": shapes}

    def _all_of(self, depth: int) -> Schema:
        style = self._random.random()
        if style < 0.3:
            return {"allOf": [{"type": "integer", "minimum": 3}, {"multipleOf": 2}]}
        if style < 0.6:
            return {"type": "string", "maxLength": 9, "allOf": [{"pattern": "^[a-z]+$"}]}
        halves = [
            {"type": "object", "properties": {n: self._any(depth + 1)}, "required": [n]}
            for n in ("left", "right")
        ]
        return {"allOf": halves}

    def _reference(self, depth: int) -> Schema:
        name = self._random.choice(["leaf", "list", "tree", "a/b~c"])
        self._defs.setdefault(
            name,
            {
                "leaf": {"type": "string", "maxLength": 4},
                "list": {
                    "type": "object",
                    "properties": {
                        "head": {"type": "integer"},
                        "tail": {"anyOf": [{"$ref": "#/$defs/list"}, {"type": "null"}]},
                    },
                    "required": ["head", "tail"],
                    "additionalProperties": False,
                },
                "tree": {"type": "array", "items": {"$ref": "#/$defs/tree"}, "maxItems": 2},
                "a/b~c": {"enum": ["x", 1, None]},
            }[name],
        )
        return {"$ref": f"#/$defs/{name.replace('~', '~0').replace('/', '~1')}"}


checker = FormatChecker(formats=("date", "ipv4", "ipv6", "uuid", "email"))


@checker.checks("date-time", raises=ValueError)
def _is_date_time(text: object) -> bool:
    return not isinstance(text, str) or datetime.fromisoformat(text).tzinfo is not None


@checker.checks("time", raises=ValueError)
def _is_time(text: object) -> bool:
    return not isinstance(text, str) or _is_date_time(f"2024-02-29T{text}")


@checker.checks("hostname")
def _is_hostname(text: object) -> bool:
    return not isinstance(text, str) or (
        len(text) <= 253
        and all(re.fullmatch(r"(?!-)[A-Za-z0-9-]{1,63}(?<!-)", part) for part in text.split("."))
    )


@checker.checks("duration")
def _is_duration(text: object) -> bool:
    shape = r"P(?!$)(?:\d+W|(?:\d+Y)?(?:\d+M)?(?:\d+D)?(?:T(?!$)(?:\d+H)?(?:\d+M)?(?:\d+S)?)?)"
    return not isinstance(text, str) or re.fullmatch(shape, text) is not None


@checker.checks("uri", raises=ValueError)
def _is_uri(text: object) -> bool:
    return not isinstance(text, str) or (
        bool(urlsplit(text).scheme) and re.fullmatch(r"[!-~]+", text) is not None
    )


def _pythonic(schema: Any) -> Any:
    if isinstance(schema, list):
        return [_pythonic(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        key: UNPYTHONIC.get(each, each) if key == "pattern" else _pythonic(each)
        for key, each in schema.items()
    }


def errors(schema: Schema, value: Any) -> list[str]:
    """What is wrong with `value` under `schema`, by Draft 2020-12 with formats."""
    validator = Draft202012Validator(_pythonic(schema), format_checker=checker)
    return [error.message for error in validator.iter_errors(value)]
