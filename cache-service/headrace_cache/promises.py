"""What tenants were promised, as bytes that outlive the service: quotas and minimums.

Invariant: what is read back is what was written, or WireError: a checksum stands before it.
Rejected: a log of changes, for a few hundred rows that an administrator sets by hand.
"""

from __future__ import annotations

from collections.abc import Mapping

from headrace.cache_admin import QUOTA_BYTES_MAX
from headrace.checksum import checksum
from headrace.errors import WireError
from headrace.frames import TENANT_CHARS_MAX
from headrace.wire import Fields, pack
from headrace_cache.policy.quota import TENANTS_MAX, Share

_MAGIC = b"HRQ1"
_HEAD_BYTES = len(_MAGIC) + 4


def encode_shares(shares: Mapping[str, Share]) -> bytes:
    body = pack(
        {"shares": [[name, each.max_bytes or 0, each.min_bytes] for name, each in shares.items()]}
    )
    return _MAGIC + checksum(body).to_bytes(4, "little") + body


def decode_shares(data: bytes) -> dict[str, Share]:
    """The inverse; nothing of no bytes. Raises WireError for anything else."""
    if not data:
        return {}
    body = data[_HEAD_BYTES:]
    head = _MAGIC + checksum(body).to_bytes(4, "little")
    if data[:_HEAD_BYTES] != head:
        raise WireError("shares: not what was written")
    rows = Fields("shares", body).get("shares", list)
    if len(rows) > TENANTS_MAX:
        raise WireError(f"shares: {len(rows)} exceed {TENANTS_MAX}")
    return dict(map(_share, rows))


def _share(row: object) -> tuple[str, Share]:
    if not isinstance(row, list) or tuple(map(type, row)) != (str, int, int):
        raise WireError("shares: a row is a name and two numbers")
    name, max_bytes, min_bytes = row
    if not 0 < len(name) <= TENANT_CHARS_MAX:
        raise WireError("shares: a tenant's name is out of range")
    if not (0 <= min_bytes <= QUOTA_BYTES_MAX and 0 <= max_bytes <= QUOTA_BYTES_MAX):
        raise WireError("shares: bytes are out of range")
    return name, Share(max_bytes or None, min_bytes)
