"""Finished outputs of deterministic requests, as entries of the cache service.

Invariant: what is read back is what was written under the same key, whole, or it is a miss: the key
stands in the entry itself, positions start at 0, and it has a finish. No trouble of the service is
ever the caller's; a write waits for nothing.
Rejected: keeping texts. Tokens make every form of answer, with logprobs and tool calls.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import structlog

from headrace.cache_cluster import Cache
from headrace.cache_entries import PutEntry
from headrace.errors import WireError
from headrace.frames import PROMPT
from headrace.policy.hashing import layout_hash
from headrace.types import Band, Delta, Finish, FinishReason, TokenLogprobs
from headrace.wire import Fields, decode_deltas, encode_deltas, pack

ENTRY_BYTES_MAX = 1024 * 1024
"""Longer outputs (with logprobs, mostly) are not kept."""
WHOLE = (FinishReason.STOP, FinishReason.LENGTH)
"""Ends of what is worth keeping."""

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Output:
    """All that a job made, and how long that took. Logprobs as in Delta."""

    tokens: Sequence[int]
    finish: FinishReason
    logprobs: Sequence[TokenLogprobs] = ()
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    took_ms: int = 0


@dataclass(frozen=True, slots=True)
class Cost:
    """Whose an output is, of which class, and tokens to compute for it."""

    tenant: str
    band: Band
    tokens: int


def encode_output(key: bytes, output: Output) -> bytes:
    delta = Delta(
        key.hex(),
        1,
        0,
        tuple(output.tokens),
        Finish(output.finish),
        logprobs=tuple(output.logprobs),
        prompt_logprobs=output.prompt_logprobs,
    )
    return pack({"ms": output.took_ms, "output": encode_deltas([delta])})


def decode_output(key: bytes, data: bytes, vocab_size: int) -> Output:
    """The inverse. Raises WireError for anything that is not a whole output of `key`."""
    f = Fields("entry", data)
    took_ms, deltas = f.get("ms", int), decode_deltas(f.get("output", bytes))
    if len(deltas) != 1 or deltas[0].job != key.hex() or deltas[0].first != 0:
        raise WireError("not the output of this request")
    [delta] = deltas
    if delta.finish is None or delta.finish.reason not in WHOLE:
        raise WireError("the output has no end")
    if max(delta.tokens, default=0) >= vocab_size:
        raise WireError("a token is outside the vocabulary")
    return Output(delta.tokens, delta.finish.reason, delta.logprobs, delta.prompt_logprobs, took_ms)


class PromptEntries:
    """Reads and writes outputs by key. Closing the client, which queues writes, is its owner's."""

    def __init__(self, client: Cache) -> None:
        self._client = client
        self.unwritten = 0
        """Outputs that were worth keeping and are not, for their size or for lack of room."""

    async def read(
        self,
        key: bytes,
        *,
        fingerprint: str,
        tenant: str,
        band: Band,
        vocab_size: int,
        trace: Mapping[str, str] | None = None,
    ) -> Output | None:
        """The output that is kept under `key` for this model; None on any trouble."""
        found = await self._client.get_run(
            [key], trace, kind=PROMPT, band=band, tenant=tenant, layout=_layout(fingerprint)
        )
        if not found:
            return None
        try:
            return decode_output(key, bytes(found[0][1]), vocab_size)
        except WireError as error:
            log.warning("prompt entry unreadable, taken for a miss", error=error.message)
            return None

    def write_soon(self, key: bytes, output: Output, fingerprint: str, cost: Cost) -> bool:
        """Keep `output` in the background; whether that was begun."""
        data = encode_output(key, output)
        entry = PutEntry(
            hash=key,
            data=data,
            band=cost.band,
            tenant=cost.tenant,
            cost_tokens=cost.tokens,
            cost_ms=float(output.took_ms),
            kind=PROMPT,
            layout=_layout(fingerprint),
        )
        begun = len(data) <= ENTRY_BYTES_MAX and self._client.offer([entry])
        self.unwritten += not begun
        return begun


def _layout(fingerprint: str) -> bytes:
    return layout_hash(fingerprint, "prompt")
