"""Reads request traces: Mooncake's JSON lines and Azure's CSV.

Invariant: a trace is requests in order of time, the first at 0 ms, each with at least one token in
and out; a line that says anything else is an error that names file and line, never a guess.
`blocks` are ids of prefix blocks of `block_tokens` each: two prompts that begin with the same ids
begin with the same tokens. Azure's has none, so its prompts share nothing.
Formats: kvcache-ai/Mooncake FAST25-release/traces; Azure/AzurePublicDataset LLM inference traces.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from itertools import islice
from pathlib import Path
from typing import Any

from headrace.errors import HeadraceError

MOONCAKE_BLOCK_TOKENS = 512
TOKENS_MAX = 100_000_000
"""A request that claims more tokens than this is a mistake in the file."""
LINE_CHARACTERS_MAX = 10_000_000
AZURE_COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")


class TraceError(HeadraceError):
    """A trace that cannot be read; names file, line and what is wrong."""

    code = "bad_trace"


@dataclass(frozen=True, slots=True)
class TraceRequest:
    """One line. `at_ms` counts from the first request; `blocks` may cover only a part."""

    at_ms: float
    input_tokens: int
    output_tokens: int
    blocks: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Trace:
    """`requests` in order of time; `block_tokens` is the size of their `blocks`."""

    name: str
    block_tokens: int
    requests: tuple[TraceRequest, ...]

    @property
    def span_ms(self) -> float:
        """From the first request to one mean gap after the last."""
        last = self.requests[-1].at_ms
        return last + max(1.0, last / max(1, len(self.requests) - 1))


def read_trace(path: Path, limit: int | None = None) -> Trace:
    """The first `limit` requests of the trace in `path`.

    The format shows in its first character: `{`, or a CSV's header. Raises TraceError.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            is_json = file.read(1) == "{"
            file.seek(0)
            lines = _bounded(path, file)
            read = _mooncake(path, lines) if is_json else _azure(path, lines)
            requests = list(islice(read, limit))
    except (OSError, UnicodeDecodeError) as error:
        raise TraceError(f"{path}: cannot be read: {error}") from error
    if not requests:
        raise TraceError(f"{path}: holds no requests")
    requests.sort(key=lambda r: r.at_ms)
    start = requests[0].at_ms
    moved = (TraceRequest(r.at_ms - start, r.input_tokens, r.output_tokens, r.blocks)
             for r in requests)  # fmt: skip
    return Trace(path.stem, MOONCAKE_BLOCK_TOKENS, tuple(moved))


def _bounded(path: Path, file: Any) -> Iterator[str]:
    """Lines of a sane length."""
    number = 0
    while line := file.readline(LINE_CHARACTERS_MAX + 1):
        number += 1
        if len(line) > LINE_CHARACTERS_MAX:
            raise TraceError(f"{path}:{number}: longer than {LINE_CHARACTERS_MAX} characters")
        yield line


def _mooncake(path: Path, lines: Iterator[str]) -> Iterator[TraceRequest]:
    for number, line in enumerate(lines, 1):
        where = f"{path}:{number}"
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise TraceError(f"{where}: not JSON: {error}") from error
        if not isinstance(row, dict):
            raise TraceError(f"{where}: expected an object, got {type(row).__name__}")
        at_ms = row.get("timestamp")
        if not isinstance(at_ms, int | float) or isinstance(at_ms, bool) or not 0 <= at_ms < 1e15:
            raise TraceError(f"{where}: timestamp has to be milliseconds, not {at_ms!r}")
        input_tokens = _tokens(where, "input_length", row.get("input_length"))
        output_tokens = _tokens(where, "output_length", row.get("output_length"))
        blocks = row.get("hash_ids", [])
        if not isinstance(blocks, list) or not all(type(b) is int and b >= 0 for b in blocks):
            raise TraceError(f"{where}: hash_ids has to be a list of whole numbers")
        if len(blocks) > -(-input_tokens // MOONCAKE_BLOCK_TOKENS):
            raise TraceError(
                f"{where}: {len(blocks)} hash_ids are more than {input_tokens} tokens have blocks"
            )
        yield TraceRequest(float(at_ms), input_tokens, output_tokens, tuple(blocks))


def _azure(path: Path, lines: Iterator[str]) -> Iterator[TraceRequest]:
    rows = csv.reader(lines)
    try:
        header = [name.strip() for name in next(rows, [])]
        for name in AZURE_COLUMNS:
            if name not in header:
                raise TraceError(
                    f"{path}: neither JSON lines nor a CSV with the column {name}: {header[:5]}"
                )
        columns = [header.index(name) for name in AZURE_COLUMNS]
        for row in rows:
            where = f"{path}:{rows.line_num}"
            if not row:
                continue
            if len(row) <= max(columns):
                raise TraceError(f"{where}: has {len(row)} columns, {len(header)} are expected")
            time, given, made = (row[index].strip() for index in columns)
            yield TraceRequest(
                _instant_ms(where, time),
                _tokens(where, "ContextTokens", given),
                _tokens(where, "GeneratedTokens", made),
            )
    except csv.Error as error:
        raise TraceError(f"{path}: not CSV: {error}") from error


def _instant_ms(where: str, text: str) -> float:
    try:
        instant = datetime.fromisoformat(text)
        # days and seconds by hand: `timestamp()` would ask for this machine's time zone
        offset = instant.utcoffset()
        seconds = instant.toordinal() * 86_400 + instant.hour * 3600 + instant.minute * 60
        seconds += instant.second - (int(offset.total_seconds()) if offset else 0)
    except ValueError as error:
        raise TraceError(f"{where}: TIMESTAMP is no date and time: {text[:60]!r}") from error
    return seconds * 1000 + instant.microsecond / 1000


def _tokens(where: str, name: str, value: object) -> int:
    """At least 1: an empty prompt still has its first token, an empty answer its end."""
    if isinstance(value, str) and len(value) <= 12 and value.isascii() and value.isdigit():
        value = int(value)
    if type(value) is not int or not 0 <= value <= TOKENS_MAX:
        raise TraceError(f"{where}: {name} has to be a number of tokens, not {str(value)[:60]!r}")
    return max(1, value)
