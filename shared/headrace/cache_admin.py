"""What administrators ask of a cache service and what it answers, as maps of plain values.

They travel in `Manage` frames and back in `Stats` frames (frames.py). Invariants: whatever is
decoded is within the limits named here, else WireError names the field; a `tenant` in a request
restricts it to that tenant's entries, None is for administrators only, which its sender sees to.
Rejected: frames of their own for each operation, which are rare and small.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from headrace.errors import WireError
from headrace.frames import (
    DEPTH_MAX,
    ENTRY_BYTES_MAX,
    KEYS_MAX,
    KINDS,
    PIN_MS_MAX,
    TENANT_CHARS_MAX,
    EntryKey,
)
from headrace.policy.hashing import GROUP_BYTES, HASH_BYTES, MODEL_TAG_BYTES
from headrace.types import Band
from headrace.wire import Fields

LIST_MAX = 1_000
CURSOR_MAX = 1 << 40
QUOTA_BYTES_MAX = 1 << 50
MESSAGE_CHARS_MAX = 500
LAYOUT_BYTES_MAX = 8
GROUPS_MAX = 1 << 16
CROSSINGS_MAX = 8_192
"""Ways between groups of blocks in one answer, which stays well below a frame's limit."""

IN_RAM = 1
ON_DISK = 2
"""Bits of EntryInfo.tiers."""


@dataclass(frozen=True, slots=True)
class EntryInfo:
    """One entry as an administrator sees it. `pin_ms` is what is left of its pin, 0 for none."""

    key: EntryKey
    parent: bytes
    depth: int
    size_bytes: int
    tenant: str
    band: Band
    tiers: int
    pin_ms: int = 0
    layout: bytes = b""


@dataclass(frozen=True, slots=True)
class ListEntries:
    """Asks for up to `limit` entries from `cursor` on, in an order that only changes disturb.

    `kind`: None for all. `prefix`: the hash of an entry; it and what follows it in its chains, and
    all of `groups` (as hashing.py names them), which lie behind it for all that other nodes know.
    """

    tenant: str | None = None
    kind: str | None = None
    prefix: bytes = b""
    limit: int = 100
    cursor: int = 0
    groups: tuple[bytes, ...] = ()


@dataclass(frozen=True, slots=True)
class Pin:
    """Keeps `keys` (and what stands before them) for `ttl_ms` from now on."""

    keys: tuple[EntryKey, ...]
    ttl_ms: int
    tenant: str | None = None


@dataclass(frozen=True, slots=True)
class Unpin:
    """Ends the pins of `keys`."""

    keys: tuple[EntryKey, ...]
    tenant: str | None = None


@dataclass(frozen=True, slots=True)
class Purge:
    """Drops the entries that meet all that is given; nothing given means all of them.

    `prefix` and `groups` as in ListEntries; `model` are the first MODEL_TAG_BYTES of layouts.
    """

    tenant: str | None = None
    prefix: bytes = b""
    model: bytes = b""
    groups: tuple[bytes, ...] = ()


@dataclass(frozen=True, slots=True)
class Trace:
    """Asks where chains go from group to group: what a node needs of the others to find all that
    comes after `prefix`. Names of groups are nobody's secret but their owner's: only who puts
    several nodes together asks."""

    prefix: bytes


@dataclass(frozen=True, slots=True)
class SetQuota:
    """What `tenant` may hold at most (0: no limit) and is left with when others need room."""

    tenant: str
    max_bytes: int
    min_bytes: int


@dataclass(frozen=True, slots=True)
class ReadStats:
    """Asks for the counters: all, or those of one tenant."""

    tenant: str | None = None


Request = ListEntries | Pin | Unpin | Purge | SetQuota | ReadStats | Trace


@dataclass(frozen=True, slots=True)
class Listed:
    """Answers ListEntries; `cursor` is where to go on, 0 at the end."""

    entries: tuple[EntryInfo, ...]
    cursor: int = 0


@dataclass(frozen=True, slots=True)
class Changed:
    """Answers Pin, Unpin, Purge and SetQuota: how many entries it concerned, and their bytes."""

    entries: int
    size_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Told:
    """Answers ReadStats: nested maps of numbers."""

    values: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Refused:
    """Answers what cannot be done, and says why."""

    message: str


@dataclass(frozen=True, slots=True)
class Traced:
    """Answers Trace: groups' first blocks with their parents, and the last blocks of groups that
    come after the prefix."""

    heads: tuple[tuple[bytes, bytes], ...]
    ends: tuple[bytes, ...]


Answer = Listed | Changed | Told | Refused | Traced


