"""JSON schemas as callers send them, made into ones that the grammar compiler enforces entirely.

Invariant: whatever matches the result is valid under the caller's schema (JSON Schema 2020-12),
`format` and `pattern` included. A keyword either is enforced, or says nothing about validity and is
dropped, or is refused by name and place: llguidance on its own passes over keywords that it does
not know. Where readers disagree (leap seconds, keys that come twice, integers beyond 2^53), the
narrower reading is taken or the schema refused.

Objects that list `properties` and say nothing about others take no others, unless the schema
combines schemas (`allOf`, a `oneOf` that leaves doubt, a reference or alternatives beside other
keywords): a small model given the freedom invents keys until its tokens are used up, and the
narrower text is as valid.

Rejected: llguidance's lenient mode (it drops what it cannot enforce), and validating finished
outputs (too late: the client has seen them).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from decimal import ROUND_CEILING, ROUND_FLOOR, Context
from urllib.parse import unquote

from headrace.errors import CallerError
from headrace.grammar_facts import TYPES, Json, Schema, all_apart, has_finite_values
from headrace.grammar_patterns import FORMAT_PATTERNS, FORMATS, portable_pattern

SCHEMA_BYTES_MAX = 256 * 1024
"""As JSON text, annotations included."""
SCHEMA_DEPTH_MAX = 48
"""Levels of schemas or values within another: the compiler's JSON reader stops at 128 brackets."""
EXACT_INTEGER_MAX = 2**53
"""Beyond it the compiler, and most JSON readers, round integers."""
EXACT_DIGITS = 15
"""Decimals of so many digits are different numbers (IEEE 754); longer ones the compiler rounds."""
COUNT_MAX = 1_000_000

_ANNOTATIONS = frozenset(
    {
        "title", "description", "default", "examples", "example", "deprecated", "readOnly",
        "writeOnly", "$comment", "$schema", "contentMediaType", "contentEncoding",
        "contentSchema", "discriminator",
    }
)  # fmt: skip
_HINTS = {
    "nullable": "write type: [..., 'null']",
    "additionalItems": "write prefixItems and items",
    "not": "list what is allowed with enum or anyOf",
    "uniqueItems": "leave it out and check the answer",
    "$anchor": "refer with '#/$defs/name'",
    "$dynamicRef": "use $ref",
    "$id": "only the outermost schema may have one",
    "dependentRequired": "use anyOf",
    "dependentSchemas": "use anyOf",
    "if": "use anyOf",
}
_NAMED_ESCAPES = frozenset("\b\f\n\r\t")
_COMBINING = frozenset({"$ref", "anyOf", "oneOf"})
_NUMBER_FORMATS: dict[str, tuple[int, int] | None] = {
    **{f"int{bits}": (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) for bits in (8, 16, 32)},
    **{f"uint{bits}": (0, 2**bits - 1) for bits in (8, 16, 32)},
    "int64": (-EXACT_INTEGER_MAX, EXACT_INTEGER_MAX),
    "uint64": (0, EXACT_INTEGER_MAX),
    "float": None,
    "double": None,
}
"""OpenAPI's formats of numbers, as bounds."""


def invalid(message: str) -> CallerError:
    """The text of a grammar is wrong; `message` says what and where."""
    return CallerError(message, code="invalid_grammar")


def too_complex(message: str) -> CallerError:
    """The text may be right, but takes too much to enforce."""
    return CallerError(message, code="grammar_too_complex")


def checked_schema(schema: Json) -> dict[str, Json]:
    """`schema` as the compiler may have it: annotations gone, formats and patterns spelled out.

    Checking what this returns changes nothing. Raises CallerError: `invalid_grammar` for the first
    place that is wrong, cannot be enforced or has no finite value, `grammar_too_complex` for size.
    """
    _check_size(schema)
    if not isinstance(schema, Mapping):
        if schema is True:
            return {}
        raise invalid(f"schema: expected an object, got {_kind(schema)}")
    reader = _Reader()
    checked = reader.schema(schema, "#", 0)
    assert isinstance(checked, dict), "an object stays an object"
    reader.check_references()
    reader.settle_alternatives()
    if not has_finite_values(checked, reader.places):
        raise invalid("schema: no finite value is valid under it; a recursion needs a way out")
    if not reader.combines:
        reader.close_objects()
    return checked


