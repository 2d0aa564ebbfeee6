"""The bytes between services: msgpack maps with short keys, decoded under limits.

Invariant: decoding runs no code. Extension types are refused, sizes and depths are bounded, and
every field is checked before a value is built; what does not fit raises WireError and names the
field. Rejected: pickle (remote code), and msgspec structs (faster, but `msgpack` is the agreed
package and at 50 µs a job the codec is not what costs).
"""

from __future__ import annotations

import struct
import sys
import zlib
from array import array
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import msgpack

from headrace.errors import WireError
from headrace.types import (
    Band,
    CacheMode,
    Delta,
    Finish,
    FinishReason,
    Job,
    ModelRecord,
    Sampling,
    TokenLogprobs,
    WorkerRecord,
    WorkerRole,
)

MESSAGE_BYTES_MAX = 32 * 1024 * 1024
STRING_BYTES_MAX = 16 * 1024 * 1024
ITEMS_MAX = 65_536
TOKENIZER_BYTES_MAX = 128 * 1024 * 1024
"""A tokenizer's JSON, which travels compressed: Gemma's 262,144 tokens make about 33 MB."""

T = TypeVar("T")


def pack(value: Any) -> bytes:
    """`value` (maps, lists, str, bytes, numbers, None) as msgpack."""
    packed: bytes = msgpack.packb(value, use_bin_type=True)
    return packed


def _refuse_ext(code: int, data: bytes) -> None:
    raise WireError(f"msgpack extension type {code} is not allowed ({len(data)} bytes)")


def unpack(data: bytes) -> Any:
    """The inverse of `pack`. Raises WireError for anything malformed or beyond the limits."""
    if len(data) > MESSAGE_BYTES_MAX:
        raise WireError(f"message of {len(data)} bytes exceeds {MESSAGE_BYTES_MAX}")
    try:
        return msgpack.unpackb(
            data,
            raw=False,
            strict_map_key=True,
            ext_hook=_refuse_ext,
            max_str_len=STRING_BYTES_MAX,
            max_bin_len=STRING_BYTES_MAX,
            max_array_len=ITEMS_MAX,
            max_map_len=ITEMS_MAX,
            max_ext_len=0,
        )
    except WireError:
        raise
    except (ValueError, TypeError, RecursionError, msgpack.exceptions.UnpackException) as error:
        raise WireError(f"not valid msgpack: {error}") from error


class Fields:
    """Typed access to a decoded map; every failure names the message and the field."""

    def __init__(self, what: str, data: bytes | Any) -> None:
        value = unpack(data) if isinstance(data, bytes) else data
        if not isinstance(value, dict):
            raise WireError(f"{what}: expected a map, got {type(value).__name__}")
        self._what = what
        self._map = value

    def get(self, key: str, kind: type[T]) -> T:
        value = self._map.get(key)
        # bool is an int to Python, never to us
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise WireError(
                f"{self._what}.{key}: expected {kind.__name__}, got {type(value).__name__}"
            )
        return value

    def number(self, key: str) -> float:
        value = self._map.get(key)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise WireError(f"{self._what}.{key}: expected a number, got {type(value).__name__}")
        return float(value)

    def all_of(self, kinds: Mapping[str, type]) -> list[Any]:
        """The values of these keys, each of its type; what is asked for as a float may be any
        number. For messages with many fields: a look at each instead of a call."""
        found = []
        for key, kind in kinds.items():
            value = self._map.get(key)
            if type(value) is not kind:
                value = self.number(key) if kind is float else self.get(key, kind)
            found.append(value)
        return found

    def numbers(self, key: str) -> tuple[float, ...]:
        value = self.get(key, list)
        if not all(type(item) in (int, float) for item in value):
            raise WireError(f"{self._what}.{key}: expected a list of numbers")
        return tuple(float(item) for item in value)

    def token_lists(self, key: str) -> tuple[tuple[int, ...], ...]:
        value = self.get(key, list)
        if not all(isinstance(item, bytes) and len(item) % 4 == 0 for item in value):
            raise WireError(f"{self._what}.{key}: expected a list of 32-bit token ids")
        return tuple(tuple(tokens_from_bytes(item)) for item in value)

    def tokens(self, key: str) -> array[int]:
        raw = self.get(key, bytes)
        if len(raw) % 4:
            raise WireError(f"{self._what}.{key}: {len(raw)} bytes are not 32-bit token ids")
        return tokens_from_bytes(raw)

    def texts(self, key: str) -> dict[str, str]:
        value = self.get(key, dict)
        if not all(isinstance(k, str) and isinstance(v, str) for k, v in value.items()):
            raise WireError(f"{self._what}.{key}: expected a map of strings")
        return value

    def integers(self, key: str) -> tuple[int, ...]:
        value = self.get(key, list)
        if not all(type(item) is int for item in value):
            raise WireError(f"{self._what}.{key}: expected a list of integers")
        return tuple(value)

    def one_of(self, key: str, build: Callable[[Any], T]) -> T:
        value = self._map.get(key)
        try:
            return build(value)
        except (ValueError, TypeError) as error:
            raise WireError(f"{self._what}.{key}: {value!r} is not a known value") from error


