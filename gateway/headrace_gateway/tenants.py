"""Who calls: API key → Tenant.

Invariant: keys are kept as SHA-256 digests and compared in constant time, and no message names one.
Rejected: a dict lookup by key, whose time depends on what it holds.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from headrace.errors import AuthError, SettingsError
from headrace.types import Band

VARIABLE = "HEADRACE_API_KEYS"
DEFAULT_TENANT = "default"
ALL_BANDS = frozenset(Band)
KEYS_MAX = 4_096

_TENANT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_SALT_DOMAIN = b"headrace-tenant\0"


@dataclass(frozen=True, slots=True)
class Tenant:
    """Who pays. `salt` separates this tenant's entries in every cache."""

    name: str
    salt: bytes
    bands: frozenset[Band] = ALL_BANDS

    def grant(self, asked: Band) -> Band:
        """The Band this tenant gets when it asks for `asked`.

        A band it may not use becomes the best one below it, else its lowest; the response names
        the tier that was used.
        """
        if asked in self.bands:
            return asked
        below = [band for band in self.bands if band > asked]
        return min(below) if below else max(self.bands)


def make_tenant(name: str, bands: frozenset[Band] = ALL_BANDS) -> Tenant:
    """A Tenant whose salt follows from its name, so that every gateway has the same."""
    return Tenant(name, hashlib.sha256(_SALT_DOMAIN + name.encode()).digest()[:16], bands)


class Tenants:
    """The known keys; without any, everyone is the tenant `default`."""

    def __init__(self, keys: Sequence[tuple[bytes, Tenant]] = ()) -> None:
        self._keys = tuple(keys)
        self._open = make_tenant(DEFAULT_TENANT)

    @property
    def open_to_all(self) -> bool:
        return not self._keys

    def identify(self, authorization: str | None) -> Tenant:
        """The Tenant that an `Authorization` header names. Raises AuthError (401)."""
        if self.open_to_all:
            return self._open
        scheme, _, key = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not key.strip():
            raise AuthError(
                "an API key is needed: send it as `Authorization: Bearer KEY`",
                code="missing_api_key",
            )
        digest = _digest(key.strip())
        found: Tenant | None = None
        for known, tenant in self._keys:
            if hmac.compare_digest(known, digest):
                found = tenant
        if found is None:
            raise AuthError("the API key is not known here")
        return found


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def load_tenants(setting: str) -> Tenants:
    """`Tenants` from the value of HEADRACE_API_KEYS. Raises SettingsError without naming a key."""
    text = setting.strip()
    if text.startswith("@"):
        lines = _read_lines(Path(text[1:]).expanduser())
        where = f"{text[1:]} line"
    else:
        lines = [(at, part) for at, part in enumerate(text.split(","), 1) if part.strip()]
        where = "entry"
    if len(lines) > KEYS_MAX:
        raise SettingsError(f"{VARIABLE}: {len(lines)} keys exceed {KEYS_MAX}")
    if text and not lines:
        raise SettingsError(f"{VARIABLE}: names no key; leave it empty to let everyone in")
    parsed = [_parse(part.strip(), f"{where} {at}") for at, part in lines]
    if len({digest for digest, _ in parsed}) != len(parsed):
        raise SettingsError(f"{VARIABLE}: a key stands there twice")
    return Tenants(parsed)


def _read_lines(path: Path) -> list[tuple[int, str]]:
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"{VARIABLE}: cannot read {path}: {error}") from error
    lines = enumerate(text.splitlines(), 1)
    return [(at, line) for at, line in lines if line.strip() and not line.strip().startswith("#")]


def _parse(entry: str, where: str) -> tuple[bytes, Tenant]:
    key, _, rest = entry.partition(":")
    name, _, band_names = rest.partition(":")
    name = name or DEFAULT_TENANT
    if not key or not key.isascii() or not key.isprintable() or " " in key:
        raise SettingsError(f"{VARIABLE}: {where}: a key is printable ASCII without spaces")
    if not _TENANT.fullmatch(name):
        raise SettingsError(
            f"{VARIABLE}: {where}: a tenant's name is letters, digits and . _ - only"
        )
    return _digest(key), make_tenant(name, _parse_bands(band_names, where))


def _parse_bands(names: str, where: str) -> frozenset[Band]:
    if not names:
        return ALL_BANDS
    known = {band.label: band for band in Band}
    parts = names.split("+")
    if any(part not in known for part in parts):
        raise SettingsError(f"{VARIABLE}: {where}: bands are {', '.join(known)}, joined by +")
    return frozenset(known[part] for part in parts)
