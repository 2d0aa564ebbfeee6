"""An administrator's requests to several cache services, and their answers as one.

Pure. A list is read node by node: the cursor's high bits say which. A quota is divided, since a
tenant's chains spread over all nodes alike; so is a guarantee. A chain goes from node to node,
group by group: what comes after a block is found by putting together what all nodes say of the
ways between groups, since all of a group comes after its first block.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from headrace.cache_admin import GROUPS_MAX, Refused, Traced, decode_answer, encode
from headrace.errors import WireError
from headrace.policy.hashing import group_of, place_of

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


def groups_below(prefix: bytes, traced: Iterable[Traced]) -> list[bytes]:
    """Names of the groups all of whose blocks come after `prefix`, in the order of their names."""
    heads: dict[bytes, list[bytes]] = {}
    ends = {prefix}
    links: list[tuple[bytes, bytes]] = []
    for each in traced:
        ends |= set(each.ends)
        links += each.heads
    found = {group_of(hash_) for hash_, parent in links if parent in ends}
    if not place_of(prefix):
        found.add(group_of(prefix))
    for hash_, parent in links:
        heads.setdefault(group_of(parent), []).append(group_of(hash_))
    left = list(found)
    while left:
        for group in heads.pop(left.pop(), ()):
            if group not in found:
                found.add(group)
                left.append(group)
    return sorted(found)


def merged_traces(
    prefix: bytes, answers: Sequence[dict[str, Any] | None]
) -> bytes | dict[str, Any] | None:
    """The groups below `prefix` by what all nodes answered, one name behind the other.

    Else what to answer to who asked: a refusal, or None where a node did not say its part.
    """
    traced: list[Traced] = []
    for values in answers:
        if values is None:
            return None
        try:
            answer = decode_answer(values)
        except WireError:
            return None
        if not isinstance(answer, Traced):
            return values
        traced.append(answer)
    groups = groups_below(prefix, traced)
    if len(groups) > GROUPS_MAX:
        return encode(Refused("too many chains begin so: ask by tenant or model, not by prefix"))
    return b"".join(groups)


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