def tokens_to_bytes(tokens: Iterable[int]) -> bytes:
    """Token ids as little-endian unsigned 32-bit integers."""
    packed = tokens if isinstance(tokens, array) else array("I", tokens)
    if sys.byteorder == "big":
        packed = array("I", packed)
        packed.byteswap()
    return packed.tobytes()


def tokens_from_bytes(raw: bytes) -> array[int]:
    tokens = array("I")
    tokens.frombytes(raw)
    if sys.byteorder == "big":
        tokens.byteswap()
    return tokens


def encode_job(
    job: Job, virtual: float | None = None, trace: dict[str, str] | None = None
) -> bytes:
    """`job`, with another `virtual` and `trace` where they are given."""
    s = job.sampling
    return pack(
        {
            "id": job.id,
            "model": job.model,
            "tenant": job.tenant,
            "band": int(job.band),
            "arrived": job.arrived_ms,
            "gateway": job.gateway,
            "prompt": tokens_to_bytes(job.prompt),
            "salt": job.salt,
            "affinity": job.affinity,
            "attempt": job.attempt,
            "logged": tokens_to_bytes(job.logged),
            "trace": job.trace if trace is None else trace,
            "priority": job.priority,
            "weight": job.weight,
            "virtual": job.virtual if virtual is None else virtual,
            "ttft_by": job.ttft_by_ms,
            "done_by": job.done_by_ms,
            "expected": job.expected_tokens,
            "cached": job.cached_tokens,
            "blocks": job.blocks,
            "cache_until": job.cache_until_tokens,
            "cache_ttl": job.cache_ttl_ms,
            "cache_mode": job.cache_mode.value,
            "move_to": job.move_to,
            "move_at": job.move_address,
            "found": job.found_tokens,
            "max": s.max_tokens,
            "temp": s.temperature,
            "top_p": s.top_p,
            "top_k": s.top_k,
            "seed": s.seed,
            "stop": list(s.stop_token_ids),
            "no_eos": s.ignore_eos,
            "min_p": s.min_p,
            "typical": s.typical_p,
            "presence": s.presence_penalty,
            "frequency": s.frequency_penalty,
            "repetition": s.repetition_penalty,
            "bias_ids": tokens_to_bytes(token for token, _ in s.logit_bias),
            "bias": [bias for _, bias in s.logit_bias],
            "min": s.min_tokens,
            "bad": [tokens_to_bytes(word) for word in s.bad_words],
            "logprobs": s.logprobs,
            "prompt_logprobs": s.prompt_logprobs,
            "grammar": s.grammar,
        }
    )


_JOB_KINDS: dict[str, type] = {
    "id": str, "model": str, "tenant": str, "arrived": int, "gateway": str, "salt": bytes,
    "affinity": bytes, "attempt": int, "priority": int, "weight": float, "virtual": float,
    "ttft_by": int, "done_by": int, "expected": int, "cached": int, "blocks": bytes,
    "cache_until": int, "cache_ttl": int, "move_to": str, "move_at": str, "found": int,
}  # fmt: skip
_SAMPLING_KINDS: dict[str, type] = {
    "max": int, "temp": float, "top_p": float, "top_k": int, "seed": int, "no_eos": bool,
    "min_p": float, "typical": float, "presence": float, "frequency": float, "repetition": float,
    "min": int, "logprobs": int, "prompt_logprobs": int, "grammar": str,
}  # fmt: skip


