"""What can be proved of a JSON schema: that it has finite values, that schemas exclude each other.

Invariant: both answers are on the safe side. `all_apart` says so only where it is certain, and
where `has_finite_values` says no there are none. Schemas are those that `grammar_schemas` has
checked: keywords have arguments of their types, and references lead somewhere.

Rejected: asking the compiler, which does not look through references, and learns of an endless
recursion only when the model's tokens are used up.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any
from urllib.parse import unquote

from headrace.errors import CallerError

COMPARED_MAX = 64
"""Schemas that are compared each with each; more are apart only where one key tells all apart."""
LOOKS_MAX = 200_000
"""Looks at a schema until it is known what has finite values: a third of a second."""

Json = Any
"""What `json.loads` gives."""
Schema = dict[str, Json] | bool
Places = Mapping[str, Schema]
"""Schemas by JSON pointer."""

TYPES = frozenset({"null", "boolean", "number", "integer", "string", "array", "object"})


def all_apart(schemas: list[Schema], places: Places) -> bool:
    """Whether no value is valid under two of `schemas`: types differ, or the constants of a key."""
    targets = _Targets(places)
    found = [_facts(targets.of(schema), targets) for schema in schemas]
    if _apart_by_one_key(found):
        return True
    return len(found) <= COMPARED_MAX and all(
        not one.types & other.types or _tagged_apart(one, other)
        for one, other in combinations(found, 2)
    )


class _Targets:
    """Where references that stand alone lead to; a circle of them stays as it is."""

    def __init__(self, places: Places) -> None:
        self._places = places
        self._known: dict[str, Schema] = {}

    def of(self, schema: Schema) -> Schema:
        passed: list[str] = []
        while isinstance(schema, dict) and schema.keys() == {"$ref"}:
            name = schema["$ref"]
            if name in self._known:
                schema = self._known[name]
                break
            self._known[name] = schema  # what a circle of references comes back to
            passed.append(name)
            schema = self._places[unquote(name)]
        self._known.update(dict.fromkeys(passed, schema))
        return schema


@dataclass(frozen=True, slots=True)
class _Facts:
    """A schema's types, and the texts that each key may have which an object under it must have."""

    types: set[str]
    tags: Mapping[str, frozenset[str]]


def _facts(schema: Schema, targets: _Targets) -> _Facts:
    required = schema.get("required", ()) if isinstance(schema, dict) else ()
    tags = {key: _tags(schema, key, targets) for key in required if isinstance(schema, dict)}
    return _Facts(_types(schema), {key: texts for key, texts in tags.items() if texts})


def _apart_by_one_key(found: Sequence[_Facts]) -> bool:
    """Whether one key tells all objects apart, and other types come once: the usual way."""
    others = [name for each in found for name in each.types if name != "object"]
    tags = [each.tags for each in found if "object" in each.types]
    if len(set(others)) < len(others) or not tags:
        return False
    keys = set(tags[0]).intersection(*tags[1:])
    return any(_differ([each[key] for each in tags]) for key in keys)


def _differ(sets: Sequence[frozenset[str]]) -> bool:
    return len(frozenset().union(*sets)) == sum(map(len, sets))


def _tagged_apart(one: _Facts, other: _Facts) -> bool:
    """Whether only objects can be both, and a key that they must have has differing texts."""
    return one.types & other.types == {"object"} and any(
        texts.isdisjoint(other.tags[key]) for key, texts in one.tags.items() if key in other.tags
    )


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


def _tags(schema: dict[str, Json], key: str, targets: _Targets) -> frozenset[str]:
    """The texts that `key` may have; empty where it may have other values."""
    constants = _constants(targets.of(schema.get("properties", {}).get(key, True)))
    if constants is None or not all(isinstance(value, str) for value in constants):
        return frozenset()
    return frozenset(constants)


def has_finite_values(root: Schema, places: Places) -> bool:
    """Whether a value under `root` can come to an end.

    The least fixed point: a reference has finite values once its target has some. Raises
    CallerError `grammar_too_complex` where references lead on for longer than anybody writes.
    """
    open_targets = {
        schema["$ref"]: places[unquote(schema["$ref"])]
        for schema in places.values()
        if isinstance(schema, dict) and "$ref" in schema
    }
    ends = _Ends()
    while True:
        # what is referred to mostly stands behind what refers to it, so the next round goes back
        found = {name for name, schema in reversed(open_targets.items()) if ends.note(name, schema)}
        if not found:
            return ends.of(root)
        left = [item for item in open_targets.items() if item[0] not in found]
        open_targets = dict(reversed(left))


class _Ends:
    """Which schemas have finite values, going by the references that are known to."""

    def __init__(self) -> None:
        self._finite: set[str] = set()
        self._looked_at = 0

    def note(self, name: str, schema: Schema) -> bool:
        """Remember the reference `name` if its target `schema` has some."""
        found = self.of(schema)
        if found:
            self._finite.add(name)
        return found

    def of(self, schema: Schema) -> bool:
        self._looked_at += 1
        if self._looked_at > LOOKS_MAX:
            raise CallerError(
                "schema: its references are too many and lead too far",
                code="grammar_too_complex",
            )
        return isinstance(schema, bool) or all(self._each(schema))

    def _each(self, schema: dict[str, Json]) -> Iterator[bool]:
        """For each keyword that could force a value to go on for ever: whether it can end."""
        if "$ref" in schema:
            yield schema["$ref"] in self._finite
        for keyword in ("anyOf", "oneOf"):
            if keyword in schema:
                yield any(map(self.of, schema[keyword]))
        yield from map(self.of, schema.get("allOf", ()))
        types = schema.get("type", TYPES)
        options = {types} if isinstance(types, str) else set(types)
        if "enum" in schema or "const" in schema or options - {"array", "object"}:
            return
        properties = schema.get("properties", {})
        wide = schema.get("additionalProperties", True)
        as_object = "object" in options and all(
            self.of(properties.get(name, wide)) for name in schema.get("required", ())
        )
        first = schema.get("prefixItems", [])[: schema.get("minItems", 0)]
        if schema.get("minItems", 0) > len(first):
            first = [*first, schema.get("items", True)]
        yield as_object or ("array" in options and all(map(self.of, first)))
