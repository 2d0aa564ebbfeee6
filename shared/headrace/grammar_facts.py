"""What can be proved of a JSON schema: that it has finite values, that schemas exclude each other.

Invariant: both answers are on the safe side. `all_apart` says so only where it is certain, and
where `has_finite_values` says no there are none. Schemas are those that `grammar_schemas` has
checked: keywords have arguments of their types, and references lead somewhere.

Rejected: asking the compiler, which does not look through references, and learns of an endless
recursion only when the model's tokens are used up.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import combinations
from typing import Any
from urllib.parse import unquote

Json = Any
"""What `json.loads` gives."""
Schema = dict[str, Json] | bool
Places = Mapping[str, Schema]
"""Schemas by JSON pointer."""

TYPES = frozenset({"null", "boolean", "number", "integer", "string", "array", "object"})


def all_apart(schemas: list[Schema], places: Places) -> bool:
    """Whether no value is valid under two of `schemas`: types differ, or the constants of a key."""
    targets = [_target(schema, places) for schema in schemas]
    return all(
        not _types(one) & _types(other) or _tagged_apart(one, other, places)
        for one, other in combinations(targets, 2)
    )


def _target(schema: Schema, places: Places) -> Schema:
    """Where references that stand alone lead to; a circle of them stays as it is."""
    seen: set[str] = set()
    while isinstance(schema, dict) and schema.keys() == {"$ref"} and schema["$ref"] not in seen:
        seen.add(schema["$ref"])
        schema = places[unquote(schema["$ref"])]
    return schema


def _types(schema: Schema) -> set[str]:
    """Types that values may have; an integer is a number."""
    if isinstance(schema, bool):
        return set(TYPES) if schema else set()
    named = schema.get("type", TYPES)
    types = {named} if isinstance(named, str) else set(named)
    types = {"number" if name == "integer" else name for name in types}
    constants = _constants(schema)
    return types if constants is None else types & {_type_of(value) for value in constants}


def _constants(schema: Schema) -> list[Json] | None:
    """The only values that `const` or `enum` leave; None without them."""
    if isinstance(schema, bool):
        return None
    return [schema["const"]] if "const" in schema else schema.get("enum")


def _type_of(value: Json) -> str:
    if value is None:
        return "null"
    names = {bool: "boolean", str: "string", list: "array", dict: "object"}
    return names.get(type(value), "number")


def _tagged_apart(one: Schema, other: Schema, places: Places) -> bool:
    """Whether both are objects that must have a key whose texts differ: a discriminator."""
    if (
        isinstance(one, bool)
        or isinstance(other, bool)
        or _types(one) & _types(other) != {"object"}
    ):
        return False
    keys = set(one.get("required", ())) & set(other.get("required", ()))
    tags = [(_tags(one, key, places), _tags(other, key, places)) for key in sorted(keys)]
    return any(bool(mine and theirs and mine.isdisjoint(theirs)) for mine, theirs in tags)


def _tags(schema: dict[str, Json], key: str, places: Places) -> set[str]:
    """The texts that `key` may have; empty where it may have other values."""
    constants = _constants(_target(schema.get("properties", {}).get(key, True), places))
    if constants is None or not all(isinstance(value, str) for value in constants):
        return set()
    return set(constants)


def has_finite_values(root: Schema, places: Places) -> bool:
    """Whether a value under `root` can come to an end.

    The least fixed point: a reference has finite values once its target has some.
    """
    targets = {
        schema["$ref"]: places[unquote(schema["$ref"])]
        for schema in places.values()
        if isinstance(schema, dict) and "$ref" in schema
    }
    finite: set[str] = set()
    while True:
        found = {t for t, schema in targets.items() if t not in finite and _ends(schema, finite)}
        if not found:
            break
        finite |= found
    return _ends(root, finite)


def _ends(schema: Schema, finite: set[str]) -> bool:
    return isinstance(schema, bool) or all(_endings(schema, finite))


def _endings(schema: dict[str, Json], finite: set[str]) -> Iterator[bool]:
    """For each keyword that could force a value to go on for ever: whether it can end."""
    if "$ref" in schema:
        yield schema["$ref"] in finite
    for keyword in ("anyOf", "oneOf"):
        if keyword in schema:
            yield any(_ends(each, finite) for each in schema[keyword])
    yield from (_ends(each, finite) for each in schema.get("allOf", ()))
    types = schema.get("type", TYPES)
    options = {types} if isinstance(types, str) else set(types)
    if "enum" in schema or "const" in schema or options - {"array", "object"}:
        return
    properties = schema.get("properties", {})
    wide = schema.get("additionalProperties", True)
    as_object = "object" in options and all(
        _ends(properties.get(name, wide), finite) for name in schema.get("required", ())
    )
    first = schema.get("prefixItems", [])[: schema.get("minItems", 0)]
    if schema.get("minItems", 0) > len(first):
        first = [*first, schema.get("items", True)]
    yield as_object or ("array" in options and all(_ends(each, finite) for each in first))