def _check_size(schema: Json) -> None:
    try:
        size_bytes = len(json.dumps(schema))
    except RecursionError as error:
        raise invalid(f"schema: more than {SCHEMA_DEPTH_MAX} levels deep") from error
    except (TypeError, ValueError) as error:
        raise invalid(f"schema: it is not JSON: {error}") from error
    if size_bytes > SCHEMA_BYTES_MAX:
        raise too_complex(f"schema: {size_bytes} bytes; at most {SCHEMA_BYTES_MAX} are allowed")


def _kind(value: Json) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean"}
    return "null" if value is None else names.get(type(value), "a number")


def _step(place: str, key: str | int) -> str:
    """JSON pointer (RFC 6901) of `key` in `place`."""
    return f"{place}/{str(key).replace('~', '~0').replace('/', '~1')}"


class _Reader:
    """Walks a schema once. `places`: every schema within it by JSON pointer, as rewritten."""

    def __init__(self) -> None:
        self.places: dict[str, Schema] = {}
        self.references: list[tuple[str, str]] = []
        self.combines = False

    def schema(self, value: Json, place: str, depth: int) -> Schema:
        if isinstance(value, bool):
            self.places[place] = value
            return value
        if not isinstance(value, Mapping):
            raise invalid(f"schema at {place}: expected an object or a boolean, got {_kind(value)}")
        if depth > SCHEMA_DEPTH_MAX:
            raise invalid(f"schema at {place}: more than {SCHEMA_DEPTH_MAX} levels deep")
        checked: dict[str, Json] = {}
        self.places[place] = checked
        for keyword, argument in value.items():
            if self._says_nothing(keyword, argument, place):
                continue
            checked[keyword] = self._argument(keyword, argument, place, depth + 1)
        self._settle(checked, place)
        return checked

    def _argument(self, keyword: str, argument: Json, place: str, depth: int) -> Json:
        nested, leaf = _NESTED.get(keyword), _LEAVES.get(keyword)
        if nested is not None:
            return nested(self, argument, _step(place, keyword), depth)
        if leaf is None:
            hint = _HINTS.get(keyword)
            advice = f" ({hint})" if hint else ""
            raise invalid(f"schema at {place}: {keyword!r} is not supported{advice}")
        checked = leaf(argument, _step(place, keyword))
        if keyword == "$ref":
            self.references.append((place, checked))
        return checked

    def _says_nothing(self, keyword: Json, argument: Json, place: str) -> bool:
        if not isinstance(keyword, str):
            raise invalid(f"schema at {place}: keywords are strings")
        return (
            keyword in _ANNOTATIONS
            or keyword.startswith("x-")
            or (keyword in ("$id", "id") and place == "#")
            or (keyword in ("uniqueItems", "nullable") and argument is False)
        )

    def _settle(self, checked: dict[str, Json], place: str) -> None:
        """What depends on several keywords of one schema."""
        constraints = checked.keys() - {"$defs", "definitions"}
        if "allOf" in checked or (constraints & _COMBINING and len(constraints) > 1):
            self.combines = True
        fewest = checked.get("minProperties", 0) - len(set(checked.get("required", ())))
        if fewest > 1:
            raise invalid(
                f"schema at {place}: minProperties beyond the required ones is not supported: "
                "a key that comes twice would count twice"
            )
        if checked.keys() & {"exclusiveMinimum", "exclusiveMaximum"}:
            _keep_clear_of_bounds(checked)
        name = checked.pop("format", None)
        if name is not None:
            self._spell_format(checked, name, place)

    def _spell_format(self, checked: dict[str, Json], name: str, place: str) -> None:
        types = checked.get("type", [])
        numeric = {types} if isinstance(types, str) else set(types)
        if name in _NUMBER_FORMATS and numeric and numeric <= {"integer", "number", "null"}:
            bounds = _NUMBER_FORMATS[name]
            if bounds is not None:
                checked["minimum"] = max(bounds[0], checked.get("minimum", bounds[0]))
                checked["maximum"] = min(bounds[1], checked.get("maximum", bounds[1]))
        elif name not in FORMATS:
            supported = ", ".join(sorted(FORMATS))
            raise invalid(
                f"schema at {place}: format {name!r} is not supported; supported: {supported}"
            )
        elif name not in FORMAT_PATTERNS:
            checked["format"] = name
        elif "pattern" not in checked:
            checked["pattern"] = FORMAT_PATTERNS[name]
        else:
            checked.setdefault("allOf", []).append({"pattern": FORMAT_PATTERNS[name]})
            self.combines = True

    def schemas(self, value: Json, place: str, depth: int) -> list[Schema]:
        if not isinstance(value, list) or not value:
            raise invalid(f"schema at {place}: expected a list of schemas that is not empty")
        return [self.schema(each, _step(place, at), depth) for at, each in enumerate(value)]

    def named(self, value: Json, place: str, depth: int) -> dict[str, Schema]:
        if not isinstance(value, Mapping):
            raise invalid(f"schema at {place}: expected an object, got {_kind(value)}")
        return {
            _text(name, place): self.schema(each, _step(place, name), depth)
            for name, each in value.items()
        }

    def by_pattern(self, value: Json, place: str, depth: int) -> dict[str, Schema]:
        named = self.named(value, place, depth)
        return {portable_pattern(pattern): each for pattern, each in named.items()}

    def items(self, value: Json, place: str, depth: int) -> Schema:
        if isinstance(value, list):
            raise invalid(f"schema at {place}: a list of schemas is written prefixItems")
        return self.schema(value, place, depth)

    def check_references(self) -> None:
        for place, target in self.references:
            if unquote(target) not in self.places:
                raise invalid(f"schema at {place}: there is no schema at {_shown(target)}")

    def settle_alternatives(self) -> None:
        """`oneOf` becomes `anyOf` where no value is valid under two of its schemas.

        The compiler sees that only where no reference is in the way. What remains is for it to
        judge as it stands: a closed object is apart from others that the caller's was not.
        """
        for schema in self.places.values():
            if isinstance(schema, dict) and "oneOf" in schema:
                if "anyOf" not in schema and all_apart(schema["oneOf"], self.places):
                    schema["anyOf"] = schema.pop("oneOf")
                else:
                    self.combines = True

    def close_objects(self) -> None:
        """No keys beyond the listed ones where nothing says so."""
        for schema in self.places.values():
            if (
                isinstance(schema, dict)
                and "properties" in schema
                and not schema.keys() & {"additionalProperties", "patternProperties"}
                and set(schema.get("required", ())) <= schema["properties"].keys()
                and schema.get("minProperties", 0) <= len(schema.get("required", ()))
            ):
                schema["additionalProperties"] = False
                schema.setdefault("type", "object")


