"""The frames between the cache service and its clients: format and messages, no socket anywhere.

A frame is a fixed prefix (magic with version, header length, payload length), a msgpack header,
and a payload: the raw bytes of its entries, one after the other, whose sizes stand in the header.

Invariants: all that a receiver must know of the entries stands before them, so that it can choose
where each goes, or skip it; every length and number is checked against a named limit; malformed
input raises WireError and costs its connection, nothing else.
Rejected: entries inside the msgpack header (two copies of each).
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar
from urllib.parse import urlsplit

from headrace.errors import SettingsError, WireError
from headrace.policy.hashing import HASH_BYTES
from headrace.types import Band
from headrace.wire import Fields, pack

MAGIC = b"HRC\x01"
"""The last byte is the format's version."""

HEADER_BYTES_MAX = 1024 * 1024
ENTRY_BYTES_MAX = 32 * 1024 * 1024
PAYLOAD_BYTES_MAX = 64 * 1024 * 1024
KEYS_MAX = 1024
DEPTH_MAX = 1 << 20
COST_MAX = 1e9
TENANT_CHARS_MAX = 200
TRACE_HEADERS_MAX = 8
UNIX_PATH_BYTES_MAX = 107

KV = "kv"
PROMPT = "prompt"
KINDS = (KV, PROMPT)

Buffer = bytes | bytearray | memoryview

PREFIX = struct.Struct(">4sIQ")
"""MAGIC, the header's length, the payload's length."""


class Address(NamedTuple):
    """Where a cache service listens: a unix socket if `path` is set, else host and port."""

    host: str
    port: int
    path: str

    def __str__(self) -> str:
        if self.path:
            return f"unix://{self.path}"
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"tcp://{host}:{self.port}"


def parse_address(url: str) -> Address:
    """The address in `tcp://host:port` or `unix:///path`. Raises SettingsError."""
    parts = urlsplit(url)
    if parts.scheme == "unix":
        path = parts.netloc + parts.path
        if not path or len(path.encode()) > UNIX_PATH_BYTES_MAX:
            raise SettingsError(f"{url!r}: a unix path has 1 to {UNIX_PATH_BYTES_MAX} bytes")
        return Address("", 0, path)
    try:
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise SettingsError(f"{url!r}: {error}") from error
    if parts.scheme != "tcp" or not host or port is None:
        raise SettingsError(f"{url!r}: expected tcp://host:port or unix:///path")
    return Address(host, port, "")


class EntryKey(NamedTuple):
    """What an entry is found by: its kind (KV or PROMPT) and a 32-byte hash."""

    kind: str
    hash: bytes


@dataclass(frozen=True, slots=True)
class EntryFacts:
    """What a put says of one entry, beside its bytes.

    `parent` is the hash of the block before it (empty: none) and `depth` its place in the chain,
    one more than its parent's. `cost_tokens` and `cost_ms` are what computing it again would take
    (0 ms: not measured). `crc` is the CRC-32 of the bytes, carried back to the reader.
    """

    key: EntryKey
    parent: bytes
    depth: int
    size_bytes: int
    crc: int
    band: Band
    tenant: str
    cost_tokens: int
    cost_ms: float


@dataclass(frozen=True, slots=True)
class Get:
    """Asks for the leading run of `keys`; `band` (if any) is the class of whoever reads them."""

    id: int
    keys: tuple[EntryKey, ...]
    band: Band | None = None
    trace: Mapping[str, str] = field(default_factory=dict)

    @property
    def sizes(self) -> Sequence[int]:
        return ()


@dataclass(frozen=True, slots=True)
class Put:
    """Offers entries; their bytes are the payload, in the same order."""

    id: int
    entries: tuple[EntryFacts, ...]
    trace: Mapping[str, str] = field(default_factory=dict)

    @property
    def sizes(self) -> Sequence[int]:
        return [entry.size_bytes for entry in self.entries]


@dataclass(frozen=True, slots=True)
class Has:
    """Asks which of `keys` are held; counts as no use."""

    id: int
    keys: tuple[EntryKey, ...]

    @property
    def sizes(self) -> Sequence[int]:
        return ()


@dataclass(frozen=True, slots=True)
class Verify:
    """Asks the service to check the CRC of `keys` and to drop what fails."""

    id: int
    keys: tuple[EntryKey, ...]

    @property
    def sizes(self) -> Sequence[int]:
        return ()


@dataclass(frozen=True, slots=True)
class Ask:
    """A question without arguments: `stats` or `ping`."""

    id: int
    op: str

    @property
    def sizes(self) -> Sequence[int]:
        return ()


Request = Get | Put | Has | Verify | Ask


@dataclass(frozen=True, slots=True)
class Found:
    """Answers Get: sizes and CRCs of the run. `more`: it was cut short by PAYLOAD_BYTES_MAX."""

    id: int
    sizes: tuple[int, ...]
    crcs: tuple[int, ...]
    more: bool


@dataclass(frozen=True, slots=True)
class Counted:
    """Answers Put (entries now held), Verify (entries dropped) and ping (0)."""

    id: int
    count: int

    @property
    def sizes(self) -> Sequence[int]:
        return ()


@dataclass(frozen=True, slots=True)
class Known:
    """Answers Has, one flag a key."""

    id: int
    flags: tuple[bool, ...]

    @property
    def sizes(self) -> Sequence[int]:
        return ()


@dataclass(frozen=True, slots=True)
class Stats:
    """Answers `stats`: nested maps of numbers."""

    id: int
    values: dict[str, Any]

    @property
    def sizes(self) -> Sequence[int]:
        return ()


