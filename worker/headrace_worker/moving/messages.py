"""What two workers say to each other while KV moves, and how it is written.

The sender greets, then asks for places, batch by batch; the receiver answers for each block with a
slot of its memory or that it has the block; then the blocks come, as payload or, where both see the
same memory, only the word that they are there. `Flush` is answered when all of it is in the pool.

Invariant: a block goes into a slot that this connection was given and has not used yet; every
length and number is checked, and what is malformed costs its connection, nothing else.
Rejected: the cache service's messages. They name entries for ever and make room by evicting; here a
slot is held for milliseconds, by one connection, and nobody looks for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from headrace.errors import WireError
from headrace.frame_codec import HEADER_BYTES_MAX, MAGIC, NONCE_BYTES, PREFIX
from headrace.frames import LAYOUT_BYTES
from headrace.policy.hashing import HASH_BYTES
from headrace.wire import pack, unpack

BATCH_MAX = 16
"""Blocks in one message."""
HELD = -1
"""Instead of a slot: the receiver has this block."""
SLOTS_MAX = 1 << 20
BLOCK_BYTES_MAX = 1 << 30


@dataclass(frozen=True, slots=True)
class Message:
    """`id` is by which an answer finds its request."""

    id: int

    @property
    def sizes(self) -> Sequence[int]:
        """Sizes of the blocks that follow as payload."""
        return ()


@dataclass(frozen=True, slots=True)
class Greet(Message):
    """The sender's blocks are arranged as `layout` names and have `block_bytes`."""

    layout: bytes
    block_bytes: int


@dataclass(frozen=True, slots=True)
class Welcome(Message):
    """`reason` says why nothing is taken; '' if it is. Room for jobs: `kv_tokens`, `max_jobs`.

    The slots lie in the file `path`, if there is one: slot s at `base` + s * `stride`.
    """

    reason: str
    kv_tokens: int
    max_jobs: int
    path: str = ""
    nonce: bytes = b""
    size_bytes: int = 0
    seat: int = 0
    base: int = 0
    stride: int = 0


@dataclass(frozen=True, slots=True)
class Ask(Message):
    """Places for these blocks, please."""

    hashes: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class Places(Message):
    """For each block its slot, or HELD."""

    slots: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Block:
    """One block's name: hash, parent's hash, place in its chain from 0; and its slot."""

    hash: bytes
    parent: bytes
    depth: int
    slot: int


@dataclass(frozen=True, slots=True)
class Blocks(Message):
    """These blocks are in their slots, or follow as payload of `payload_bytes` each.

    `unused` are slots that are not needed after all. No answer.
    """

    band: int
    tenant: str
    blocks: tuple[Block, ...]
    unused: tuple[int, ...]
    payload_bytes: int

    @property
    def sizes(self) -> Sequence[int]:
        return [self.payload_bytes] * len(self.blocks) if self.payload_bytes else ()


@dataclass(frozen=True, slots=True)
class Flush(Message):
    """Tell me when all that I sent is in your pool."""


@dataclass(frozen=True, slots=True)
class Flushed(Message):
    """It is; `reason` says why jobs cannot come all the same."""

    reason: str


def encode(message: Message) -> bytes:
    """Prefix and header; the payload, if any, is sent right behind."""
    header = pack([_NUMBER_OF[type(message)], message.id, *_fields(message)])
    assert len(header) <= HEADER_BYTES_MAX, "BATCH_MAX keeps headers small"
    return PREFIX.pack(MAGIC, len(header), sum(message.sizes)) + header


def _fields(message: Message) -> list[Any]:
    match message:
        case Greet():
            return [message.layout, message.block_bytes]
        case Welcome():
            m = message
            return [
                m.reason, m.kv_tokens, m.max_jobs, m.path, m.nonce, m.size_bytes, m.seat, m.base,
                m.stride,
            ]  # fmt: skip
        case Ask():
            return [b"".join(message.hashes)]
        case Places():
            return [list(message.slots)]
        case Blocks():
            rows = [[b.hash, b.parent, b.depth, b.slot] for b in message.blocks]
            return [message.band, message.tenant, rows, list(message.unused), message.payload_bytes]
        case Flushed():
            return [message.reason]
        case _:
            return []


_NUMBER_OF: dict[type[Message], int] = {
    Greet: 1,
    Welcome: 2,
    Ask: 3,
    Places: 4,
    Blocks: 5,
    Flush: 6,
    Flushed: 7,
}


def decode(header: bytes) -> Message:
    """Raises WireError."""
    match unpack(header):
        case [1, int(id), bytes(layout), int(size)] if len(layout) == LAYOUT_BYTES:
            return Greet(id, layout, _within(size, BLOCK_BYTES_MAX))
        case [2, int(id), str(reason), int(kv), int(jobs), str(path), bytes(nonce), *rest]:
            size, seat, base, stride = _integers(rest, 4)
            if len(nonce) not in (0, NONCE_BYTES):
                raise WireError("move: a nonce of another length")
            return Welcome(id, reason, kv, jobs, path, nonce, size, seat, base, stride)
        case [3, int(id), bytes(joined)]:
            return Ask(id, _hashes(joined))
        case [4, int(id), list(slots)]:
            return Places(id, tuple(_slots(slots, lowest=HELD)))
        case [5, int(id), int(band), str(tenant), list(rows), list(unused), int(size)]:
            if len(rows) > BATCH_MAX or len(unused) > BATCH_MAX:
                raise WireError(f"move: more than {BATCH_MAX} blocks")
            blocks = tuple(map(_block, rows))
            _within(size, BLOCK_BYTES_MAX)
            return Blocks(id, _within(band, 2), tenant, blocks, tuple(_slots(unused)), size)
        case [6, int(id)]:
            return Flush(id)
        case [7, int(id), str(reason)]:
            return Flushed(id, reason)
    raise WireError("move: a message of no known form")


def _block(row: Any) -> Block:
    match row:
        case [bytes(block_hash), bytes(parent), int(depth), int(slot)]:
            if len(block_hash) == len(parent) == HASH_BYTES:
                return Block(block_hash, parent, _within(depth, 1 << 24), _within(slot, SLOTS_MAX))
    raise WireError("move: a block of no known form")


def _hashes(joined: bytes) -> tuple[bytes, ...]:
    count, rest = divmod(len(joined), HASH_BYTES)
    if rest or not 1 <= count <= BATCH_MAX:
        raise WireError(f"move: {len(joined)} bytes are not 1 to {BATCH_MAX} hashes")
    return tuple(joined[at : at + HASH_BYTES] for at in range(0, len(joined), HASH_BYTES))


def _slots(values: list[Any], *, lowest: int = 0) -> list[int]:
    return [_within(value, SLOTS_MAX, lowest) for value in _integers(values, len(values))]


def _integers(values: list[Any], count: int) -> list[int]:
    if len(values) != count or not all(type(value) is int for value in values):
        raise WireError(f"move: expected {count} integers")
    return values


def _within(value: int, most: int, lowest: int = 0) -> int:
    if not lowest <= value <= most:
        raise WireError(f"move: {value} is not from {lowest} to {most}")
    return value
