"""What cache services tell the fleet, as bytes: that they live, and which blocks they hold.

Invariant: all of it is a hint, whole in itself; a reader that cannot decode one skips it.
"""

from __future__ import annotations

from headrace.errors import WireError
from headrace.types import BLOCK_KEY_BYTES, BlockNews, CacheNode
from headrace.wire import pack, unpack


def encode_node(node: CacheNode) -> bytes:
    return pack([node.address, node.boot, node.budget_bytes, node.used_bytes])


def decode_node(data: bytes) -> CacheNode:
    """Raises WireError."""
    match unpack(data):
        case [str(address), str(boot), int(budget), int(used)] if budget > 0:
            return CacheNode(address, boot, budget, used)
    raise WireError("cache node: not of a known form")


def encode_news(news: BlockNews) -> bytes:
    return pack([news.address, news.boot, news.sequence, news.stored, news.removed])


def decode_news(data: bytes) -> BlockNews:
    """Raises WireError."""
    match unpack(data):
        case [str(address), str(boot), int(sequence), bytes(stored), bytes(removed)]:
            if len(stored) % BLOCK_KEY_BYTES or len(removed) % BLOCK_KEY_BYTES:
                raise WireError(f"block news: keys have {BLOCK_KEY_BYTES} bytes each")
            return BlockNews(address, boot, sequence, stored, removed)
    raise WireError("block news: not of a known form")