def _shown(value: Json) -> str:
    shown = repr(value)
    return shown if len(shown) <= 100 else f"{shown[:100]}…"


def _text(value: Json, place: str) -> str:
    if not isinstance(value, str):
        raise invalid(f"schema at {place}: expected a string, got {_kind(value)}")
    return value


def _types(value: Json, place: str) -> Json:
    names = value if isinstance(value, list) else [value]
    if not names or not all(isinstance(name, str) and name in TYPES for name in names):
        raise invalid(
            f"schema at {place}: {_shown(value)} is not one of {', '.join(sorted(TYPES))}"
        )
    return value if isinstance(value, str) else sorted(set(names), key=names.index)


def _count(value: Json, place: str) -> int:
    whole = isinstance(value, int | float) and not isinstance(value, bool) and value % 1 == 0
    if not whole or not 0 <= value <= COUNT_MAX:
        raise invalid(f"schema at {place}: expected a count up to {COUNT_MAX}, got {_shown(value)}")
    return int(value)


def _number(value: Json, place: str) -> int | float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise invalid(f"schema at {place}: expected a number, got {_kind(value)}")
    if not math.isfinite(value) or (isinstance(value, int) and abs(value) > EXACT_INTEGER_MAX):
        raise invalid(f"schema at {place}: {_shown(value)} is beyond ±2^53")
    return value


def _short(value: Json, place: str) -> int | float:
    """A number that the compiler's reader of JSON does not round."""
    number = _number(value, place)
    if isinstance(number, float) and float(f"{number:.{EXACT_DIGITS}g}") != number:
        raise invalid(f"schema at {place}: {number!r} has more than {EXACT_DIGITS} digits")
    return number


