"""Schemas, expressions and grammars that are wrong, huge, endless or explode when compiled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from headrace import grammars

json_schema, regex, lark, choice = (
    grammars.json_schema,
    grammars.regex,
    grammars.lark,
    grammars.choice,
)


def _nested(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(levels):
        schema = {"type": "object", "properties": {"a": schema}, "required": ["a"]}
    return schema


def _doubling(levels: int) -> dict[str, Any]:
    """Each level refers to the next one twice."""
    defs: dict[str, Any] = {
        f"d{at}": {
            "type": "object",
            "properties": {name: {"$ref": f"#/$defs/d{at + 1}"} for name in "ab"},
            "required": ["a", "b"],
        }
        for at in range(levels)
    }
    return {"$defs": defs | {f"d{levels}": {"type": "null"}}, "$ref": "#/$defs/d0"}


def _anys(levels: int) -> dict[str, Any]:
    either = [
        {"anyOf": [{"properties": {f"p{at}": {"const": bit}}} for bit in (0, 1)]}
        for at in range(levels)
    ]
    return {"allOf": either}


def _many(count: int, **fields: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {f"p{at}": {"type": "string"} for at in range(count)},
        **fields,
    }


def _rules(count: int, last: str) -> str:
    return "\n".join(["start: r0", *(f"r{i}: r{i + 1} r{i + 1}" for i in range(count)), last])


def _terminals(count: int) -> str:
    names = [f"T{at}" for at in range(count)]
    expressions = [f"T{at}: /[a-z]*{at}[a-z ]{{{at % 17}}}.*/" for at in range(count)]
    return "\n".join([f"start: ({' | '.join(names)})+", *expressions])


_MAIL = r"^\w+([\.-]?\w+)*@\w+([\.-]?\w+)*(\.\w{2,})+$"

HOSTILE: dict[str, Callable[[], str]] = {
    "quantifiers within quantifiers": lambda: regex("(a{1,1000}){1,1000}"),
    "three levels of them": lambda: regex("((a{1,100}){1,100}){1,100}b"),
    "stars of stars": lambda: regex("((a*)*)*b"),
    "ambiguous alternatives": lambda: regex("(a|aa|aaa|aaaa)+c"),
    "an exponential automaton": lambda: regex("[ab]*a[ab]{24}"),
    "five of them": lambda: regex("(.*a.{20}){5}"),
    "a far away condition": lambda: regex(".*a.{1000}"),
    "a long repetition": lambda: regex("a{1000000}"),
    "a repeated repetition": lambda: regex("(x{10000}){10000}"),
    "large classes": lambda: regex(r"(\p{L}|\p{N}|\p{S}|\p{P}){1,500}"),
    "negated classes": lambda: regex(r"[^\p{L}]{1,200}\w{1,200}[\p{Han}\p{Greek}]{1,300}"),
    "many alternatives": lambda: regex("|".join(f"w{i * 7919 % 100_003}" for i in range(15_000))),
    "deep groups": lambda: regex("(" * 10_000 + "a" + ")" * 10_000),
    "unclosed groups": lambda: regex("(" * 10_000),
    "case folding": lambda: regex("(?i)" + "abcdefghij" * 3_000),
    "zero bytes": lambda: regex("\0{1,1000}"),
    "half a character": lambda: regex("\ud800"),
    "a backreference": lambda: regex(r"(a)\1"),
    "a look behind": lambda: regex(r"(?<!a)b"),
    "an invalid class": lambda: regex("a[z-a"),
    "a megabyte of expression": lambda: regex("a" * 1_000_000),
    "a huge enum": lambda: json_schema({"enum": [f"value {i}" for i in range(10_000)]}),
    "an enum of one long text": lambda: json_schema({"enum": ["x" * 200_000]}),
    "a megabyte of schema": lambda: json_schema({"enum": ["x" * 1_000_000]}),
    "10,000 levels": lambda: json_schema(_nested(10_000)),
    "40 levels": lambda: json_schema(_nested(40)),
    "doubling references": lambda: json_schema(_doubling(30)),
    "10 alternatives combined": lambda: json_schema(_anys(10)),
    "20 alternatives combined": lambda: json_schema(_anys(20)),
    "a reference to itself": lambda: json_schema({"$ref": "#"}),
    "a recursion without a base": lambda: json_schema(
        {"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]}
    ),
    "a reference to nowhere": lambda: json_schema({"$ref": "#/nowhere"}),
    "a reference to elsewhere": lambda: json_schema({"$ref": "file:///etc/passwd"}),
    "a million items": lambda: json_schema(
        {"type": "array", "items": {"type": "integer"}, "minItems": 1_000_000}
    ),
    "a thousand cubed": lambda: json_schema(
        {"type": "array", "maxItems": 1000, "items": {"type": "array", "maxItems": 1000}}
    ),
    "a million characters": lambda: json_schema(
        {"type": "string", "minLength": 100_000, "maxLength": 1_000_000}
    ),
    "a pattern of a length": lambda: json_schema(
        {"type": "string", "pattern": "^(ab*c|de+f)*$", "minLength": 5_000, "maxLength": 50_000}
    ),
    "mail by pattern and by format": lambda: json_schema(
        {"type": "string", "format": "email", "pattern": _MAIL, "maxLength": 5_000}
    ),
    "multiples of a large prime": lambda: json_schema({"type": "integer", "multipleOf": 9_999_991}),
    "a range of 600 digits": lambda: json_schema(
        {"type": "number", "minimum": 1e-300, "maximum": 1e300}
    ),
    "4,000 optional keys": lambda: json_schema(_many(4_000)),
    "2,000 keys and more": lambda: json_schema(_many(2_000, additionalProperties=True)),
    "overlapping key patterns": lambda: json_schema(
        {"type": "object", "patternProperties": {f"a{i}.*x{{1,50}}": {} for i in range(200)}}
    ),
    "patterns to tell apart": lambda: json_schema(
        {
            "anyOf": [
                {"type": "string", "pattern": f"[ab]*{c}.{{25}}{d}"} for c in "abcd" for d in "xyz"
            ]
        }
    ),
    "half a character in a key": lambda: json_schema({"properties": {"\udfff": {}}}),
    "an ambiguous grammar": lambda: lark('start: e\ne: e e | e e e | "a" | "b"'),
    "one that matches nothing in many ways": lambda: lark('start: s\ns: s s s | "a" |'),
    "one without a base": lambda: lark('start: start "a"'),
    "empty loops": lambda: lark('start: a b\na: b* | "x"?\nb: a* | start*'),
    "doubling rules": lambda: lark(_rules(60, 'r60: "a"?')),
    "doubling terminals": lambda: lark(_rules(40, 'r40: "ab"').upper().replace("START", "start")),
    "a terminal of itself": lambda: lark("start: A\nA: B\nB: A"),
    "repeated rules": lambda: lark('start: x{1,1000}\nx: y{1,1000}\ny: "a" | "b" start?'),
    "deep rules": lambda: lark("start: " + "(" * 10_000 + '"a"' + ")" * 10_000),
    "2,000 terminals": lambda: lark(_terminals(2_000)),
    "60 greedy terminals": lambda: lark(_terminals(60)),
    "an intersection": lambda: lark("start: A\nA: ~/.*a.{15}/ & /.*b.{15}/ & ~/.*c.{15}/"),
    "deep JSON in Lark": lambda: lark("start: %json " + '{"items":' * 300 + "{}" + "}" * 300),
    "a large substring automaton": lambda: lark(
        'start: %regex {"substring_chars": "' + "abcde" * 20_000 + '"}'
    ),
    "zero bytes in Lark": lambda: lark('start: "a\0b"\0'),
    "a file to import": lambda: lark("%import /etc/passwd\nstart: INT"),
    "no rules at all": lambda: lark(""),
    "long choices": lambda: choice(["a" * 100_000, "a" * 99_999 + "b"]),
}
