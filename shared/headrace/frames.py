"""The frames between the cache service and its clients: the messages, no bytes and no socket.

A frame is a message and a payload: the raw bytes of entries, one after the other, whose sizes stand
in the message. `frame_codec.py` writes and reads them. A client of the same host may map the
service's arena instead (Hello, Welcome): then Lend and Reserve answer with places, and no payload
travels.

Invariant: all that a receiver must know of the entries stands before them, so that it can choose
where each goes, or skip it.
Rejected: entries inside the msgpack header (two copies of each).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from headrace.errors import SettingsError
from headrace.types import Band

ENTRY_BYTES_MAX = 32 * 1024 * 1024
PAYLOAD_BYTES_MAX = 64 * 1024 * 1024
KEYS_MAX = 1024
DEPTH_MAX = 1 << 20
COST_MAX = 1e9
TENANT_CHARS_MAX = 200
LAYOUT_BYTES = 8
PIN_MS_MAX = 30 * 24 * 3600 * 1000
TRACE_HEADERS_MAX = 8
UNIX_PATH_BYTES_MAX = 107

KV = "kv"
PROMPT = "prompt"
KINDS = (KV, PROMPT)

RAM = 0
DISK = 1

NONE_AHEAD = (0, 0)

Buffer = bytes | bytearray | memoryview


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


class EntryFacts(NamedTuple):
    """What a put says of one entry, beside its bytes.

    `parent` is the hash of the block before it (empty: none) and `depth` its place in the chain,
    one more than its parent's. `cost_tokens` and `cost_ms` are what computing it again would take
    (0 ms: not measured). `crc` is the CRC-32C of the bytes, carried back to the reader; 0 in a
    Reserve, whose bytes are not there yet. `layout` (8 bytes or none) names how the bytes are
    arranged: a reader that names another does not get them. `pin_ms` keeps the entry that long.
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
    layout: bytes = b""
    pin_ms: int = 0


@dataclass(frozen=True, slots=True)
class Message:
    """What all messages have: an id, by which an answer finds its request."""

    id: int

    @property
    def sizes(self) -> Sequence[int]:
        """Sizes of the entries that follow as payload."""
        return ()


@dataclass(frozen=True, slots=True)
class Get(Message):
    """Asks for the leading run of `keys`.

    `band` (if any) is the class of whoever reads them; `layout` (if any) the only one it accepts.
    """

    keys: tuple[EntryKey, ...]
    band: Band | None = None
    trace: Mapping[str, str] = field(default_factory=dict)
    layout: bytes = b""
    tenant: str = ""


@dataclass(frozen=True, slots=True)
class Lend(Get):
    """A Get that is answered with places in the arena, lent until Release or the end."""


@dataclass(frozen=True, slots=True)
class Release(Message):
    """Gives `lease` back. Has no answer."""

    lease: int


@dataclass(frozen=True, slots=True)
class Put(Message):
    """Offers entries; their bytes are the payload, in the same order."""

    entries: tuple[EntryFacts, ...]
    trace: Mapping[str, str] = field(default_factory=dict)

    @property
    def sizes(self) -> Sequence[int]:
        return [entry.size_bytes for entry in self.entries]


@dataclass(frozen=True, slots=True)
class Reserve(Message):
    """Asks for places in the arena to write `entries` to; Commit follows.

    `using` is the ticket of places had ahead, which the entries are written to in order; 0: none.
    `ahead` asks for such places for a later batch of the same tenant: how many, and of what size.
    """

    entries: tuple[EntryFacts, ...]
    trace: Mapping[str, str] = field(default_factory=dict)
    using: int = 0
    ahead: tuple[int, int] = NONE_AHEAD


@dataclass(frozen=True, slots=True)
class Commit(Message):
    """The places of `ticket` are written: a CRC for each that was given, or -1 to give it up.

    Of places had ahead, a CRC for each entry: the answer that says which of them are wanted may not
    be here yet.
    """

    ticket: int
    crcs: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Has(Message):
    """Asks which of `keys` are held; counts as no use."""

    keys: tuple[EntryKey, ...]


@dataclass(frozen=True, slots=True)
class Verify(Message):
    """Asks the service to check the CRC of `keys` and to drop what fails."""

    keys: tuple[EntryKey, ...]


@dataclass(frozen=True, slots=True)
class Ask(Message):
    """A question without arguments: `stats` or `ping`."""

    op: str


@dataclass(frozen=True, slots=True)
class Hello(Message):
    """Asks how to map the arena."""


@dataclass(frozen=True, slots=True)
class Manage(Message):
    """A request of the administration, `cache_admin.py`'s business."""

    values: dict[str, Any]


Request = Get | Lend | Release | Put | Reserve | Commit | Has | Verify | Ask | Hello | Manage


@dataclass(frozen=True, slots=True)
class RunOf(Message):
    """What Found and Lent tell of a run: sizes, CRCs and tiers (RAM or DISK) of its entries.

    `more`: it was cut short by what one answer, or one client, may have.
    """

    found: tuple[int, ...]
    crcs: tuple[int, ...]
    more: bool
    tiers: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Found(RunOf):
    """Answers Get: the run is the payload."""

    @property
    def sizes(self) -> Sequence[int]:
        return self.found


@dataclass(frozen=True, slots=True)
class Lent(RunOf):
    """Answers Lend: where in the arena the run stands, in bytes from its start.

    `lease` is to be released; 0 where nothing was lent.
    """

    lease: int = 0
    places: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Reserved(Message):
    """Answers Reserve: a place for each entry, -1 for those that are not to be written.

    `ticket` is 0 where no place was given; `held` counts the entries that are there already.
    `ahead_places` are had ahead, with ticket `ahead`; none where there is no room for them.
    """

    ticket: int
    places: tuple[int, ...]
    held: int
    ahead: int = 0
    ahead_places: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Counted(Message):
    """Answers Put and Commit (entries now held), Verify (entries dropped) and ping (0)."""

    count: int


@dataclass(frozen=True, slots=True)
class Known(Message):
    """Answers Has, one flag a key."""

    flags: tuple[bool, ...]


@dataclass(frozen=True, slots=True)
class Stats(Message):
    """Answers `stats`: nested maps of numbers; and Manage: what `cache_admin.py` says."""

    values: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Welcome(Message):
    """Answers Hello: the arena's file (empty: none to map), and what proves that it is the one.

    The file starts with `nonce`; the client locks the byte number `seat` of it for as long as it
    has it mapped.
    """

    path: str
    nonce: bytes
    size_bytes: int
    seat: int


Answer = Found | Lent | Reserved | Counted | Known | Stats | Welcome