def _lower(value: Json, place: str) -> int | float:
    return _rounded(_number(value, place), ROUND_CEILING)


def _upper(value: Json, place: str) -> int | float:
    return _rounded(_number(value, place), ROUND_FLOOR)


def _rounded(bound: int | float, rounding: str) -> int | float:
    """Towards the inside, to as many digits as the compiler reads exactly."""
    if isinstance(bound, int):
        return bound
    return float(Context(prec=EXACT_DIGITS, rounding=rounding).create_decimal(repr(bound)))


def _positive(value: Json, place: str) -> int | float:
    if _short(value, place) <= 0:
        raise invalid(f"schema at {place}: expected a number above 0, got {_shown(value)}")
    number: int | float = value
    return number


def _keep_clear_of_bounds(checked: dict[str, Json]) -> None:
    """A number just within a bound, written with enough digits, is read as the bound itself."""
    if checked.get("type") in ("integer", ["integer"]) or "multipleOf" in checked:
        return
    bounds = (checked.get("exclusiveMinimum", 0), checked.get("exclusiveMaximum", 0))
    digits = len(str(int(max(map(abs, bounds)))))
    checked["multipleOf"] = float(f"1e-{min(9, max(0, EXACT_DIGITS - digits))}")


def _names(value: Json, place: str) -> list[str]:
    if not isinstance(value, list):
        raise invalid(f"schema at {place}: expected a list of names, got {_kind(value)}")
    return [_text(name, _step(place, at)) for at, name in enumerate(value)]


def _pattern(value: Json, place: str) -> str:
    return portable_pattern(_text(value, place))


def _reference(value: Json, place: str) -> str:
    if not isinstance(value, str) or not (value == "#" or value.startswith("#/")):
        raise invalid(
            f"schema at {place}: only references within the schema are supported, such as "
            f"'#/$defs/name', not {_shown(value)}"
        )
    return value


def _constants(value: Json, place: str) -> list[Json]:
    if not isinstance(value, list) or not value:
        raise invalid(f"schema at {place}: expected a list of values that is not empty")
    return [_constant(each, _step(place, at)) for at, each in enumerate(value)]


def _constant(value: Json, place: str, depth: int = 0) -> Json:
    if depth > SCHEMA_DEPTH_MAX:
        raise invalid(f"schema at {place}: more than {SCHEMA_DEPTH_MAX} levels deep")
    if isinstance(value, str):
        beyond = next((c for c in value if c < " " and c not in _NAMED_ESCAPES), None)
        if beyond is not None:
            raise invalid(f"schema at {place}: the character U+{ord(beyond):04X} is not supported")
    elif isinstance(value, Mapping):
        for key, each in value.items():
            _constant(each, _step(place, key), depth + 1)
    elif isinstance(value, list):
        for at, each in enumerate(value):
            _constant(each, _step(place, at), depth + 1)
    elif value is not None and not isinstance(value, bool):
        _short(value, place)
    return value


_NESTED: dict[str, Callable[[_Reader, Json, str, int], Json]] = {
    "anyOf": _Reader.schemas,
    "oneOf": _Reader.schemas,
    "allOf": _Reader.schemas,
    "$defs": _Reader.named,
    "definitions": _Reader.named,
    "properties": _Reader.named,
    "patternProperties": _Reader.by_pattern,
    "additionalProperties": _Reader.schema,
    "items": _Reader.items,
    "prefixItems": _Reader.schemas,
}
"""Keywords that hold schemas."""
_LEAVES: dict[str, Callable[[Json, str], Json]] = {
    "type": _types,
    "enum": _constants,
    "const": _constant,
    "$ref": _reference,
    "required": _names,
    "minProperties": _count,
    "maxProperties": _count,
    "minItems": _count,
    "maxItems": _count,
    "minLength": _count,
    "maxLength": _count,
    "pattern": _pattern,
    "format": _text,
    "minimum": _lower,
    "maximum": _upper,
    "exclusiveMinimum": _lower,
    "exclusiveMaximum": _upper,
    "multipleOf": _positive,
}
"""All other keywords that are enforced."""
