"""How frames are written and read: a fixed prefix, a msgpack header, a payload.

The prefix is the magic with the format's version, the header's length and the payload's.

Invariant: every length and number is checked against a named limit; malformed input raises
WireError and costs its connection, nothing else.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from headrace.errors import WireError
from headrace.frames import (
    COST_MAX,
    DEPTH_MAX,
    DISK,
    ENTRY_BYTES_MAX,
    KEYS_MAX,
    KINDS,
    LAYOUT_BYTES,
    NONE_AHEAD,
    PAYLOAD_BYTES_MAX,
    PIN_MS_MAX,
    RAM,
    TENANT_CHARS_MAX,
    TRACE_HEADERS_MAX,
    Answer,
    Ask,
    Commit,
    Counted,
    EntryFacts,
    EntryKey,
    Found,
    Get,
    Has,
    Hello,
    Known,
    Lend,
    Lent,
    Manage,
    Put,
    Release,
    Request,
    Reserve,
    Reserved,
    RunOf,
    Stats,
    Verify,
    Welcome,
)
from headrace.policy.hashing import HASH_BYTES
from headrace.types import Band
from headrace.wire import Fields, pack

MAGIC = b"HRC\x03"
"""The last byte is the format's version."""

HEADER_BYTES_MAX = 1024 * 1024
NONCE_BYTES = 16
PATH_CHARS_MAX = 1024

PREFIX = struct.Struct(">4sIQ")
"""MAGIC, the header's length, the payload's length."""


def encode(message: Request | Answer) -> bytes:
    """Prefix and header of `message`; its payload, if any, is sent right behind."""
    header = pack({"op": _OP_OF[type(message)], "id": message.id} | _body(message))
    assert len(header) <= HEADER_BYTES_MAX, "KEYS_MAX keeps every header below its limit"
    payload_bytes = sum(message.sizes)
    assert payload_bytes <= PAYLOAD_BYTES_MAX, "senders cut their batches by PAYLOAD_BYTES_MAX"
    return PREFIX.pack(MAGIC, len(header), payload_bytes) + header


def _body(message: Request | Answer) -> dict[str, Any]:
    match message:
        case Get():
            return _encode_keys(message.keys) | {
                "band": -1 if message.band is None else int(message.band),
                "trace": dict(message.trace),
                "layout": message.layout,
                "tenant": message.tenant,
            }
        case Put() | Reserve():
            columns = _encode_entries(message.entries)
            body: dict[str, Any] = {"entries": columns, "trace": dict(message.trace)}
            if isinstance(message, Reserve):
                body |= {"using": message.using, "ahead": message.ahead}
            return body
        case Has() | Verify():
            return _encode_keys(message.keys)
        case Ask():
            return {"what": message.op}
        case RunOf():
            lent = (message.lease, message.places) if isinstance(message, Lent) else (0, ())
            return dict(zip(("lease", "places"), lent, strict=True)) | {
                "sizes": message.found,
                "crcs": message.crcs,
                "more": message.more,
                "tiers": message.tiers,
            }
        case Known():
            return {"flags": [int(flag) for flag in message.flags]}
        case _:
            return _plain_body(message)


def _plain_body(message: Request | Answer) -> dict[str, Any]:
    """Of messages whose fields travel as they are."""
    return {name: getattr(message, name) for name in message.__slots__}


def _encode_keys(keys: Sequence[EntryKey]) -> dict[str, Any]:
    assert 1 <= len(keys) <= KEYS_MAX, f"1 to {KEYS_MAX} keys a frame"
    assert all(key.kind == keys[0].kind for key in keys), "one kind a frame"
    return {"kind": keys[0].kind, "hashes": b"".join(key.hash for key in keys)}


def _encode_entries(entries: Sequence[EntryFacts]) -> list[Sequence[Any]]:
    """A column for each field, of one value where all are equal, as most are in a chain."""
    keys, *rest = zip(*entries, strict=True)
    kinds, hashes = zip(*keys, strict=True)
    return [_short(kinds), hashes, *map(_short, rest)]


def _short(column: Sequence[Any]) -> Sequence[Any]:
    return column[:1] if column.count(column[0]) == len(column) else column


def decode_request(header: bytes) -> Request:
    """The request in `header`. Raises WireError."""
    f = Fields("request", header)
    return _decode(f, _REQUESTS)


def decode_answer(header: bytes) -> Answer:
    """The answer in `header`. Raises WireError."""
    f = Fields("answer", header)
    return _decode(f, _ANSWERS)


M = TypeVar("M")
G = TypeVar("G", bound=Get)


def _decode(f: Fields, table: Mapping[str, Callable[[Fields, int], M]]) -> M:
    op, message_id = f.get("op", str), f.get("id", int)
    if op not in table:
        raise WireError(f"operation {op[:40]!r} is not known")
    return table[op](f, message_id)


