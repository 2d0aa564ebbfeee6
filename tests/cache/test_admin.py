"""What administrators ask: over the wire and back, and to a store that is a scripted one."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace import wire
from headrace.cache_admin import (
    CROSSINGS_MAX,
    CURSOR_MAX,
    LIST_MAX,
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
    Trace,
    Traced,
    Unpin,
    decode_answer,
    decode_request,
    encode,
)
from headrace.errors import WireError
from headrace.frames import DEPTH_MAX, ENTRY_BYTES_MAX, KINDS, KV, PIN_MS_MAX, PROMPT, EntryKey
from headrace.policy.hashing import MODEL_TAG_BYTES, layout_hash, model_tag
from headrace.types import Band
from headrace_cache.admin import Chosen, manage
from headrace_cache.policy.lineage import Below, Crossings

hashes = st.binary(min_size=32, max_size=32)
keys = st.builds(EntryKey, st.sampled_from(KINDS), hashes)
key_lists = st.lists(keys, min_size=1, max_size=4).map(tuple)
tenants = st.none() | st.text(min_size=1, max_size=8)
optional_hash = st.just(b"") | hashes
groups = st.lists(st.binary(min_size=4, max_size=4), max_size=3).map(tuple)
requests = st.one_of(
    st.builds(
        ListEntries,
        tenants,
        st.none() | st.sampled_from(KINDS),
        optional_hash,
        st.integers(1, LIST_MAX),
        st.integers(0, CURSOR_MAX),
        groups,
    ),
    st.builds(Pin, key_lists, st.integers(1, PIN_MS_MAX), tenants),
    st.builds(Unpin, key_lists, tenants),
    st.builds(
        Purge,
        tenants,
        optional_hash,
        st.just(b"") | st.binary(min_size=MODEL_TAG_BYTES, max_size=MODEL_TAG_BYTES),
        groups,
    ),
    st.builds(Trace, hashes),
    st.builds(
        SetQuota,
        st.text(min_size=1, max_size=8),
        st.just(0) | st.integers(10, QUOTA_BYTES_MAX),
        st.integers(0, 10),
    ),
    st.builds(ReadStats, tenants),
)
infos = st.builds(
    EntryInfo,
    keys,
    optional_hash,
    st.integers(0, DEPTH_MAX),
    st.integers(1, ENTRY_BYTES_MAX),
    st.text(max_size=8),
    st.sampled_from(Band),
    st.integers(0, 3),
    st.integers(0, PIN_MS_MAX),
    st.binary(max_size=8),
)
answers = st.one_of(
    st.builds(Listed, st.lists(infos, max_size=4).map(tuple), st.integers(0, CURSOR_MAX)),
    st.builds(Changed, st.integers(0, 2**40), st.integers(0, 2**50)),
    st.builds(Told, st.dictionaries(st.text(max_size=4), st.integers(0, 2**40), max_size=3)),
    st.builds(Refused, st.text(max_size=40)),
    st.builds(
        Traced,
        st.lists(st.tuples(hashes, hashes), max_size=3).map(tuple),
        st.lists(hashes, max_size=3).map(tuple),
    ),
)


@given(requests)
def test_requests_survive_the_wire(request: Any) -> None:
    assert decode_request(wire.unpack(wire.pack(encode(request)))) == request


@given(answers)
def test_answers_survive_the_wire(answer: Any) -> None:
    assert decode_answer(wire.unpack(wire.pack(encode(answer)))) == answer


STRANGE = st.sampled_from(
    [None, -1, 0, 2**60, 1.5, "", "x", "x" * 300, b"", b"x", [], [1], [["kv", b"x"]], {}, True,
     [["kv", b"h" * 32]] * 1025, [["other", b"h" * 32]]]
)  # fmt: skip


@given(requests | answers, st.data())
def test_a_changed_field_is_refused_or_within_the_limits(message: Any, data: st.DataObject) -> None:
    """Never anything but WireError; what is let through is itself a message that can be sent."""
    values = encode(message)
    values[data.draw(st.sampled_from(sorted(values)))] = data.draw(STRANGE)
    asks = isinstance(message, ListEntries | Pin | Unpin | Purge | SetQuota | ReadStats | Trace)
    decode = decode_request if asks else decode_answer
    with contextlib.suppress(WireError):
        found = decode(values)
        assert decode(wire.unpack(wire.pack(encode(found)))) == found


SHORT = st.text(max_size=6)


@given(
    st.recursive(
        st.none() | st.integers() | SHORT,
        lambda inner: st.dictionaries(SHORT | st.just("what"), inner, max_size=3),
        max_leaves=6,
    )
)
def test_anything_else_is_refused(values: Any) -> None:
    for decode in (decode_request, decode_answer):
        with pytest.raises(WireError):
            decode(values)


@dataclass
class Shelf:
    """A store of a few entries: plain lists, as slow as they are plain."""

    rows: list[EntryInfo]
    pins: dict[EntryKey, int] = field(default_factory=dict)
    quotas: dict[str, tuple[int, int]] = field(default_factory=dict)
    copies: int = 1

    async def entries(
        self, chosen: Chosen, below: Below | None, limit: int, cursor: int, now_ms: int
    ) -> tuple[list[EntryInfo], int]:
        fit = [
            replace(row, pin_ms=max(0, self.pins.get(row.key, 0) - now_ms))
            for row in self._of(chosen.tenant)
            if chosen.kind in (None, row.key.kind) and (not below or row.key.hash == below.first)
        ]
        more = cursor + limit < len(fit)
        return fit[cursor : cursor + limit], cursor + limit if more else 0

    def _of(self, tenant: str | None) -> list[EntryInfo]:
        return [row for row in self.rows if tenant in (None, row.tenant)]

    async def pin(self, keys: Sequence[EntryKey], until_ms: int, tenant: str | None = None) -> int:
        held = [row.key for row in self._of(tenant) if row.key in keys]
        self.pins |= dict.fromkeys(held, until_ms)
        return len(held)

    async def unpin(self, keys: Sequence[EntryKey], tenant: str | None = None) -> int:
        held = [row.key for row in self._of(tenant) if row.key in keys]
        return sum(self.pins.pop(key, None) is not None for key in held)

    async def purge(self, chosen: Chosen, below: Below | None) -> tuple[int, int]:
        assert below is None, "nobody asks this one by prefix"
        gone = [row for row in self._of(chosen.tenant) if row.layout.startswith(chosen.model)]
        self.rows = [row for row in self.rows if row not in gone]
        return len(gone), sum(row.size_bytes for row in gone)

    async def crossings(self, first: bytes) -> Crossings:
        return Crossings([(row.key.hash, first) for row in self.rows] * self.copies, [])

    async def set_quota(self, tenant: str, max_bytes: int, min_bytes: int) -> str:
        self.quotas[tenant] = (max_bytes, min_bytes)
        return "the minimums exceed the budget" if min_bytes > 1_000 else ""

    def stats(self) -> dict[str, Any]:
        by_tenant = {row.tenant: {"entries": 1} for row in self.rows}
        return {"entries": len(self.rows), "by_tenant": by_tenant, "quotas": dict(self.quotas)}


def row(name: str, tenant: str, model: str = "m", kind: str = KV) -> EntryInfo:
    layout = layout_hash(model, "float32", 16)
    key = EntryKey(kind, name.encode() * 32)
    return EntryInfo(key, b"", 0, 100, tenant, Band.STANDARD, 1, layout=layout)


def shelf() -> Shelf:
    return Shelf(
        [row("a", "red"), row("b", "blue"), row("c", "red", "n"), row("d", "red", "n", PROMPT)]
    )


async def test_a_tenant_sees_and_changes_its_own() -> None:
    """What is asked of a foreign entry is answered as for one that is not there."""
    store = shelf()
    listed = await manage(store, ListEntries("red"), 0)
    assert isinstance(listed, Listed)
    assert [entry.tenant for entry in listed.entries] == ["red"] * 3
    foreign, unknown = EntryKey(KV, b"b" * 32), EntryKey(KV, b"z" * 32)
    for key in (foreign, unknown):
        assert await manage(store, Pin((key,), 5, "red"), 0) == Changed(0)
        assert await manage(store, Unpin((key,), "red"), 0) == Changed(0)
    assert await manage(store, Purge("red"), 0) == Changed(3, 300)
    assert [entry.tenant for entry in store.rows] == ["blue"]
    assert await manage(store, ReadStats("red"), 0) == Told({"by_tenant": {}, "quotas": {}})


async def test_pins_end_by_the_stores_clock() -> None:
    store = shelf()
    key = EntryKey(KV, b"a" * 32)
    assert await manage(store, Pin((key,), 500, "red"), 1_000) == Changed(1)
    assert store.pins == {key: 1_500}
    listed = await manage(store, ListEntries(prefix=b"a" * 32), 1_200)
    assert isinstance(listed, Listed)
    assert [entry.pin_ms for entry in listed.entries] == [300]
    assert await manage(store, Unpin((key,)), 1_200) == Changed(1)


async def test_a_models_entries_are_found_by_their_layout() -> None:
    """Whatever their dtype and kind, and no other model's."""
    store = shelf()
    assert layout_hash("m", "float32").startswith(model_tag("m"))
    assert layout_hash("m", "float32") != layout_hash("m", "int8")
    assert len(layout_hash("m", "float32")) == 8
    assert await manage(store, Purge(model=model_tag("n")), 0) == Changed(2, 200)
    assert {entry.layout[:MODEL_TAG_BYTES] for entry in store.rows} == {model_tag("m")}


async def test_a_page_says_where_to_go_on() -> None:
    store = shelf()
    seen: list[EntryInfo] = []
    cursor = 0
    while True:
        page = await manage(store, ListEntries(limit=3, cursor=cursor), 0)
        assert isinstance(page, Listed)
        seen += page.entries
        cursor = page.cursor
        if not cursor:
            break
    assert seen == store.rows


async def test_a_quota_that_cannot_hold_is_refused_with_its_reason() -> None:
    store = shelf()
    assert await manage(store, SetQuota("red", 500, 100), 0) == Changed(0)
    assert await manage(store, SetQuota("red", 0, 5_000), 0) == Refused(
        "the minimums exceed the budget"
    )
    told = await manage(store, ReadStats("red"), 0)
    assert told == Told({"by_tenant": {"red": {"entries": 1}}, "quotas": {"red": (0, 5_000)}})


async def test_more_chains_than_a_frame_holds_are_refused() -> None:
    store = shelf()
    assert isinstance(await manage(store, Trace(b"p" * 32), 0), Traced)
    store.copies = CROSSINGS_MAX
    refused = await manage(store, Trace(b"p" * 32), 0)
    assert isinstance(refused, Refused)
    assert "by tenant" in refused.message