def encode(message: Request | Answer) -> dict[str, Any]:
    """`message` as a map of plain values."""
    return {"what": _NAMES[type(message)]} | _body(message)


def _body(message: Request | Answer) -> dict[str, Any]:
    match message:
        case Listed():
            return {"rows": [_encode_info(e) for e in message.entries], "cursor": message.cursor}
        case Changed():
            return {"entries": message.entries, "bytes": message.size_bytes}
        case Told():
            return {"values": message.values}
        case Refused():
            return {"message": message.message[:MESSAGE_CHARS_MAX]}
        case Traced():
            heads = b"".join(hash_ + parent for hash_, parent in message.heads)
            return {"heads": heads, "ends": b"".join(message.ends)}
        case _:
            return _request_body(message)


def _request_body(message: Request) -> dict[str, Any]:
    match message:
        case ListEntries():
            return {
                "tenant": message.tenant,
                "kind": message.kind,
                "prefix": message.prefix,
                "limit": message.limit,
                "cursor": message.cursor,
                "groups": b"".join(message.groups),
            }
        case Pin():
            return _encode_keys(message.keys, message.tenant) | {"ttl": message.ttl_ms}
        case Unpin():
            return _encode_keys(message.keys, message.tenant)
        case Purge():
            return {
                "tenant": message.tenant,
                "prefix": message.prefix,
                "model": message.model,
                "groups": b"".join(message.groups),
            }
        case Trace():
            return {"prefix": message.prefix}
        case SetQuota():
            return {"tenant": message.tenant, "max": message.max_bytes, "min": message.min_bytes}
        case ReadStats():
            return {"tenant": message.tenant}


def _encode_keys(keys: Sequence[EntryKey], tenant: str | None) -> dict[str, Any]:
    assert 1 <= len(keys) <= KEYS_MAX, f"1 to {KEYS_MAX} keys a request"
    return {"keys": [list(key) for key in keys], "tenant": tenant}


def _encode_info(info: EntryInfo) -> list[Any]:
    return [
        info.key.kind,
        info.key.hash,
        info.parent,
        info.depth,
        info.size_bytes,
        info.tenant,
        int(info.band),
        info.tiers,
        info.pin_ms,
        info.layout,
    ]


M = TypeVar("M")


def decode_request(values: Any) -> Request:
    """The request in a map. Raises WireError."""
    return _decode(Fields("manage", values), _REQUESTS)


def decode_answer(values: Any) -> Answer:
    """The answer in a map. Raises WireError."""
    return _decode(Fields("managed", values), _ANSWERS)


def _decode(f: Fields, table: Mapping[str, Callable[[Fields], M]]) -> M:
    what = f.get("what", str)
    if what not in table:
        raise WireError(f"what: {what[:40]!r} is not known")
    return table[what](f)


def _tenant(f: Fields) -> str | None:
    return f.one_of("tenant", _as_tenant)


def _as_tenant(value: Any) -> str | None:
    if value is None or (isinstance(value, str) and 0 < len(value) <= TENANT_CHARS_MAX):
        return value
    raise ValueError


def _number(f: Fields, key: str, low: int, high: int) -> int:
    value = f.get(key, int)
    if not low <= value <= high:
        raise WireError(f"{key}: {value} is not {low} to {high}")
    return value


def _bytes(f: Fields, key: str, length: int) -> bytes:
    """Nothing, or exactly `length` bytes."""
    value = f.get(key, bytes)
    if len(value) not in (0, length):
        raise WireError(f"{key}: {len(value)} bytes instead of {length}")
    return value


def _keys(f: Fields) -> tuple[EntryKey, ...]:
    rows = f.get("keys", list)
    if not 1 <= len(rows) <= KEYS_MAX:
        raise WireError(f"keys: {len(rows)} are not 1 to {KEYS_MAX}")
    return tuple(_as_key(row) for row in rows)


def _as_key(row: Any) -> EntryKey:
    if not isinstance(row, list) or tuple(map(type, row)) != (str, bytes):
        raise WireError("keys: a key is a kind and a hash")
    kind, key_hash = row
    if kind not in KINDS or len(key_hash) != HASH_BYTES:
        raise WireError(f"keys: a kind of {KINDS} and {HASH_BYTES} bytes")
    return EntryKey(kind, key_hash)


def _as_kind(value: Any) -> str | None:
    if value is None or value in KINDS:
        kind: str | None = value
        return kind
    raise ValueError


def _decode_list(f: Fields) -> ListEntries:
    return ListEntries(
        _tenant(f),
        f.one_of("kind", _as_kind),
        _bytes(f, "prefix", HASH_BYTES),
        _number(f, "limit", 1, LIST_MAX),
        _number(f, "cursor", 0, CURSOR_MAX),
        _pieces(f, "groups", GROUP_BYTES, GROUPS_MAX),
    )


