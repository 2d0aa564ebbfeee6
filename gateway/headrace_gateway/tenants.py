"""Who calls: API key → Tenant, with its share and what the key may use.

An entry is `key`, `key:tenant` or `key:tenant:band+band`, then, after spaces, any of OPTIONS. Of
these `weight`, `prompt_entries` and `sharing_group` are the tenant's, the others the key's.

Invariant: keys are kept as SHA-256 digests and compared in constant time, and no message shows any
part of an entry, which may be a key where it is misspelt. Rejected: a dict lookup by key, whose
time depends on what it holds.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from headrace.errors import AuthError, SettingsError
from headrace.types import Band

VARIABLE = "HEADRACE_API_KEYS"
DEFAULT_TENANT = "default"
ALL_BANDS = frozenset(Band)
KEYS_MAX = 4_096
WEIGHT_MIN, WEIGHT_MAX = 0.01, 1_000.0
LIMIT_MAX = 10**9
LIMITS = ("requests_per_minute", "tokens_per_minute", "concurrency")
FLAGS = ("prompt_entries", "admin")
OPTIONS = ("weight", *LIMITS, *FLAGS, "sharing_group")

_TENANT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_WEIGHT = re.compile(r"[0-9]{1,4}(\.[0-9]{1,6})?")
_LIMIT = re.compile(r"[0-9]{1,10}")
_FLAG = re.compile(r"true|false")
_SALT_DOMAIN = b"headrace-tenant\0"
_GROUP_DOMAIN = b"headrace-sharing-group\0"
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

    Tenants of one sharing group have one salt: they see each other's entries, and can tell by
    timing what the others asked. `weight` is its share beside other tenants. `prompt_entries`: its
    deterministic requests may be answered with what the same request was answered before. `limits`
    and `admin` are those of the key that was used; an admin sees and changes everybody's entries.
    """

    name: str
    salt: bytes
    bands: frozenset[Band] = ALL_BANDS
    weight: float = 1.0
    limits: KeyLimits | None = None
    prompt_entries: bool = False
    admin: bool = False

    def grant(self, asked: Band) -> Band:
        """The Band this tenant gets when it asks for `asked`.

        A band it may not use becomes the best one below it, else its lowest; the response names
        the tier that was used.
        """
        if asked in self.bands:
            return asked
        below = [band for band in self.bands if band > asked]
        return min(below) if below else max(self.bands)


def salt_of(name: str, group: str = "") -> bytes:
    """The salt of a tenant, or of its group: it follows from the name, at every gateway."""
    domain, named = (_GROUP_DOMAIN, group) if group else (_SALT_DOMAIN, name)
    return hashlib.sha256(domain + named.encode()).digest()[:16]


class Tenants:
    """The known keys; without any, everyone is the tenant `default`."""

    def __init__(
        self, keys: Sequence[tuple[bytes, Tenant]] = (), *, prompt_entries: bool = False
    ) -> None:
        self._keys = tuple(keys)
        self._open = Tenant(
            DEFAULT_TENANT, salt_of(DEFAULT_TENANT), prompt_entries=prompt_entries, admin=True
        )

    @property
    def open_to_all(self) -> bool:
        return not self._keys

    @property
    def salts(self) -> dict[str, bytes]:
        """Each tenant's salt, by its name."""
        known = {tenant.name: tenant.salt for _, tenant in self._keys}
        return known or {self._open.name: self._open.salt}

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


def load_tenants(setting: str, *, prompt_entries: bool = False) -> Tenants:
    """`Tenants` from the value of HEADRACE_API_KEYS. Raises SettingsError without naming a key.

    `prompt_entries` is for the tenants whose entries do not say.
    """
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
    weights = _settled(entries, lambda entry: entry.weight, "weight")
    groups = _settled(entries, lambda entry: entry.group, "sharing_group")
    sharing = _settled(entries, lambda entry: entry.prompt_entries, "prompt_entries")
    keys = [
        (
            entry.digest,
            Tenant(
                entry.tenant,
                salt_of(entry.tenant, groups.get(entry.tenant, "")),
                entry.bands,
                weights.get(entry.tenant, 1.0),
                entry.limits,
                sharing.get(entry.tenant, prompt_entries),
                entry.admin,
            ),
        )
        for entry in entries
    ]
    return Tenants(keys, prompt_entries=prompt_entries)


@dataclass(frozen=True, slots=True)
class _Entry:
    where: str
    digest: bytes
    tenant: str
    bands: frozenset[Band]
    limits: KeyLimits | None
    weight: float | None = None
    group: str | None = None
    prompt_entries: bool | None = None
    admin: bool = False


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
    limits = {option: given[option] for option in LIMITS if option in given}
    return _Entry(
        where,
        _digest(key),
        name,
        _parse_bands(band_names, where),
        KeyLimits(_limit_id(key), **limits) if limits else None,
        given.get("weight"),
        given.get("sharing_group"),
        given.get("prompt_entries"),
        given.get("admin", False),
    )


def _limit_id(key: str) -> str:
    return hashlib.sha256(_LIMIT_DOMAIN + key.encode()).hexdigest()[:32]


def _parse_options(options: Sequence[str], where: str) -> dict[str, Any]:
    """Each option's value, of its own type."""
    found: dict[str, Any] = {}
    for option in options:
        name, _, text = option.partition("=")
        if name not in OPTIONS or name in found:
            raise SettingsError(
                f"{VARIABLE}: {where}: after a space come {'=, '.join(OPTIONS)}=, each once at most"
            )
        read, kind = _KINDS[name]
        value = read(text)
        if value is None:
            raise SettingsError(f"{VARIABLE}: {where}: {name} is {kind}")
        found[name] = value
    return found


def _read_weight(text: str) -> float | None:
    found = bool(_WEIGHT.fullmatch(text)) and WEIGHT_MIN <= float(text) <= WEIGHT_MAX
    return float(text) if found else None


def _read_limit(text: str) -> int | None:
    return int(text) if _LIMIT.fullmatch(text) and 1 <= int(text) <= LIMIT_MAX else None


def _read_flag(text: str) -> bool | None:
    return text == "true" if _FLAG.fullmatch(text) else None


def _read_name(text: str) -> str | None:
    return text if _TENANT.fullmatch(text) else None


_KINDS: dict[str, tuple[Callable[[str], Any], str]] = {
    "weight": (_read_weight, f"a number between {WEIGHT_MIN:g} and {WEIGHT_MAX:g}"),
    **dict.fromkeys(LIMITS, (_read_limit, f"a whole number between 1 and {LIMIT_MAX:g}")),
    **dict.fromkeys(FLAGS, (_read_flag, "true or false")),
    "sharing_group": (_read_name, "letters, digits and . _ - only"),
}

V = TypeVar("V", float, str, bool)


def _settled(
    entries: Sequence[_Entry], value_of: Callable[[_Entry], V | None], name: str
) -> dict[str, V]:
    """A tenant's own option: the entries that do not give it take it from those that do."""
    found: dict[str, V] = {}
    for entry in entries:
        value = value_of(entry)
        if value is not None and found.setdefault(entry.tenant, value) != value:
            raise SettingsError(
                f"{VARIABLE}: {entry.where}: this tenant has another {name} in an earlier entry"
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
