"""An administrator's requests to several cache services, and their answers as one.

Pure. A list is read node by node: the cursor's high bits say which. A quota is divided, since a
tenant's chains spread over all nodes alike; so is a guarantee.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

CURSOR_BITS = 34
"""Of a cursor, within one node; CURSOR_MAX leaves 64 nodes."""
_MASK = (1 << CURSOR_BITS) - 1


def summed(maps: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Nested maps of numbers, added up; of anything else the first counts."""
    total: dict[str, Any] = {}
    for each in maps:
        for name, value in each.items():
            have = total.get(name)
            if isinstance(value, Mapping):
                total[name] = summed([have, value] if isinstance(have, Mapping) else [value])
            elif have is None:
                total[name] = value
            elif isinstance(value, int | float) and isinstance(have, int | float):
                total[name] = have + value
    return total


def node_of(values: Mapping[str, Any], names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """What each node is asked: the request itself, a list's to the node its cursor names."""
    request = dict(values)
    if request.get("what") == "list":
        node, cursor = divmod(int(request.get("cursor", 0)), 1 << CURSOR_BITS)
        return {names[node]: request | {"cursor": cursor}} if node < len(names) else {}
    if request.get("what") == "quota" and names:
        for bound in ("max", "min"):
            request[bound] = int(request[bound]) // len(names)
    return {name: dict(request) for name in names}


def merged_answers(
    answers: Sequence[dict[str, Any]], asked: Sequence[str], names: Sequence[str]
) -> dict[str, Any]:
    """One answer of those that the nodes `asked` gave: a refusal, if there is any, before sums."""
    refused = next((each for each in answers if each.get("what") == "refused"), None)
    if refused is not None:
        return refused
    if answers[0].get("what") == "listed":
        return answers[0] | {"cursor": _next_cursor(int(answers[0]["cursor"]), asked[0], names)}
    if answers[0].get("what") == "told":
        told = summed(each["values"] for each in answers)
        return {"what": "told", "values": told | {"nodes": len(answers)}}
    return summed(answers)


def _next_cursor(cursor: int, name: str, names: Sequence[str]) -> int:
    node = names.index(name)
    if cursor:
        return (node << CURSOR_BITS) | (cursor & _MASK)
    return (node + 1) << CURSOR_BITS if node + 1 < len(names) else 0