def _pieces(f: Fields, key: str, length: int, most: int) -> tuple[bytes, ...]:
    """At most so many pieces of `length` bytes, which stand one behind the other."""
    value = f.get(key, bytes)
    if len(value) % length or len(value) > length * most:
        raise WireError(f"{key}: {len(value)} bytes are not up to {most} times {length}")
    return tuple(value[at : at + length] for at in range(0, len(value), length))


def _decode_purge(f: Fields) -> Purge:
    return Purge(
        _tenant(f),
        _bytes(f, "prefix", HASH_BYTES),
        _bytes(f, "model", MODEL_TAG_BYTES),
        _pieces(f, "groups", GROUP_BYTES, GROUPS_MAX),
    )


def _decode_trace(f: Fields) -> Trace:
    prefix = _bytes(f, "prefix", HASH_BYTES)
    if not prefix:
        raise WireError("prefix: a chain begins somewhere")
    return Trace(prefix)


def _decode_traced(f: Fields) -> Traced:
    pairs = _pieces(f, "heads", 2 * HASH_BYTES, CROSSINGS_MAX)
    heads = tuple((pair[:HASH_BYTES], pair[HASH_BYTES:]) for pair in pairs)
    return Traced(heads, _pieces(f, "ends", HASH_BYTES, CROSSINGS_MAX))


def _decode_quota(f: Fields) -> SetQuota:
    tenant = _tenant(f)
    max_bytes = _number(f, "max", 0, QUOTA_BYTES_MAX)
    min_bytes = _number(f, "min", 0, QUOTA_BYTES_MAX)
    if tenant is None:
        raise WireError("tenant: a quota is one tenant's")
    if max_bytes and min_bytes > max_bytes:
        raise WireError(f"min: {min_bytes} exceeds max {max_bytes}")
    return SetQuota(tenant, max_bytes, min_bytes)


_INFO_TYPES = (str, bytes, bytes, int, int, str, int, int, int, bytes)


def _decode_info(row: Any) -> EntryInfo:
    if not isinstance(row, list) or tuple(map(type, row)) != _INFO_TYPES:
        raise WireError("rows: the fields of an entry are not of the agreed types")
    kind, key_hash, parent, depth, size, tenant, band, tiers, pin_ms, layout = row
    if len(parent) not in (0, HASH_BYTES) or len(layout) > LAYOUT_BYTES_MAX:
        raise WireError("rows: a hash or layout is of the wrong length")
    if not (0 <= depth <= DEPTH_MAX and 1 <= size <= ENTRY_BYTES_MAX and 0 <= band < len(Band)):
        raise WireError("rows: depth, size or band is out of range")
    if not (0 <= tiers <= IN_RAM | ON_DISK and pin_ms >= 0 and len(tenant) <= TENANT_CHARS_MAX):
        raise WireError("rows: tiers, pin or tenant is out of range")
    key = _as_key([kind, key_hash])
    return EntryInfo(key, parent, depth, size, tenant, Band(band), tiers, pin_ms, layout)


def _decode_listed(f: Fields) -> Listed:
    rows = f.get("rows", list)
    if len(rows) > LIST_MAX:
        raise WireError(f"rows: {len(rows)} exceed {LIST_MAX}")
    return Listed(tuple(map(_decode_info, rows)), _number(f, "cursor", 0, CURSOR_MAX))


_REQUESTS: dict[str, Callable[[Fields], Request]] = {
    "list": _decode_list,
    "pin": lambda f: Pin(_keys(f), _number(f, "ttl", 1, PIN_MS_MAX), _tenant(f)),
    "unpin": lambda f: Unpin(_keys(f), _tenant(f)),
    "purge": _decode_purge,
    "quota": _decode_quota,
    "stats": lambda f: ReadStats(_tenant(f)),
    "trace": _decode_trace,
}
_ANSWERS: dict[str, Callable[[Fields], Answer]] = {
    "listed": _decode_listed,
    "changed": lambda f: Changed(f.get("entries", int), f.get("bytes", int)),
    "told": lambda f: Told(f.get("values", dict)),
    "traced": _decode_traced,
    "refused": lambda f: Refused(f.get("message", str)[:MESSAGE_CHARS_MAX]),
}
_NAMES: dict[type, str] = {
    ListEntries: "list",
    Pin: "pin",
    Unpin: "unpin",
    Purge: "purge",
    SetQuota: "quota",
    ReadStats: "stats",
    Trace: "trace",
    Traced: "traced",
    Listed: "listed",
    Changed: "changed",
    Told: "told",
    Refused: "refused",
}