def decode_job(data: bytes) -> Job:
    f = Fields("job", data)
    (
        job_id, model, tenant, arrived, gateway, salt, affinity, attempt,
        priority, weight, virtual, ttft_by, done_by, expected, cached, blocks,
        cache_until, cache_ttl, move_to, move_address, found,
    ) = f.all_of(_JOB_KINDS)  # fmt: skip
    return Job(
        job_id,
        model,
        tenant,
        f.one_of("band", Band),
        arrived,
        gateway,
        f.tokens("prompt"),
        _decode_sampling(f),
        salt=salt,
        affinity=affinity,
        attempt=attempt,
        logged=f.tokens("logged"),
        trace=f.texts("trace"),
        priority=priority,
        weight=weight,
        virtual=virtual,
        ttft_by_ms=ttft_by,
        done_by_ms=done_by,
        expected_tokens=expected,
        cached_tokens=cached,
        blocks=blocks,
        cache_until_tokens=cache_until,
        cache_ttl_ms=cache_ttl,
        cache_mode=f.one_of("cache_mode", CacheMode),
        move_to=move_to,
        move_address=move_address,
        found_tokens=found,
    )


def _decode_sampling(f: Fields) -> Sampling:
    bias_ids, biases = f.tokens("bias_ids"), f.numbers("bias")
    if len(bias_ids) != len(biases):
        raise WireError(f"job.bias: {len(biases)} numbers for {len(bias_ids)} tokens")
    (
        max_tokens, temperature, top_p, top_k, seed, ignore_eos, min_p, typical_p, presence,
        frequency, repetition, min_tokens, logprobs, prompt_logprobs, grammar,
    ) = f.all_of(_SAMPLING_KINDS)  # fmt: skip
    return Sampling(
        max_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        seed=seed,
        stop_token_ids=f.integers("stop"),
        ignore_eos=ignore_eos,
        min_p=min_p,
        typical_p=typical_p,
        presence_penalty=presence,
        frequency_penalty=frequency,
        repetition_penalty=repetition,
        logit_bias=tuple(zip(bias_ids, biases, strict=True)),
        min_tokens=min_tokens,
        bad_words=f.token_lists("bad"),
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        grammar=grammar,
    )


def encode_deltas(deltas: Iterable[Delta]) -> bytes:
    """The token frame of one engine step: one row a job; trailing empty columns are left out."""
    rows: list[list[Any]] = []
    for d in deltas:
        finish = None if d.finish is None else [d.finish.reason.value, d.finish.error]
        row: list[Any] = [d.job, d.attempt, d.first, tokens_to_bytes(d.tokens), d.cached_tokens]
        scored = bool(d.logprobs or d.prompt_logprobs or d.cache_write_tokens)
        if finish is not None or scored:
            row.append(finish)
        if scored:
            row += [_pack_logprobs(d.logprobs), _pack_logprobs(d.prompt_logprobs)]
        if d.cache_write_tokens:
            row.append(d.cache_write_tokens)
        rows.append(row)
    return pack(rows)


def decode_deltas(data: bytes) -> list[Delta]:
    return [row if isinstance(row, Delta) else as_delta(row) for row in decode_rows(data)]


Plain = tuple[str, int, int, tuple[int, ...], int]
"""Job, attempt, first, tokens and cached_tokens of a Delta that says no more."""


def as_delta(row: Plain) -> Delta:
    return Delta(*row[:4], cached_tokens=row[4])


def decode_rows(data: bytes) -> list[Delta | Plain]:
    """As `decode_deltas`, for who reads all tokens of a gateway: most rows are no object."""
    rows = unpack(data)
    if not isinstance(rows, list):
        raise WireError(f"deltas: expected a list, got {type(rows).__name__}")
    made: list[Delta | Plain] = []
    for row in rows:
        if type(row) is list and len(row) == _PLAIN_COLUMNS:
            job, attempt, first, tokens, cached = row
            typed = type(job) is str and type(attempt) is type(first) is type(cached) is int
            if typed and type(tokens) is bytes and not len(tokens) % TOKEN_BYTES:
                made.append((job, attempt, first, _token_tuple(tokens), cached))
                continue
        made.append(_decode_delta(row))
    return made


def _decode_delta(row: Any) -> Delta:
    try:
        job, attempt, first, tokens, cached, *rest = row
        ending = rest[0] if rest else None
        logprobs, prompt_logprobs = rest[1:3] if len(rest) > 1 else (b"", b"")
        written = 0
        if len(rest) > 3:
            (written,) = rest[3:]
        finish = None
        if ending is not None:
            reason, error = ending
            finish = Finish(FinishReason(reason), str(error))
        if not (isinstance(job, str) and isinstance(tokens, bytes)):
            raise ValueError("job or tokens of a wrong type")
        delta = Delta(
            job,
            int(attempt),
            int(first),
            _token_tuple(tokens),
            finish,
            int(cached),
            _unpack_logprobs(logprobs),
            _unpack_logprobs(prompt_logprobs),
            int(written),
        )
        if delta.logprobs and len(delta.logprobs) != len(delta.tokens):
            raise ValueError(f"{len(delta.logprobs)} logprobs for {len(delta.tokens)} tokens")
        return delta
    except (ValueError, TypeError, struct.error) as error:
        raise WireError(f"delta: {error}") from error


