"""/v1/cache…: what the cache service holds, for whom, and for how long.

Invariant: a key that does not administer reads and changes its own tenant's entries only, whatever
it asks for; names of prompts are made with the salt of the tenant that is asked for, so that nobody
can point at another one's.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar

from aiohttp import web
from pydantic import BaseModel, Field, StringConstraints

from headrace import cache_admin
from headrace.cache_admin import (
    CURSOR_MAX,
    IN_RAM,
    LIST_MAX,
    ON_DISK,
    QUOTA_BYTES_MAX,
    Changed,
    EntryInfo,
    Listed,
    ListEntries,
    Pin,
    Purge,
    ReadStats,
    Refused,
    SetQuota,
    Told,
    Unpin,
)
from headrace.errors import CallerError, DependencyError, WireError
from headrace.frames import KEYS_MAX, KV, EntryKey
from headrace.policy.hashing import block_hashes, model_tag, root_hash
from headrace.types import BLOCK_TOKENS, ModelRecord
from headrace_gateway.api.caching import Ttl, ttl_ms
from headrace_gateway.api.context import GATEWAY, TENANT, Gateway
from headrace_gateway.api.messages import Message, chat_conversation
from headrace_gateway.api.requests import read_object
from headrace_gateway.api.schemas import MESSAGES_MAX, ModelName
from headrace_gateway.api.validation import STRICT, bad_value, missing, validate
from headrace_gateway.tenants import Tenant, salt_of

Json = dict[str, Any]
RETRY_MS = 1_000

Hash = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
TenantName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
Kind = Literal["kv", "prompt"]
Size = Annotated[int, Field(ge=0, le=QUOTA_BYTES_MAX)]
_DIGITS = Annotated[str, StringConstraints(pattern=r"^[0-9]{1,13}$")]

A = TypeVar("A", Listed, Changed, Told)


class Named(BaseModel):
    """Entries by their hashes, or by a prompt that `model` would have to compute."""

    model_config = STRICT

    tenant: TenantName | None = None
    hashes: Annotated[list[Hash], Field(min_length=1, max_length=KEYS_MAX)] | None = None
    kind: Kind = "kv"
    model: ModelName | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], Field(min_length=1, max_length=MESSAGES_MAX)] | None = None


class PinBody(Named):
    ttl: Ttl


class PurgeBody(BaseModel):
    """All conditions that are given have to be met; `all` says that there are none."""

    model_config = STRICT

    tenant: TenantName | None = None
    prefix: Hash | None = None
    model: ModelName | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], Field(min_length=1, max_length=MESSAGES_MAX)] | None = None
    all: bool = False


class QuotaBody(BaseModel):
    model_config = STRICT

    tenant: TenantName
    max_bytes: Size
    min_bytes: Size = 0


class ListQuery(BaseModel):
    model_config = STRICT

    tenant: TenantName | None = None
    kind: Kind | None = None
    prefix: Hash | None = None
    limit: _DIGITS = "100"
    cursor: _DIGITS = "0"


async def stats(request: web.Request) -> web.Response:
    """Counters: all of them for administrators, else the tenant's own."""
    scope = _scope(request[TENANT], validate(ListQuery, request.query).tenant)
    told = await _manage(request.app[GATEWAY], ReadStats(scope), Told)
    return web.json_response({"object": "cache.stats", "tenant": scope, **told.values})


async def entries(request: web.Request) -> web.Response:
    """A page of entries."""
    query = validate(ListQuery, request.query)
    asked = ListEntries(
        _scope(request[TENANT], query.tenant),
        query.kind,
        bytes.fromhex(query.prefix or ""),
        _within("limit", query.limit, 1, LIST_MAX),
        _within("cursor", query.cursor, 0, CURSOR_MAX),
    )
    found = await _manage(request.app[GATEWAY], asked, Listed)
    rows = [_told(entry) for entry in found.entries]
    return web.json_response({"object": "list", "data": rows, "next_cursor": found.cursor or None})


async def pin(request: web.Request) -> web.Response:
    """Keep entries for a time, as far as pins may go."""
    body = validate(PinBody, await read_object(request))
    return await _change(request, body, lambda keys, scope: Pin(keys, ttl_ms(body.ttl), scope))


async def unpin(request: web.Request) -> web.Response:
    body = validate(Named, await read_object(request))
    return await _change(request, body, Unpin)


async def purge(request: web.Request) -> web.Response:
    """Drop entries of a tenant, of a model, or those that begin with a prompt."""
    gateway, body = request.app[GATEWAY], validate(PurgeBody, await read_object(request))
    scope = _scope(request[TENANT], body.tenant)
    prefix, model = bytes.fromhex(body.prefix or ""), b""
    if body.prompt is not None or body.messages is not None:
        if prefix:
            raise bad_value("prefix", "give a hash or a prompt, not both")
        prefix = (await _hashes_of(gateway, request[TENANT], body, scope))[-1]
    elif body.model is not None:
        model = model_tag(gateway.fleet.model(body.model).fingerprint)
    if not (body.all or prefix or model or body.tenant):
        raise missing("all")
    return _changed(await _manage(gateway, Purge(scope, prefix, model), Changed))


