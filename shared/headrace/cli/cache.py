"""`headrace cache`: what the cache service holds, as its gateway tells and changes it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from headrace.cli.common import (
    CommandError,
    DataDir,
    RunFile,
    data_dir_of,
    parse_size,
    plain_errors,
)

TIMEOUT_S = 600.0
"""A prompt of a full context takes its time on a small machine."""
PAGE = 1_000
FILE_BYTES_MAX = 64 * 1024 * 1024
ENDPOINTS = {"messages": "chat/completions", "input": "responses", "prompt": "completions"}
"""Which field of a request says where it goes."""

cache = typer.Typer(
    help="List, pin, prewarm and purge what the cache service holds.", no_args_is_help=True
)

Url = Annotated[
    str | None, typer.Option(envvar="HEADRACE_URL", help="Default: that of the running fleet.")
]
ApiKey = Annotated[str | None, typer.Option(envvar="HEADRACE_API_KEY")]
TenantName = Annotated[
    str | None, typer.Option("--tenant", help="Whose entries; others' need a key that administers.")
]
Model = Annotated[str | None, typer.Option(help="Default: the first that is served.")]
Prompt = Annotated[Path | None, typer.Option(help="A file with the text that the entries cover.")]
Hashes = Annotated[list[str] | None, typer.Argument(help="Entries, by hash (see `list`).")]
Kind = Annotated[str | None, typer.Option(help="kv or prompt.")]
Ttl = Annotated[str, typer.Option(help="For how long: 90s, 30m, 12h, 7d.")]
AsJson = Annotated[bool, typer.Option("--json", help="As the gateway says it.")]


class Gateway:
    """The gateway's HTTP API, as far as these commands need it."""

    def __init__(self, url: str | None, api_key: str | None, data_dir: Path | None) -> None:
        if url is None:
            running = RunFile.read(data_dir_of(data_dir))
            url = running.http_url if running else "http://127.0.0.1:8000"
        self.url = url.rstrip("/")
        self._headers = {"content-type": "application/json"}
        if api_key:
            self._headers["authorization"] = f"Bearer {api_key}"

    def ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """The JSON object that comes back. Raises CommandError with the gateway's own words."""
        from http.client import HTTPException
        from urllib.error import HTTPError, URLError
        from urllib.request import Request, urlopen

        data = None if body is None else json.dumps(body).encode()
        request = Request(f"{self.url}{path}", data, self._headers, method=method)
        try:
            with urlopen(request, timeout=TIMEOUT_S) as answer:
                found = json.load(answer)
        except HTTPError as error:
            raise CommandError(_message_in(error.read()) or f"HTTP {error.code}") from error
        except (URLError, HTTPException, OSError, ValueError) as error:
            raise CommandError(
                f"nothing serves at {self.url}: start it with `headrace up`, "
                f"or name another address with --url ({error})"
            ) from error
        if not isinstance(found, dict):
            raise CommandError(f"{self.url} answered something else than JSON")
        return found

    def model(self, given: str | None) -> str:
        """`given`, or the first model that is served."""
        if given is not None:
            return given
        served = self.ask("GET", "/v1/models").get("data", [])
        if not served:
            raise CommandError(f"{self.url} has no model yet: see `headrace status`")
        return str(served[0]["id"])


def _message_in(body: bytes) -> str:
    """The message in OpenAI's error shape, or ''."""
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return ""


def _given(**fields: Any) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}


def _read(path: Path) -> str:
    try:
        if path.stat().st_size > FILE_BYTES_MAX:
            raise CommandError(f"{path} exceeds {FILE_BYTES_MAX} bytes")
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CommandError(f"cannot read {path}: {error}") from error


def _named(
    gateway: Gateway, hashes: list[str] | None, prompt: Path | None, model: str | None
) -> Any:
    """The entries that a command is about, as a request body names them."""
    if bool(hashes) == (prompt is not None):
        raise CommandError("name entries by their hashes, or by --prompt FILE")
    if prompt is None:
        return {"hashes": hashes}
    return {"prompt": _read(prompt), "model": gateway.model(model)}