def _token_tuple(raw: bytes) -> tuple[int, ...]:
    """Raises struct.error."""
    if len(raw) == TOKEN_BYTES:
        return (int.from_bytes(raw, "little"),)
    return struct.unpack(f"<{len(raw) // TOKEN_BYTES}I", raw)


_PLAIN_COLUMNS = 5
"""Of a row without finish, logprobs and counts, as nearly all are."""
TOKEN_BYTES = 4
_LOGPROB = struct.Struct("<Hd")
_ALTERNATIVE = struct.Struct("<Id")


def _pack_logprobs(items: Iterable[TokenLogprobs]) -> bytes:
    """For each position: how many alternatives, its own logprob, then (token id, logprob) pairs."""
    packed = bytearray()
    for item in items:
        packed += _LOGPROB.pack(len(item.top), item.logprob)
        for alternative in item.top:
            packed += _ALTERNATIVE.pack(*alternative)
    return bytes(packed)


def _unpack_logprobs(data: bytes) -> tuple[TokenLogprobs, ...]:
    items: list[TokenLogprobs] = []
    at = 0
    while at < len(data):
        count, logprob = _LOGPROB.unpack_from(data, at)
        at += _LOGPROB.size
        stop = at + count * _ALTERNATIVE.size
        if stop > len(data):
            raise ValueError("logprobs end within a position")
        top = tuple((int(t), float(p)) for t, p in _ALTERNATIVE.iter_unpack(data[at:stop]))
        items.append(TokenLogprobs(float(logprob), top))
        at = stop
    return tuple(items)


def encode_model(record: ModelRecord) -> bytes:
    return pack(
        {
            "name": record.name,
            "fingerprint": record.fingerprint,
            "architecture": record.architecture,
            "context": record.context_tokens,
            "vocab": record.vocab_size,
            "eos": list(record.eos_token_ids),
            "add_bos": record.add_bos,
            "bos": -1 if record.bos_token_id is None else record.bos_token_id,
            "template": record.chat_template,
            "template_tokens": record.template_tokens,
            "tokenizer": zlib.compress(record.tokenizer_json),
        }
    )


def decode_model(data: bytes) -> ModelRecord:
    f = Fields("model", data)
    bos = f.get("bos", int)
    return ModelRecord(
        name=f.get("name", str),
        fingerprint=f.get("fingerprint", str),
        architecture=f.get("architecture", str),
        context_tokens=f.get("context", int),
        vocab_size=f.get("vocab", int),
        eos_token_ids=f.integers("eos"),
        add_bos=f.get("add_bos", bool),
        bos_token_id=None if bos < 0 else bos,
        chat_template=f.get("template", str),
        template_tokens=f.texts("template_tokens"),
        tokenizer_json=_unzipped("model.tokenizer", f.get("tokenizer", bytes)),
    )


def _unzipped(what: str, data: bytes) -> bytes:
    inflate = zlib.decompressobj()
    try:
        whole = inflate.decompress(data, TOKENIZER_BYTES_MAX)
    except zlib.error as error:
        raise WireError(f"{what}: {error}") from error
    if not inflate.eof:
        raise WireError(f"{what}: ends early, or is longer than {TOKENIZER_BYTES_MAX} bytes")
    return whole


def encode_worker(record: WorkerRecord) -> bytes:
    return pack(
        {
            "id": record.id,
            "model": record.model,
            "role": record.role.value,
            "host": record.host,
            "pid": record.pid,
            "kv_tokens": record.kv_tokens,
            "max_jobs": record.max_jobs,
            "started": record.started_ms,
            "kernels": record.kernels,
            "kv_at": record.kv_address,
            "precision": record.precision,
        }
    )


def decode_worker(data: bytes) -> WorkerRecord:
    f = Fields("worker", data)
    return WorkerRecord(
        id=f.get("id", str),
        model=f.get("model", str),
        role=f.one_of("role", WorkerRole),
        host=f.get("host", str),
        pid=f.get("pid", int),
        kv_tokens=f.get("kv_tokens", int),
        max_jobs=f.get("max_jobs", int),
        started_ms=f.get("started", int),
        kernels=f.get("kernels", str),
        kv_address=f.get("kv_at", str),
        precision=f.get("precision", str),
    )
