"""Who calls: API key → Tenant, with its share and what the key may use.

An entry is `key`, `key:tenant` or `key:tenant:band+band`, then, after spaces, any of OPTIONS.

Invariant: keys are kept as SHA-256 digests and compared in constant time, and no message shows any
part of an entry, which may be a key where it is misspelt. Rejected: a dict lookup by key, whose
time depends on what it holds.
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
WEIGHT_MIN, WEIGHT_MAX = 0.01, 1_000.0
LIMIT_MAX = 10**9
LIMITS = ("requests_per_minute", "tokens_per_minute", "concurrency")
OPTIONS = ("weight", *LIMITS)

_TENANT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_WEIGHT = re.compile(r"[0-9]{1,4}(\.[0-9]{1,6})?")
_LIMIT = re.compile(r"[0-9]{1,10}")
_SALT_DOMAIN = b"headrace-tenant\0"
_LIMIT_DOMAIN = b"headrace-limit\0"


@dataclass(frozen=True, slots=True)
class KeyLimits:
    """What one key may use, whatever gateway it is used at; 0 is no limit.

    `id` names the key in Redis and tells nothing about it. Tokens are those of prompt and output.
    """

    id: str
    requests_per_minute: int = 0
    tokens_per_minute: int = 0
    concurrency: int = 0


@dataclass(frozen=True, slots=True)
class Tenant:
    """Who pays. `salt` separates this tenant's entries in every cache.

    `weight` is its share beside other tenants. `limits` are those of the key that was used.
    """

    name: str
    salt: bytes
    bands: frozenset[Band] = ALL_BANDS
    weight: float = 1.0
    limits: KeyLimits | None = None

    def grant(self, asked: Band) -> Band:
        """The Band this tenant gets when it asks for `asked`.

        A band it may not use becomes the best one below it, else its lowest; the response names
        the tier that was used.
        """
        if asked in self.bands:
            return asked
        below = [band for band in self.bands if band > asked]
        return min(below) if below else max(self.bands)


def make_tenant(
    name: str,
    bands: frozenset[Band] = ALL_BANDS,
    weight: float = 1.0,
    limits: KeyLimits | None = None,
) -> Tenant:
    """A Tenant whose salt follows from its name, so that every gateway has the same."""
    salt = hashlib.sha256(_SALT_DOMAIN + name.encode()).digest()[:16]
    return Tenant(name, salt, bands, weight, limits)


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
    entries = [_parse(part.strip(), f"{where} {at}") for at, part in lines]
    if len({entry.digest for entry in entries}) != len(entries):
        raise SettingsError(f"{VARIABLE}: a key stands there twice")
    weights = _weights(entries)
    return Tenants(
        [
            (e.digest, make_tenant(e.tenant, e.bands, weights.get(e.tenant, 1.0), e.limits))
            for e in entries
        ]
    )


@dataclass(frozen=True, slots=True)
class _Entry:
    where: str
    digest: bytes
    tenant: str
    bands: frozenset[Band]
    weight: float | None
    limits: KeyLimits | None


def _read_lines(path: Path) -> list[tuple[int, str]]:
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"{VARIABLE}: cannot read {path}: {error}") from error
    lines = enumerate(text.splitlines(), 1)
    return [(at, line) for at, line in lines if line.strip() and not line.strip().startswith("#")]


def _parse(entry: str, where: str) -> _Entry:
    head, *options = entry.split()
    key, _, rest = head.partition(":")
    name, _, band_names = rest.partition(":")
    name = name or DEFAULT_TENANT
    if not key or not key.isascii() or not key.isprintable():
        raise SettingsError(f"{VARIABLE}: {where}: a key is printable ASCII without spaces")
    if not _TENANT.fullmatch(name):
        raise SettingsError(
            f"{VARIABLE}: {where}: a tenant's name is letters, digits and . _ - only"
        )
    given = _parse_options(options, where)
    weight = given.pop("weight", None)
    limits = {option: int(value) for option, value in given.items()}
    return _Entry(
        where,
        _digest(key),
        name,
        _parse_bands(band_names, where),
        weight,
        KeyLimits(_limit_id(key), **limits) if limits else None,
    )


def _limit_id(key: str) -> str:
    return hashlib.sha256(_LIMIT_DOMAIN + key.encode()).hexdigest()[:32]


def _parse_options(options: Sequence[str], where: str) -> dict[str, float]:
    found: dict[str, float] = {}
    for option in options:
        name, _, text = option.partition("=")
        if name not in OPTIONS or name in found:
            raise SettingsError(
                f"{VARIABLE}: {where}: after a space come {'=, '.join(OPTIONS)}=, each once at most"
            )
        is_weight = name == "weight"
        low, high = (WEIGHT_MIN, WEIGHT_MAX) if is_weight else (1, LIMIT_MAX)
        if not (_WEIGHT if is_weight else _LIMIT).fullmatch(text) or not low <= float(text) <= high:
            kind = "a number" if is_weight else "a whole number"
            raise SettingsError(
                f"{VARIABLE}: {where}: {name} is {kind} between {low:g} and {high:g}"
            )
        found[name] = float(text)
    return found


def _weights(entries: Sequence[_Entry]) -> dict[str, float]:
    """Each tenant's weight; the entries that give none take it from those that do."""
    found: dict[str, float] = {}
    for entry in entries:
        if entry.weight is None:
            continue
        if found.setdefault(entry.tenant, entry.weight) != entry.weight:
            raise SettingsError(
                f"{VARIABLE}: {entry.where}: this tenant has another weight in an earlier entry"
            )
    return found


def _parse_bands(names: str, where: str) -> frozenset[Band]:
    if not names:
        return ALL_BANDS
    known = {band.label: band for band in Band}
    parts = names.split("+")
    if any(part not in known for part in parts):
        raise SettingsError(f"{VARIABLE}: {where}: bands are {', '.join(known)}, joined by +")
    return frozenset(known[part] for part in parts)