def _decode_keys(f: Fields) -> tuple[EntryKey, ...]:
    kind, joined = _kind(f.get("kind", str)), f.get("hashes", bytes)
    if not joined or len(joined) % HASH_BYTES or len(joined) > KEYS_MAX * HASH_BYTES:
        raise WireError(f"hashes: {len(joined)} bytes are not 1 to {KEYS_MAX} hashes")
    starts = range(0, len(joined), HASH_BYTES)
    return tuple(EntryKey(kind, joined[at : at + HASH_BYTES]) for at in starts)


def _kind(kind: str) -> str:
    if kind not in KINDS:
        raise WireError(f"kind: {kind[:40]!r} is not one of {', '.join(KINDS)}")
    return kind


def _layout(layout: bytes) -> bytes:
    if len(layout) not in (0, LAYOUT_BYTES):
        raise WireError(f"layout: {len(layout)} bytes are not 0 or {LAYOUT_BYTES}")
    return layout


def _tenant(tenant: str) -> str:
    if len(tenant) > TENANT_CHARS_MAX:
        raise WireError(f"the tenant's name exceeds {TENANT_CHARS_MAX} characters")
    return tenant


def _trace(f: Fields) -> dict[str, str]:
    trace = f.texts("trace")
    if len(trace) > TRACE_HEADERS_MAX:
        raise WireError(f"trace: {len(trace)} headers exceed {TRACE_HEADERS_MAX}")
    return trace


def _decode_get(f: Fields, message_id: int, build: type[G]) -> G:
    reader = None if f.get("band", int) == -1 else f.one_of("band", Band)
    return build(
        message_id,
        _decode_keys(f),
        reader,
        _trace(f),
        _layout(f.get("layout", bytes)),
        _tenant(f.get("tenant", str)),
    )


_BANDS = tuple(Band)
_FACTS_TYPES = (str, bytes, bytes, int, int, int, int, str, int, float, bytes, int)


def _decode_entries(f: Fields) -> tuple[EntryFacts, ...]:
    """A column at a time: most of a put's decoding is this."""
    columns = f.get("entries", list)
    if len(columns) != len(_FACTS_TYPES) or not all(type(column) is list for column in columns):
        raise WireError("entry: its fields are not those agreed")
    count = len(columns[1])
    if not 1 <= count <= KEYS_MAX:
        raise WireError(f"entries: {count} are not 1 to {KEYS_MAX}")
    if not all(len(column) in (1, count) for column in columns):
        raise WireError("entry: a field is of some entries only")
    if not all(
        set(map(type, column)) == {kind} for column, kind in zip(columns, _FACTS_TYPES, strict=True)
    ):
        raise WireError("entry: its fields are not of the agreed types")
    kinds, hashes, parents, depths, sizes, crcs, bands, tenants, tokens, times, layouts, pins = (
        columns
    )
    if set(map(len, hashes)) != {HASH_BYTES} or not set(map(len, parents)) <= {0, HASH_BYTES}:
        raise WireError(f"entry: a hash has {HASH_BYTES} bytes")
    _within("size", sizes, 1, ENTRY_BYTES_MAX)
    _within("depth", depths, 0, DEPTH_MAX)
    _within("crc", crcs, 0, (1 << 32) - 1)
    _within("band", bands, 0, len(Band) - 1)
    _within("cost", tokens, 0, int(COST_MAX))
    _within("pin", pins, 0, PIN_MS_MAX)
    # a NaN, which would disorder the eviction heap, fails every comparison
    if not all(0 <= cost_ms <= COST_MAX for cost_ms in times):
        raise WireError("entry: the cost is out of range")
    for check, values in ((_kind, kinds), (_tenant, tenants), (_layout, layouts)):
        for value in set(values):
            check(value)
    named = [_BANDS[band] for band in bands]
    rest = (parents, depths, sizes, crcs, named, tenants, tokens, times, layouts, pins)
    wide = (column if len(column) == count else column * count for column in (kinds, *rest))
    keys = map(EntryKey, next(wide), hashes)
    return tuple(map(EntryFacts, keys, *wide))


def _within(what: str, numbers: Sequence[int], least: int, most: int) -> None:
    if min(numbers) < least or max(numbers) > most:
        raise WireError(f"entry: {what} {min(numbers)} to {max(numbers)} is not {least} to {most}")


def _decode_ask(f: Fields, message_id: int) -> Ask:
    what = f.get("what", str)
    if what not in ("stats", "ping"):
        raise WireError(f"question {what[:40]!r} is not known")
    return Ask(message_id, what)