async def quota(request: web.Request) -> web.Response:
    """What a tenant may hold at most, and is left with at least. For administrators."""
    body = validate(QuotaBody, await read_object(request))
    if not request[TENANT].admin:
        raise _not_admin("quotas are set with a key that administers")
    if body.max_bytes and body.min_bytes > body.max_bytes:
        raise bad_value("min_bytes", f"exceeds max_bytes={body.max_bytes}")
    asked = SetQuota(body.tenant, body.max_bytes, body.min_bytes)
    return _changed(await _manage(request.app[GATEWAY], asked, Changed))


async def _change(request: web.Request, body: Named, build: Any) -> web.Response:
    """Ask for a change of the entries that `body` names, KEYS_MAX at a time."""
    gateway = request.app[GATEWAY]
    scope = _scope(request[TENANT], body.tenant)
    hashes = [bytes.fromhex(each) for each in body.hashes or ()]
    if body.prompt is not None or body.messages is not None:
        if hashes:
            raise bad_value("hashes", "give hashes or a prompt, not both")
        hashes = await _hashes_of(gateway, request[TENANT], body, scope)
    if not hashes:
        raise missing("hashes")
    kind = KV if body.hashes is None else body.kind
    count = 0
    for start in range(0, len(hashes), KEYS_MAX):
        keys = tuple(EntryKey(kind, each) for each in hashes[start : start + KEYS_MAX])
        count += (await _manage(gateway, build(keys, scope), Changed)).entries
    return _changed(Changed(count))


async def _hashes_of(
    gateway: Gateway, caller: Tenant, body: Named | PurgeBody, scope: str | None
) -> list[bytes]:
    """Names of the full blocks that a prompt begins with. Raises CallerError if there are none."""
    if body.model is None:
        raise missing("model")
    record = gateway.fleet.model(body.model)
    prompt = await _tokens_of(gateway, record, body)
    param = "prompt" if body.messages is None else "messages"
    if len(prompt) < BLOCK_TOKENS:
        raise bad_value(param, f"{len(prompt)} tokens make no block of {BLOCK_TOKENS}")
    if len(prompt) > record.context_tokens:
        raise bad_value(param, f"{len(prompt)} tokens exceed the context of the model")
    salt = caller.salt
    if scope is not None and scope != caller.name:
        salt = gateway.tenants.salts.get(scope, salt_of(scope))
    return block_hashes(root_hash(record.fingerprint, salt), prompt)


async def _tokens_of(gateway: Gateway, record: ModelRecord, body: Named | PurgeBody) -> array[int]:
    tokenizer = await gateway.tokenizers.get(record)
    if body.messages is None:
        return await tokenizer.encode(body.prompt or "", add_bos=True)
    messages, _ = chat_conversation(body.messages)
    text = gateway.templates.render(record, messages, add_generation_prompt=False)
    return await tokenizer.encode(text, add_bos=False)


def _scope(caller: Tenant, asked: str | None) -> str | None:
    """Whose entries are meant; None for everybody's. Raises CallerError (403)."""
    if caller.admin:
        return asked
    if asked not in (None, caller.name):
        raise _not_admin("this key sees and changes its own tenant's entries only")
    return caller.name


def _not_admin(message: str) -> CallerError:
    return CallerError(message, status=403, code="not_an_administrator", param="tenant")


async def _manage(gateway: Gateway, asked: cache_admin.Request, expected: type[A]) -> A:
    """The cache service's answer. Raises DependencyError, and CallerError for what it refuses."""
    if gateway.cache is None:
        raise DependencyError("this gateway has no cache service", code="no_cache_service")
    values = await gateway.cache.manage(cache_admin.encode(asked))
    if values is None:
        raise DependencyError("the cache service does not answer", retry_after_ms=RETRY_MS)
    try:
        answer = cache_admin.decode_answer(values)
    except WireError as error:
        raise DependencyError(f"the cache service is not understood: {error.message}") from error
    if isinstance(answer, Refused):
        raise CallerError(answer.message, status=409, code="cache_refused")
    if not isinstance(answer, expected):
        raise DependencyError("the cache service answered something else")
    return answer


def _within(param: str, text: str, low: int, high: int) -> int:
    if not low <= int(text) <= high:
        raise bad_value(param, f"between {low} and {high}")
    return int(text)


def _changed(change: Changed) -> web.Response:
    body: Json = {
        "object": "cache.change",
        "entries": change.entries,
        "size_bytes": change.size_bytes,
    }
    return web.json_response(body)


def _told(entry: EntryInfo) -> Json:
    tiers: Sequence[tuple[int, str]] = ((IN_RAM, "ram"), (ON_DISK, "disk"))
    return {
        "object": "cache.entry",
        "hash": entry.key.hash.hex(),
        "kind": entry.key.kind,
        "parent": entry.parent.hex() or None,
        "depth": entry.depth,
        "size_bytes": entry.size_bytes,
        "tenant": entry.tenant,
        "band": entry.band.label,
        "tiers": [name for bit, name in tiers if entry.tiers & bit],
        "pinned_ms": entry.pin_ms,
        "layout": entry.layout.hex(),
    }


ROUTES: Mapping[tuple[str, str], Any] = {
    ("GET", "/v1/cache"): stats,
    ("GET", "/v1/cache/entries"): entries,
    ("POST", "/v1/cache/pin"): pin,
    ("POST", "/v1/cache/unpin"): unpin,
    ("POST", "/v1/cache/purge"): purge,
    ("PUT", "/v1/cache/quota"): quota,
}
