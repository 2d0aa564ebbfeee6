"""The frame format and its reader, byte by byte, without a socket."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from cache.builders import data_of, facts_of, hash_of
from headrace.errors import SettingsError, WireError
from headrace.frame_codec import (
    HEADER_BYTES_MAX,
    MAGIC,
    PREFIX,
    decode_answer,
    decode_request,
    encode,
)
from headrace.frame_protocol import FrameReader
from headrace.frames import (
    ENTRY_BYTES_MAX,
    KEYS_MAX,
    KV,
    PAYLOAD_BYTES_MAX,
    PIN_MS_MAX,
    Answer,
    Ask,
    Commit,
    Counted,
    EntryKey,
    Found,
    Get,
    Has,
    Hello,
    Known,
    Lend,
    Lent,
    Manage,
    Put,
    Release,
    Request,
    Reserve,
    Reserved,
    Stats,
    Verify,
    Welcome,
    parse_address,
)
from headrace.types import Band
from headrace.wire import pack, unpack

KEYS = (EntryKey(KV, hash_of(1)), EntryKey(KV, hash_of(2)))
TRACE = {"traceparent": "00-" + "a" * 32 + "-" + "b" * 16 + "-01"}
ENTRIES = tuple(
    facts_of(name, data_of(name, size), parent=hash_of(0), depth=name)
    for name, size in ((1, 10), (2, 70_000), (3, 1))
)
REQUESTS: list[Request] = [
    Get(1, KEYS, Band.BATCH, TRACE),
    Get(2, KEYS),
    Put(3, ENTRIES, TRACE),
    Has(4, KEYS),
    Verify(5, KEYS),
    Ask(6, "stats"),
    Ask(7, "ping"),
    Lend(8, KEYS, None, TRACE, b"8 bytes.", "acme"),
    Release(9, 4),
    Reserve(10, ENTRIES, TRACE),
    Reserve(14, ENTRIES[:1], TRACE, 3, (32, 368_640)),
    Commit(11, 4, (5, -1)),
    Hello(12),
    Manage(13, {"what": "list"}),
]
ANSWERS: list[Answer] = [
    Found(1, (10, 20), (7, 8), True),
    Counted(3, 2),
    Known(4, (True, False)),
    Stats(6, {"by_kind": {"kv": {"entries": 1}}}),
    Lent(8, (10, 20), (7, 8), False, (0, 1), 4, (4096, 8192)),
    Reserved(10, 4, (4096, -1), 1, 5, (8192, 12288)),
    Welcome(12, "/dev/shm/arena", b"n" * 16, 1 << 20, 3),
]


def everything(message: Any) -> Sequence[bool]:
    return [True] * len(message.sizes)


def feed(reader: FrameReader[Any], stream: bytes, chunk: int) -> list[Any]:
    """Give `stream` to `reader`, at most `chunk` bytes at a time; the frames that came out."""
    frames = []
    while stream:
        target = reader.buffer()
        count = min(len(target), chunk, len(stream))
        target[:count] = stream[:count]
        stream = stream[count:]
        frames += reader.advance(count)
    return frames


def header_of(message: Request | Answer) -> bytes:
    return encode(message)[PREFIX.size :]


@pytest.mark.parametrize("message", REQUESTS, ids=lambda m: type(m).__name__)
def test_requests_come_out_as_they_went_in(message: Request) -> None:
    assert decode_request(header_of(message)) == message


@pytest.mark.parametrize("message", ANSWERS, ids=lambda m: type(m).__name__)
def test_answers_come_out_as_they_went_in(message: Answer) -> None:
    assert decode_answer(header_of(message)) == message


@pytest.mark.parametrize("chunk", [1, 7, 1000, 1 << 20])
def test_frames_survive_any_cut(chunk: int) -> None:
    """Two frames with entries and one without, in pieces; the entry not wanted is skipped."""
    data = [data_of(facts.depth, facts.size_bytes) for facts in ENTRIES]
    put = encode(REQUESTS[2]) + b"".join(data)
    reader = FrameReader(
        decode_request,
        lambda put: [each.size_bytes != 10 for each in put.entries] if isinstance(put, Put) else [],
    )
    frames = feed(reader, put + encode(REQUESTS[0]) + put, chunk)
    assert [message for message, _ in frames] == [REQUESTS[2], REQUESTS[0], REQUESTS[2]]
    assert frames[0][1][0] is None
    assert [bytes(part) for part in frames[0][1][1:]] == data[1:]
    assert frames[1][1] == []
    assert reader.idle


def test_each_entry_has_memory_of_its_own() -> None:
    """Keeping one entry of a batch must not keep the batch."""
    reader = FrameReader(decode_request, everything)
    stream = encode(REQUESTS[2]) + b"\0" * sum(facts.size_bytes for facts in ENTRIES)
    ((_, parts),) = feed(reader, stream, 1 << 20)
    assert [len(part.obj) for part in parts] == [facts.size_bytes for facts in ENTRIES]


def test_a_reader_knows_whether_it_stands_between_frames() -> None:
    reader = FrameReader(decode_request, everything)
    stream = encode(REQUESTS[0])
    assert reader.idle
    for position in range(len(stream) - 1):
        feed(reader, stream[position : position + 1], 1)
        assert not reader.idle
    feed(reader, stream[-1:], 1)
    assert reader.idle


def prefixed(header: bytes, payload_bytes: int = 0, magic: bytes = MAGIC) -> bytes:
    return PREFIX.pack(magic, len(header), payload_bytes) + header


@pytest.mark.parametrize(
    ("stream", "message"),
    [
        (prefixed(b"x", magic=b"HTTP"), "starts with"),
        (PREFIX.pack(MAGIC, 0, 0), "header of 0 bytes"),
        (PREFIX.pack(MAGIC, HEADER_BYTES_MAX + 1, 0), "header of"),
        (PREFIX.pack(MAGIC, 1, PAYLOAD_BYTES_MAX + 1), "payload of"),
        (prefixed(b"\xc1"), "not valid msgpack"),
        (prefixed(pack([])), "expected a map"),
        (prefixed(pack({"op": "run", "id": 1})), "not known"),
        (prefixed(pack({"op": "ask", "id": 1, "what": "secrets"})), "not known"),
        (prefixed(header_of(REQUESTS[0]), 5), "entries of 0"),
        (prefixed(header_of(REQUESTS[2]), 5), "payload of 5"),
    ],
)
def test_a_malformed_frame_is_named(stream: bytes, message: str) -> None:
    with pytest.raises(WireError, match=message):
        feed(FrameReader(decode_request, everything), stream, 1 << 20)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        (0, "video"),
        (1, b"short"),
        (2, b"short"),
        (3, -1),
        (4, 0),
        (4, ENTRY_BYTES_MAX + 1),
        (5, 1 << 32),
        (6, 3),
        (7, "x" * 201),
        (8, -1),
        (9, math.nan),
        (9, math.inf),
        (9, -1.0),
        (9, 1),
        (4, True),
        (10, b"short"),
        (11, -1),
        (11, PIN_MS_MAX + 1),
    ],
)
def test_each_fact_of_an_entry_is_checked(field: int, value: Any) -> None:
    """A NaN cost would disorder the eviction heap; a huge size would take the memory."""
    header = unpack(header_of(REQUESTS[2]))
    header["entries"][field][0] = value
    with pytest.raises(WireError):
        decode_request(pack(header))


@pytest.mark.parametrize(
    "change",
    [
        {"hashes": b""},
        {"hashes": b"x" * 33},
        {"hashes": b"x" * 32 * (KEYS_MAX + 1)},
        {"kind": "video"},
        {"band": 9},
        {"layout": b"short"},
        {"tenant": "x" * 201},
        {"trace": {"a": 1}},
        {"trace": {str(i): "" for i in range(100)}},
        {"id": "one"},
        {"id": None},
    ],
)
def test_each_field_of_a_get_is_checked(change: dict[str, Any]) -> None:
    with pytest.raises(WireError):
        decode_request(pack(unpack(header_of(REQUESTS[0])) | change))


@pytest.mark.parametrize(
    ("answer", "change"),
    [
        (0, {"crcs": [1]}),
        (0, {"sizes": [1, ENTRY_BYTES_MAX + 1]}),
        (0, {"tiers": [0]}),
        (0, {"tiers": [0, 2]}),
        (4, {"places": [1]}),
        (4, {"places": [1, -1]}),
        (5, {"places": [-2]}),
        (5, {"ahead_places": [-1]}),
        (5, {"ahead_places": [1] * (KEYS_MAX + 1)}),
        (5, {"ahead": "5"}),
        (6, {"nonce": b"short"}),
        (6, {"path": "x" * 2000}),
    ],
)
def test_each_field_of_an_answer_is_checked(answer: int, change: dict[str, Any]) -> None:
    with pytest.raises(WireError):
        decode_answer(pack(unpack(header_of(ANSWERS[answer])) | change))


@pytest.mark.parametrize(
    "change",
    [
        {"ahead": [1]},
        {"ahead": [-1, 5]},
        {"ahead": [KEYS_MAX + 1, 5]},
        {"ahead": [1, ENTRY_BYTES_MAX + 1]},
        {"using": None},
        {"entries": []},
        {"entries": [[]] * 12},
        {"entries": [["kv"] * 2] * 12},
        {"entries": ["kv"] * 12},
    ],
)
def test_each_field_of_a_reserve_is_checked(change: dict[str, Any]) -> None:
    with pytest.raises(WireError):
        decode_request(pack(unpack(header_of(Reserve(1, ENTRIES))) | change))


def test_a_field_of_some_entries_only_is_refused() -> None:
    header = unpack(header_of(Reserve(1, ENTRIES)))
    header["entries"][3] = header["entries"][3][:2]
    with pytest.raises(WireError, match="some entries"):
        decode_request(pack(header))


def test_each_crc_of_a_commit_is_checked() -> None:
    for crcs in ([-2], [1 << 32], ["1"], [1] * (KEYS_MAX + 1)):
        with pytest.raises(WireError):
            decode_request(pack({"op": "commit", "id": 1, "ticket": 1, "crcs": crcs}))


@given(st.binary(max_size=200))
@example(MAGIC + b"\0\0\0\2" + b"\0" * 8 + b"\x81\xa2")
def test_random_bytes_raise_wire_errors_only(noise: bytes) -> None:
    for stream in (noise, MAGIC + noise, prefixed(noise or b"\0")):
        try:
            feed(FrameReader(decode_request, everything), stream, 64)
            feed(FrameReader(decode_answer, everything), stream, 64)
        except WireError:
            continue


@given(st.sampled_from([*REQUESTS, *ANSWERS]), st.integers(0, 2**32))
def test_damaged_headers_raise_wire_errors_only(message: Request | Answer, seed: int) -> None:
    """Valid headers with a few bytes changed reach further than noise does."""
    rng = random.Random(seed)
    header = bytearray(header_of(message))
    for _ in range(rng.randint(1, 4)):
        header[rng.randrange(len(header))] = rng.randrange(256)
    for decode in (decode_request, decode_answer):
        try:
            decode(bytes(header))
        except WireError:
            continue


@pytest.mark.parametrize(
    ("url", "text"),
    [
        ("tcp://127.0.0.1:7700", "tcp://127.0.0.1:7700"),
        ("tcp://[::1]:7700", "tcp://[::1]:7700"),
        ("tcp://cache-service:7700", "tcp://cache-service:7700"),
        ("unix:///run/headrace/cache.sock", "unix:///run/headrace/cache.sock"),
    ],
)
def test_addresses_are_read_and_written(url: str, text: str) -> None:
    assert str(parse_address(url)) == text


@pytest.mark.parametrize(
    "url",
    [
        "",
        "127.0.0.1:7700",
        "tcp://host",
        "tcp://host:99999",
        "http://h:1",
        "unix://",
        "unix:///" + "x" * 200,
    ],
)
def test_a_bad_address_is_named(url: str) -> None:
    with pytest.raises(SettingsError):
        parse_address(url)
