"""Who asks for what, when: traces with drawn tenants and bands, and synthetic streams.

Invariant: a workload is a function of its description and a seed, and an iterator in order of time,
so that a million requests need no memory. Prompts have no text: a request has lengths and the ids
of its prefix blocks, and equal ids mean equal tokens for one tenant. Whether somebody sends the
next request only when the last one is answered (a closed loop) is the stream's business: it is
told of every end and may answer with a new request.
"""

from __future__ import annotations

import heapq
import math
from bisect import bisect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from random import Random
from typing import NamedTuple, Protocol

from headrace.errors import SettingsError
from headrace.types import BLOCK_TOKENS, Band
from headrace_sim.kv_cache import PrefixBlock
from headrace_sim.trace import Trace, TraceRequest

BLOCK_ID_SPAN = 1 << 40
"""Ids of one repetition, stream or tenant lie in a span of their own."""
BANDS = tuple(Band)


@dataclass(frozen=True, slots=True)
class SimTenant:
    """`share` is the part of the requests that are this tenant's, `weight` what it is owed.

    `max_tokens`: what its clients ask for at most, 0: exactly what comes. `bands`: parts of its
    requests per Band; None: the workload's.
    """

    name: str
    weight: float = 1.0
    share: float = 1.0
    max_tokens: int = 2_048
    bands: tuple[float, float, float] | None = None


class SimRequest(NamedTuple):
    """One request. `output_tokens` is how long the answer turns out; the fleet is not told.

    `ttft_ms`, `total_ms`: deadlines after the arrival, 0 for none. `session` is what stickiness
    hashes. `gateway` is the one it comes to, by number.
    """

    id: str
    at_ms: float
    tenant: str
    weight: float
    band: Band
    input_tokens: int
    output_tokens: int
    max_tokens: int
    blocks: tuple[PrefixBlock, ...] = ()
    session: bytes = b""
    ttft_ms: int = 0
    total_ms: int = 0
    gateway: int = 0
    stream: int = 0


class Stream(Protocol):
    """A source of requests."""

    def start(self) -> Iterator[SimRequest]:
        """Its requests in order of time, those of a closed loop's beginning included."""

    def ended(self, request: SimRequest, now_ms: float, /) -> SimRequest | None:
        """The next request of a closed loop, once `request` was answered or refused."""


@dataclass(frozen=True, slots=True)
class Mix:
    """How tenants, bands, deadlines and gateways are drawn."""

    tenants: tuple[SimTenant, ...] = (SimTenant("t0"),)
    bands: tuple[float, float, float] = (0.0, 1.0, 0.0)
    gateways: int = 1
    ttft_ms: tuple[int, int, int] = (0, 0, 0)
    total_ms: tuple[int, int, int] = (0, 0, 0)
    _shares: list[float] = field(init=False, repr=False, compare=False)
    _bands: dict[str, list[float]] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not self.tenants or self.gateways < 1:
            raise SettingsError("a workload needs at least one tenant and one gateway")
        for tenant in self.tenants:
            if not (tenant.share >= 0 and tenant.weight > 0):
                raise SettingsError(f"tenant {tenant.name}: share and weight have to be positive")
        for bands in (self.bands, *(t.bands for t in self.tenants if t.bands)):
            if len(bands) != len(Band) or min(bands) < 0 or sum(bands) <= 0:
                raise SettingsError(f"a band mix is three parts like 10/60/30, not {bands}")

        # a frozen value's fields that follow from the others
        shares = list(accumulate(tenant.share for tenant in self.tenants))
        by_tenant = {t.name: list(accumulate(t.bands or self.bands)) for t in self.tenants}
        object.__setattr__(self, "_shares", shares)
        object.__setattr__(self, "_bands", by_tenant)

    def tenant(self, rng: Random) -> SimTenant:
        return self.tenants[drawn(self._shares, rng)]

    def band(self, tenant: SimTenant, rng: Random) -> Band:
        return BANDS[drawn(self._bands[tenant.name], rng)]


def drawn(cumulated: Sequence[float], rng: Random) -> int:
    """An index, as likely as its part of the sums; Random.choices takes ten times as long."""
    return bisect(cumulated, rng.random() * cumulated[-1], 0, len(cumulated) - 1)