@cache.command("list")
@plain_errors
def list_entries(
    tenant: TenantName = None,
    kind: Kind = None,
    prefix: Annotated[str | None, typer.Option(help="Only what follows this entry.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="Entries at most.")] = 100,
    as_json: AsJson = False,
    url: Url = None,
    api_key: ApiKey = None,
    data_dir: DataDir = None,
) -> None:
    """Show entries: hash, kind, size, tenant, class, where they lie, how long they are pinned."""
    gateway = Gateway(url, api_key, data_dir)
    asked = _given(tenant=tenant, kind=kind, prefix=prefix)
    found = list(_pages(gateway, asked, limit))
    if as_json:
        print(json.dumps(found, indent=2))
        return
    for entry in found:
        pinned = f"pinned {entry['pinned_ms'] // 1000} s" if entry["pinned_ms"] else ""
        print(
            f"{entry['hash']}  {entry['kind']:6}  {entry['size_bytes']:>10}  {entry['tenant']:16}  "
            f"{entry['band']:11}  {'+'.join(entry['tiers']):8}  {pinned}".rstrip()
        )


def _pages(gateway: Gateway, asked: dict[str, Any], limit: int) -> Iterator[dict[str, Any]]:
    from urllib.parse import urlencode

    cursor, left = 0, limit
    while left > 0:
        query = urlencode(asked | {"limit": min(left, PAGE), "cursor": cursor})
        page = gateway.ask("GET", f"/v1/cache/entries?{query}")
        yield from page["data"]
        left -= len(page["data"])
        cursor = page["next_cursor"] or 0
        if not cursor:
            return


@cache.command()
@plain_errors
def pin(
    hashes: Hashes = None,
    prompt: Prompt = None,
    ttl: Ttl = "30m",
    kind: Kind = None,
    tenant: TenantName = None,
    model: Model = None,
    url: Url = None,
    api_key: ApiKey = None,
    data_dir: DataDir = None,
) -> None:
    """Keep entries for a time, whatever else needs room."""
    gateway = Gateway(url, api_key, data_dir)
    body = _named(gateway, hashes, prompt, model) | _given(ttl=ttl, kind=kind, tenant=tenant)
    done = gateway.ask("POST", "/v1/cache/pin", body)
    print(f"{done['entries']} entries pinned for {ttl}")


@cache.command()
@plain_errors
def unpin(
    hashes: Hashes = None,
    prompt: Prompt = None,
    kind: Kind = None,
    tenant: TenantName = None,
    model: Model = None,
    url: Url = None,
    api_key: ApiKey = None,
    data_dir: DataDir = None,
) -> None:
    """End pins before their time."""
    gateway = Gateway(url, api_key, data_dir)
    body = _named(gateway, hashes, prompt, model) | _given(kind=kind, tenant=tenant)
    done = gateway.ask("POST", "/v1/cache/unpin", body)
    print(f"{done['entries']} entries unpinned")


@cache.command()
@plain_errors
def prewarm(
    file: Annotated[
        Path, typer.Argument(help="A text; or requests: .json, or .jsonl, one a line.")
    ],
    ttl: Annotated[str | None, typer.Option(help="Keep them so long: 90s, 30m, 12h, 7d.")] = None,
    model: Model = None,
    url: Url = None,
    api_key: ApiKey = None,
    data_dir: DataDir = None,
) -> None:
    """Have prompts computed and kept, so that the first request that begins so is fast."""
    gateway = Gateway(url, api_key, data_dir)
    for body in _requests_in(file):
        body = body | {"model": body.get("model") or gateway.model(model)}
        options = _given(prewarm=True, ttl=ttl)
        body["prompt_cache_options"] = (body.get("prompt_cache_options") or {}) | options
        body.pop("stream", None)
        answer = gateway.ask("POST", f"/v1/{_endpoint_of(body, file)}", body)
        usage = answer["usage"]
        tokens = usage.get("prompt_tokens", usage.get("input_tokens"))
        details = usage.get("prompt_tokens_details") or usage.get("input_tokens_details") or {}
        print(f"{tokens} tokens, {details.get('cached_tokens', 0)} of them were there already")


def _requests_in(file: Path) -> list[dict[str, Any]]:
    """The requests in a file; a text is one prompt."""
    text = _read(file)
    if file.suffix not in (".json", ".jsonl"):
        return [{"prompt": text}]
    whole = [(1, text)] if file.suffix == ".json" else list(enumerate(text.splitlines(), 1))
    found = []
    for at, piece in whole:
        if not piece.strip():
            continue
        try:
            body = json.loads(piece)
        except ValueError as error:
            raise CommandError(f"{file} line {at}: {error}") from error
        if not isinstance(body, dict):
            raise CommandError(f"{file} line {at}: a request is a JSON object")
        found.append(body)
    return found


def _endpoint_of(body: dict[str, Any], file: Path) -> str:
    for field, endpoint in ENDPOINTS.items():
        if field in body:
            return endpoint
    raise CommandError(f"{file}: a request has one of {', '.join(ENDPOINTS)}")


@cache.command()
@plain_errors
def purge(
    tenant: TenantName = None,
    prefix: Annotated[str | None, typer.Option(help="An entry and all that follows it.")] = None,
    prompt: Prompt = None,
    model: Annotated[str | None, typer.Option(help="Only this model's entries.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="Whatever this key may see.")] = False,
    url: Url = None,
    api_key: ApiKey = None,
    data_dir: DataDir = None,
) -> None:
    """Drop entries, in memory and on disk; what is asked again is computed again."""
    gateway = Gateway(url, api_key, data_dir)
    body = _given(tenant=tenant, prefix=prefix, model=model)
    if prompt is not None:
        body |= {"prompt": _read(prompt), "model": gateway.model(model)}
    if not body and not everything:
        raise CommandError("name a tenant, a prefix, a prompt or a model, or say --all")
    done = gateway.ask("POST", "/v1/cache/purge", body | _given(all=everything or None))
    print(f"{done['entries']} entries dropped, {done['size_bytes']} bytes")


@cache.command()
@plain_errors
def quota(
    tenant: Annotated[str, typer.Argument(help="Whose.")],
    most: Annotated[str, typer.Option("--max", help="Size at most, like 512M; 0: no limit.")],
    least: Annotated[str, typer.Option("--min", help="What others cannot take from it.")] = "0",
    url: Url = None,
    api_key: ApiKey = None,
    data_dir: DataDir = None,
) -> None:
    """Set how much of the cache a tenant may take, and is left with when others need room."""
    gateway = Gateway(url, api_key, data_dir)
    max_bytes, min_bytes = parse_size(most), parse_size(least)
    body = {"tenant": tenant, "max_bytes": max_bytes, "min_bytes": min_bytes}
    gateway.ask("PUT", "/v1/cache/quota", body)
    print(f"{tenant}: at most {max_bytes or 'any number of'} bytes, at least {min_bytes}")


@cache.command()
@plain_errors
def stats(
    tenant: TenantName = None,
    url: Url = None,
    api_key: ApiKey = None,
    data_dir: DataDir = None,
) -> None:
    """Print the counters, as JSON."""
    from urllib.parse import urlencode

    query = urlencode(_given(tenant=tenant))
    found = Gateway(url, api_key, data_dir).ask("GET", f"/v1/cache?{query}")
    print(json.dumps(found, indent=2))
