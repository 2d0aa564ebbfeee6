"""Chained block hashes: how caches and routing name a prefix.

Invariant: a block's hash covers everything before it, the model and the tenant's salt, so equal
hashes mean equal KV that this tenant may see. 27 bytes of SHA-256, since a collision would serve
somebody else's text; where a mistake only costs time, as in routing, 64 bits do.

The last five bytes say where a block stands: which group of GROUP_BLOCKS consecutive ones it
belongs to, named by four bytes of the first one's hash, and its place there. So whoever has any
part of a chain knows its groups, which is how several cache services share it
(policy/cache_nodes.py). Rejected: passing each group's first hash along, which a pool that evicts
block by block does not have.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence

from headrace.types import BLOCK_TOKENS

HASH_BYTES = 32
GROUP_BLOCKS = 64
GROUP_BYTES = 4
_OWN_BYTES = HASH_BYTES - GROUP_BYTES - 1
_RAW_BYTES = BLOCK_TOKENS * array("I").itemsize
_PLACES = tuple(bytes((place,)) for place in range(GROUP_BLOCKS))

LAYOUT_BYTES = 8
MODEL_TAG_BYTES = 4
"""How much of a layout's hash names the model alone, so that a model's entries can be found."""


def root_hash(fingerprint: str, salt: bytes) -> bytes:
    """The parent of every first block of one model for one tenant."""
    digest = hashlib.sha256(b"headrace-root\0" + fingerprint.encode() + b"\0" + salt).digest()
    return digest[:-1] + bytes((GROUP_BLOCKS - 1,))  # the first block begins a group


def next_hash(parent: bytes, tokens: Sequence[int]) -> bytes:
    """The hash of the block of `tokens` (exactly BLOCK_TOKENS of them) that follows `parent`."""
    assert len(tokens) == BLOCK_TOKENS, "only full blocks have a hash"
    [found] = block_hashes(parent, tokens)
    return found


def group_of(block_hash: bytes) -> bytes:
    """The name of a block's group, GROUP_BYTES long. Any 32 bytes have one."""
    return block_hash[_OWN_BYTES:-1]


def place_of(block_hash: bytes) -> int:
    """A block's place in its group, 0 for the first."""
    return block_hash[-1]


def block_hashes(root: bytes, tokens: Sequence[int], limit: int | None = None) -> list[bytes]:
    """Hashes of the full blocks of `tokens`, at most `limit` of them, that follow `root`."""
    full = len(tokens) // BLOCK_TOKENS
    if limit is not None:
        full = min(full, limit)
    raw = array("I", tokens[: full * BLOCK_TOKENS]).tobytes()
    hashes: list[bytes] = []
    sha256, parent, place = hashlib.sha256, root, root[-1]
    group = parent[_OWN_BYTES:-1]
    for at in range(0, len(raw), _RAW_BYTES):
        digest = sha256(parent + raw[at : at + _RAW_BYTES]).digest()
        place = (place + 1) % GROUP_BLOCKS
        if not place:
            group = digest[_OWN_BYTES:-1]
        parent = digest[:_OWN_BYTES] + group + _PLACES[place]
        hashes.append(parent)
    return hashes


def model_tag(fingerprint: str) -> bytes:
    """The MODEL_TAG_BYTES that all layouts of one model begin with."""
    return hashlib.sha256(b"headrace-model\0" + fingerprint.encode()).digest()[:MODEL_TAG_BYTES]


def layout_hash(fingerprint: str, *facts: str | int) -> bytes:
    """Names how one model's entries are arranged; `facts` are dtype, block size, shard and so on.

    LAYOUT_BYTES long. It guards against mistakes, not against an enemy: keys do that.
    """
    told = "\0".join((fingerprint, *map(str, facts))).encode()
    rest = hashlib.sha256(b"headrace-layout\0" + told).digest()
    return model_tag(fingerprint) + rest[: LAYOUT_BYTES - MODEL_TAG_BYTES]


def hash64(data: bytes) -> int:
    """64 even bits of `data`, the same in every process: what rendezvous hashing mixes."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest())