def _decode_run(
    f: Fields,
) -> tuple[tuple[int, ...], tuple[int, ...], bool, tuple[int, ...]]:
    """Sizes, CRCs, whether there is more, and tiers."""
    sizes, crcs, tiers = f.integers("sizes"), f.integers("crcs"), f.integers("tiers")
    if len(sizes) != len(crcs) or len(sizes) > KEYS_MAX or len(tiers) not in (0, len(sizes)):
        raise WireError(f"found: {len(sizes)} sizes, {len(crcs)} CRCs, {len(tiers)} tiers")
    if not all(1 <= size <= ENTRY_BYTES_MAX for size in sizes):
        raise WireError("found: a size is out of range")
    if not all(RAM <= tier <= DISK for tier in tiers):
        raise WireError("found: a tier is not known")
    return sizes, crcs, f.get("more", bool), tiers


def _decode_lent(f: Fields, message_id: int) -> Lent:
    sizes, crcs, more, tiers = _decode_run(f)
    places = f.integers("places")
    if len(places) != len(sizes) or not all(place >= 0 for place in places):
        raise WireError(f"lent: {len(places)} places for {len(sizes)} sizes")
    return Lent(message_id, sizes, crcs, more, tiers, f.get("lease", int), places)


def _decode_reserved(f: Fields, message_id: int) -> Reserved:
    places = f.integers("places")
    if len(places) > KEYS_MAX or not all(place >= -1 for place in places):
        raise WireError("reserved: a place is out of range")
    places_ahead = f.integers("ahead_places")
    if len(places_ahead) > KEYS_MAX or not all(place >= 0 for place in places_ahead):
        raise WireError("reserved: a place ahead is out of range")
    ticket, held, ahead = f.get("ticket", int), f.get("held", int), f.get("ahead", int)
    return Reserved(message_id, ticket, places, held, ahead, places_ahead)


def _decode_reserve(f: Fields, message_id: int) -> Reserve:
    ahead = f.integers("ahead")
    if len(ahead) != len(NONE_AHEAD):
        raise WireError("reserve: places ahead are a number and a size")
    count, size_bytes = ahead
    if not (0 <= count <= KEYS_MAX and 0 <= size_bytes <= ENTRY_BYTES_MAX):
        raise WireError(f"reserve: {count} places of {size_bytes} bytes are out of range")
    using = f.get("using", int)
    return Reserve(message_id, _decode_entries(f), _trace(f), using, (count, size_bytes))


def _decode_commit(f: Fields, message_id: int) -> Commit:
    crcs = f.integers("crcs")
    if len(crcs) > KEYS_MAX or not all(-1 <= crc < 1 << 32 for crc in crcs):
        raise WireError("commit: a CRC is out of range")
    return Commit(message_id, f.get("ticket", int), crcs)


def _decode_known(f: Fields, message_id: int) -> Known:
    return Known(message_id, tuple(flag == 1 for flag in f.integers("flags")))


def _decode_welcome(f: Fields, message_id: int) -> Welcome:
    path, nonce, seat = f.get("path", str), f.get("nonce", bytes), f.get("seat", int)
    size_bytes = f.get("size_bytes", int)
    if len(path) > PATH_CHARS_MAX or len(nonce) != NONCE_BYTES or seat < 0 or size_bytes < 0:
        raise WireError("welcome: a field is out of range")
    return Welcome(message_id, path, nonce, size_bytes, seat)


_REQUESTS: dict[str, Callable[[Fields, int], Request]] = {
    "get": lambda f, message_id: _decode_get(f, message_id, Get),
    "lend": lambda f, message_id: _decode_get(f, message_id, Lend),
    "release": lambda f, message_id: Release(message_id, f.get("lease", int)),
    "put": lambda f, message_id: Put(message_id, _decode_entries(f), _trace(f)),
    "reserve": _decode_reserve,
    "commit": _decode_commit,
    "has": lambda f, message_id: Has(message_id, _decode_keys(f)),
    "verify": lambda f, message_id: Verify(message_id, _decode_keys(f)),
    "ask": _decode_ask,
    "hello": lambda _, message_id: Hello(message_id),
    "manage": lambda f, message_id: Manage(message_id, f.get("values", dict)),
}
_ANSWERS: dict[str, Callable[[Fields, int], Answer]] = {
    "found": lambda f, message_id: Found(message_id, *_decode_run(f)),
    "lent": _decode_lent,
    "reserved": _decode_reserved,
    "counted": lambda f, message_id: Counted(message_id, f.get("count", int)),
    "known": _decode_known,
    "stats": lambda f, message_id: Stats(message_id, f.get("values", dict)),
    "welcome": _decode_welcome,
}
_OP_OF: dict[type, str] = {
    Get: "get",
    Lend: "lend",
    Release: "release",
    Put: "put",
    Reserve: "reserve",
    Commit: "commit",
    Has: "has",
    Verify: "verify",
    Ask: "ask",
    Hello: "hello",
    Manage: "manage",
    Found: "found",
    Lent: "lent",
    Reserved: "reserved",
    Counted: "counted",
    Known: "known",
    Stats: "stats",
    Welcome: "welcome",
}