class TraceStream:
    """A trace: `rate` times as fast, repeated until `requests` came.

    A conversation (known by its second prefix block, as the first is often everybody's system
    prompt) belongs to one tenant. Each repetition has prefix blocks of its own.
    """

    def __init__(
        self, trace: Trace, mix: Mix, *, seed: int, rate: float = 1.0, requests: int | None = None
    ) -> None:
        if not (rate > 0 and math.isfinite(rate)):
            raise SettingsError(f"the rate scale has to be above 0, not {rate}")
        self._trace, self._mix, self._seed, self._rate = trace, mix, seed, rate
        self._requests = len(trace.requests) if requests is None else requests

    def start(self) -> Iterator[SimRequest]:
        rng = Random(f"trace {self._seed}")
        tenants = {tenant.name: n for n, tenant in enumerate(self._mix.tenants)}
        owners: dict[int, SimTenant] = {}
        made = 0
        for turn in range(-(-self._requests // len(self._trace.requests))):
            owners.clear()
            for row in self._trace.requests:
                if made == self._requests:
                    return
                tenant = self._owner(row, owners, rng)
                place = turn * len(tenants) + tenants[tenant.name]
                yield self._request(made, row, tenant, turn, place, rng)
                made += 1

    def ended(self, _request: SimRequest, _now_ms: float) -> SimRequest | None:
        return None

    def _owner(self, row: TraceRequest, owners: dict[int, SimTenant], rng: Random) -> SimTenant:
        if len(row.blocks) < 2:
            return self._mix.tenant(rng)
        key = row.blocks[1]
        if key not in owners:
            owners[key] = self._mix.tenant(rng)
        return owners[key]

    def _request(
        self, n: int, row: TraceRequest, tenant: SimTenant, turn: int, place: int, rng: Random
    ) -> SimRequest:
        band = self._mix.band(tenant, rng)
        blocks: tuple[PrefixBlock, ...] = ()
        if row.blocks:
            blocks = prefix_blocks(row, self._trace.block_tokens, place * BLOCK_ID_SPAN)
        session = blocks[min(1, len(blocks) - 1)][0] if blocks else -1 - n
        return SimRequest(
            id=f"r{n}",
            at_ms=(row.at_ms + turn * self._trace.span_ms) / self._rate,
            tenant=tenant.name,
            weight=tenant.weight,
            band=band,
            input_tokens=row.input_tokens,
            output_tokens=row.output_tokens,
            max_tokens=max(row.output_tokens, tenant.max_tokens),
            blocks=blocks,
            session=session.to_bytes(16, "big", signed=True),
            ttft_ms=self._mix.ttft_ms[band],
            total_ms=self._mix.total_ms[band],
            gateway=rng.randrange(self._mix.gateways),
        )


def prefix_blocks(row: TraceRequest, block_tokens: int, offset: int) -> tuple[PrefixBlock, ...]:
    """The prompt's prefix blocks; of the last one only whole KV blocks can be cached."""
    blocks = [(offset + block, block_tokens) for block in row.blocks]
    over = len(blocks) * block_tokens - row.input_tokens
    if blocks and over > 0:
        left = (block_tokens - over) // BLOCK_TOKENS * BLOCK_TOKENS
        blocks[-1] = (blocks[-1][0], left)
        if not left:
            blocks.pop()
    return tuple(blocks)


@dataclass(frozen=True, slots=True)
class Lengths:
    """Log-normal lengths with this mean and spread (sigma of the logarithm), within bounds."""

    mean: float
    spread: float = 0.0
    most: int = 1_000_000
    _mu: float = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        mu = math.log(self.mean) - self.spread**2 / 2 if self.spread > 0 else 0.0
        object.__setattr__(self, "_mu", mu)  # a frozen value's field that follows from the others

    def draw(self, rng: Random) -> int:
        if self.spread <= 0:
            return max(1, min(self.most, round(self.mean)))
        return max(1, min(self.most, round(rng.lognormvariate(self._mu, self.spread))))


@dataclass(frozen=True, slots=True)
class Surge:
    """Between two instants, `factor` times as many requests."""

    from_ms: float
    to_ms: float
    factor: float


@dataclass(frozen=True, slots=True)
class Shape:
    """What synthetic requests look like.

    Each prompt begins with one of `prefixes` shared prefixes of `prefix_tokens`, the popular ones
    more often (Zipf with exponent 1), in blocks of `block_tokens`.
    """

    input: Lengths = Lengths(1_024, 0.8, 32_768)
    output: Lengths = Lengths(256, 0.8, 4_096)
    prefixes: int = 0
    prefix_tokens: int = 0
    block_tokens: int = 128

    def __post_init__(self) -> None:
        if self.block_tokens % BLOCK_TOKENS or self.block_tokens < BLOCK_TOKENS:
            raise SettingsError(f"prefix blocks have a multiple of {BLOCK_TOKENS} tokens")


class Drawn:
    """What Poisson streams and closed loops share: drawing one request."""

    def __init__(self, mix: Mix, shape: Shape, *, seed: int, stream: int = 0) -> None:
        self._mix, self._shape, self._stream = mix, shape, stream
        self._seed = seed
        self._rng = Random(f"stream {stream} {seed}")
        self._made = 0
        self._popularity = list(accumulate(1 / (n + 1) for n in range(shape.prefixes)))
        self._prefixes: dict[tuple[str, int], tuple[PrefixBlock, ...]] = {}

    def _blocks(self, tenant: SimTenant, prefix: int) -> tuple[PrefixBlock, ...]:
        """Those of a shared prefix, one tuple for all prompts; a tenant's is nobody else's."""
        size = self._shape.block_tokens
        count = self._shape.prefix_tokens // size
        salt = self._mix.tenants.index(tenant) + 1000 * self._stream
        base = salt * BLOCK_ID_SPAN + prefix * count
        found = tuple((base + i, size) for i in range(count))
        self._prefixes[tenant.name, prefix] = found
        return found

    def draw(self, at_ms: float, tenant: SimTenant | None = None) -> SimRequest:
        rng, shape = self._rng, self._shape
        tenant = tenant or self._mix.tenant(rng)
        band = self._mix.band(tenant, rng)
        n, self._made = self._made, self._made + 1
        own = shape.input.draw(rng)
        blocks: tuple[PrefixBlock, ...] = ()
        prefix = -1 - n
        if shape.prefixes:
            prefix = drawn(self._popularity, rng)
            blocks = self._prefixes.get((tenant.name, prefix)) or self._blocks(tenant, prefix)
        output = shape.output.draw(rng)
        return SimRequest(
            id=f"s{self._stream}-{n}",
            at_ms=at_ms,
            tenant=tenant.name,
            weight=tenant.weight,
            band=band,
            input_tokens=own + (shape.prefix_tokens if shape.prefixes else 0),
            output_tokens=output,
            max_tokens=max(output, tenant.max_tokens),
            blocks=blocks,
            session=prefix.to_bytes(16, "big", signed=True),
            ttft_ms=self._mix.ttft_ms[band],
            total_ms=self._mix.total_ms[band],
            gateway=rng.randrange(self._mix.gateways),
            stream=self._stream,
        )


class PoissonStream(Drawn):
    """Independent arrivals at `per_s`, more in surges, until `requests` came."""

    def __init__(
        self,
        mix: Mix,
        shape: Shape,
        *,
        per_s: float,
        requests: int,
        surges: Sequence[Surge] = (),
        seed: int,
        stream: int = 0,
    ) -> None:
        super().__init__(mix, shape, seed=seed, stream=stream)
        if not (per_s > 0 and math.isfinite(per_s)):
            raise SettingsError(f"the rate has to be above 0 requests a second, not {per_s}")
        self._per_ms, self._requests, self._surges = per_s / 1000, requests, tuple(surges)

    def start(self) -> Iterator[SimRequest]:
        """Thinning: draw at the highest rate, keep each with its own rate's probability."""
        highest = max([1.0, *(s.factor for s in self._surges)])
        now_ms, made, factor = 0.0, 0, 1.0
        while made < self._requests:
            now_ms += self._rng.expovariate(self._per_ms * highest)
            if self._surges:
                factor = max((s.factor for s in self._surges if s.from_ms <= now_ms < s.to_ms),
                             default=1.0)  # fmt: skip
            if self._rng.random() * highest <= factor:
                made += 1
                yield self.draw(now_ms)

    def ended(self, _request: SimRequest, _now_ms: float) -> SimRequest | None:
        return None


class ClosedLoop(Drawn):
    """`clients` of each tenant send one request after the other, until `until_ms`."""

    def __init__(
        self,
        mix: Mix,
        shape: Shape,
        *,
        clients: int,
        until_ms: float,
        think_ms: float = 0.0,
        from_ms: float = 0.0,
        seed: int,
        stream: int = 0,
    ) -> None:
        super().__init__(mix, shape, seed=seed, stream=stream)
        self._clients, self._until_ms = clients, until_ms
        self._think_ms, self._from_ms = think_ms, from_ms
        self._tenants = {tenant.name: tenant for tenant in mix.tenants}

    def start(self) -> Iterator[SimRequest]:
        for n in range(self._clients):
            for tenant in self._mix.tenants:
                yield self.draw(self._from_ms + n / 1000, tenant)

    def ended(self, request: SimRequest, now_ms: float) -> SimRequest | None:
        at_ms = now_ms + self._think_ms
        if at_ms >= self._until_ms:
            return None
        return self.draw(at_ms, self._tenants[request.tenant])


class Together:
    """Several streams as one."""

    def __init__(self, streams: Sequence[Stream]) -> None:
        self._streams = tuple(streams)

    def start(self) -> Iterator[SimRequest]:
        numbered = (self._number(n, stream) for n, stream in enumerate(self._streams))
        return heapq.merge(*numbered, key=lambda request: request.at_ms)

    def ended(self, request: SimRequest, now_ms: float) -> SimRequest | None:
        following = self._streams[request.stream].ended(request, now_ms)
        return self._named(request.stream, following) if following else None

    def _number(self, n: int, stream: Stream) -> Iterator[SimRequest]:
        return (self._named(n, request) for request in stream.start())

    @staticmethod
    def _named(n: int, request: SimRequest) -> SimRequest:
        return request._replace(id=f"{n}/{request.id}", stream=n)