Answer = Found | Counted | Known | Stats


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
            band = -1 if message.band is None else int(message.band)
            return _encode_keys(message.keys) | {"band": band, "trace": dict(message.trace)}
        case Put():
            rows = [_encode_facts(facts) for facts in message.entries]
            return {"entries": rows, "trace": dict(message.trace)}
        case Has() | Verify():
            return _encode_keys(message.keys)
        case Ask():
            return {"what": message.op}
        case Found():
            return {"sizes": message.sizes, "crcs": message.crcs, "more": message.more}
        case Counted():
            return {"count": message.count}
        case Known():
            return {"flags": [int(flag) for flag in message.flags]}
        case Stats():
            return {"values": message.values}


def _encode_keys(keys: Sequence[EntryKey]) -> dict[str, Any]:
    assert 1 <= len(keys) <= KEYS_MAX, f"1 to {KEYS_MAX} keys a frame"
    assert all(key.kind == keys[0].kind for key in keys), "one kind a frame"
    return {"kind": keys[0].kind, "hashes": b"".join(key.hash for key in keys)}


def _encode_facts(facts: EntryFacts) -> list[Any]:
    return [
        facts.key.kind,
        facts.key.hash,
        facts.parent,
        facts.depth,
        facts.size_bytes,
        facts.crc,
        int(facts.band),
        facts.tenant,
        facts.cost_tokens,
        float(facts.cost_ms),
    ]


def decode_request(header: bytes) -> Request:
    """The request in `header`. Raises WireError."""
    f = Fields("request", header)
    return _decode(f, _REQUESTS)


def decode_answer(header: bytes) -> Answer:
    """The answer in `header`. Raises WireError."""
    f = Fields("answer", header)
    return _decode(f, _ANSWERS)


M = TypeVar("M")


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


def _trace(f: Fields) -> dict[str, str]:
    trace = f.texts("trace")
    if len(trace) > TRACE_HEADERS_MAX:
        raise WireError(f"trace: {len(trace)} headers exceed {TRACE_HEADERS_MAX}")
    return trace


def _decode_get(f: Fields, message_id: int) -> Get:
    band = f.get("band", int)
    reader = None if band == -1 else f.one_of("band", Band)
    return Get(message_id, _decode_keys(f), reader, _trace(f))


def _decode_put(f: Fields, message_id: int) -> Put:
    rows = f.get("entries", list)
    if not 1 <= len(rows) <= KEYS_MAX:
        raise WireError(f"entries: {len(rows)} are not 1 to {KEYS_MAX}")
    return Put(message_id, tuple(_decode_facts(row) for row in rows), _trace(f))


_FACTS_TYPES = (str, bytes, bytes, int, int, int, int, str, int, float)


def _decode_facts(row: Any) -> EntryFacts:
    if not isinstance(row, list) or tuple(map(type, row)) != _FACTS_TYPES:
        raise WireError("entry: its fields are not of the agreed types")
    kind, key_hash, parent, depth, size, crc, band, tenant, tokens, ms = row
    if len(key_hash) != HASH_BYTES or len(parent) not in (0, HASH_BYTES):
        raise WireError(f"entry: a hash has {HASH_BYTES} bytes")
    if not 1 <= size <= ENTRY_BYTES_MAX:
        raise WireError(f"entry: size {size} is not 1 to {ENTRY_BYTES_MAX} bytes")
    if not (0 <= depth <= DEPTH_MAX and 0 <= crc < 1 << 32 and 0 <= band < len(Band)):
        raise WireError("entry: depth, crc or band is out of range")
    # a NaN, which would disorder the eviction heap, fails every comparison
    if not (0 <= tokens <= COST_MAX and 0 <= ms <= COST_MAX):
        raise WireError("entry: the cost is out of range")
    if len(tenant) > TENANT_CHARS_MAX:
        raise WireError(f"entry: the tenant's name exceeds {TENANT_CHARS_MAX} characters")
    key = EntryKey(_kind(kind), key_hash)
    return EntryFacts(key, parent, depth, size, crc, Band(band), tenant, tokens, ms)


def _decode_ask(f: Fields, message_id: int) -> Ask:
    what = f.get("what", str)
    if what not in ("stats", "ping"):
        raise WireError(f"question {what[:40]!r} is not known")
    return Ask(message_id, what)


def _decode_found(f: Fields, message_id: int) -> Found:
    sizes, crcs = f.integers("sizes"), f.integers("crcs")
    if len(sizes) != len(crcs) or len(sizes) > KEYS_MAX:
        raise WireError(f"found: {len(sizes)} sizes for {len(crcs)} CRCs")
    if not all(1 <= size <= ENTRY_BYTES_MAX for size in sizes):
        raise WireError("found: a size is out of range")
    return Found(message_id, sizes, crcs, f.get("more", bool))


def _decode_known(f: Fields, message_id: int) -> Known:
    return Known(message_id, tuple(flag == 1 for flag in f.integers("flags")))


_REQUESTS: dict[str, Callable[[Fields, int], Request]] = {
    "get": _decode_get,
    "put": _decode_put,
    "has": lambda f, message_id: Has(message_id, _decode_keys(f)),
    "verify": lambda f, message_id: Verify(message_id, _decode_keys(f)),
    "ask": _decode_ask,
}
_ANSWERS: dict[str, Callable[[Fields, int], Answer]] = {
    "found": _decode_found,
    "counted": lambda f, message_id: Counted(message_id, f.get("count", int)),
    "known": _decode_known,
    "stats": lambda f, message_id: Stats(message_id, f.get("values", dict)),
}
_OP_OF: dict[type, str] = {
    Get: "get",
    Put: "put",
    Has: "has",
    Verify: "verify",
    Ask: "ask",
    Found: "found",
    Counted: "counted",
    Known: "known",
    Stats: "stats",
}
