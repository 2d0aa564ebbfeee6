"""Segment files: what was written is read back, and whatever else stands there is not believed."""

from __future__ import annotations

import os
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from cache.builders import data_of, facts_of, hash_of
from headrace.checksum import checksum
from headrace.frames import KINDS, EntryFacts, EntryKey
from headrace.types import Band
from headrace_cache.disk_files import Files
from headrace_cache.disk_segment import Segment, create_segment, record_bytes
from headrace_cache.segments import (
    MARKER_BYTES,
    SEGMENT_HEAD_BYTES,
    TIME_MS_MAX,
    Head,
    Op,
    Reader,
    Scan,
    SegmentHead,
    decode_head,
    decode_segment_head,
    encode_head,
    encode_segment_head,
    note,
    segment_name,
    segment_number,
)

MARKER = b"\x01marker\xff"
FEW = 60

hashes = st.binary(min_size=32, max_size=32)
u32 = st.integers(0, 2**32 - 1)
facts = st.builds(
    EntryFacts,
    key=st.builds(EntryKey, st.sampled_from(KINDS), hashes),
    parent=st.one_of(st.just(b""), hashes),
    depth=st.integers(0, 1 << 20),
    size_bytes=st.integers(1, 32 * 1024 * 1024),
    crc=u32,
    band=st.sampled_from(Band),
    tenant=st.text(st.characters(exclude_categories=["Cs"]), max_size=200),
    cost_tokens=st.integers(0, 10**9),
    cost_ms=st.floats(0, 1e9),
    layout=st.one_of(st.just(b""), st.binary(min_size=8, max_size=8)),
    pin_ms=st.just(0),  # a put's wish; a record has the instant at which its pin ends
)
heads = st.builds(Head, st.just(Op.ENTRY), facts, st.integers(0, TIME_MS_MAX))


@given(heads)
@settings(max_examples=FEW)
def test_a_head_is_read_as_it_was_written(head: Head) -> None:
    assert decode_head(encode_head(head, MARKER), MARKER) == head


@given(heads, st.data())
@settings(max_examples=FEW)
def test_a_head_with_a_wrong_bit_is_none(head: Head, data: st.DataObject) -> None:
    encoded = bytearray(encode_head(head, MARKER))
    bit = data.draw(st.integers(0, len(encoded) * 8 - 1))
    encoded[bit // 8] ^= 1 << bit % 8
    assert decode_head(encoded, MARKER) is None
    assert decode_head(encode_head(head, MARKER), b"another!") is None


@given(st.binary(max_size=400))
@settings(max_examples=FEW)
def test_random_bytes_are_no_head(data: bytes) -> None:
    assert decode_head(data, MARKER) is None
    assert decode_head(MARKER + data, MARKER) is None
    assert decode_segment_head(data) is None


def test_a_right_crc_over_nonsense_is_not_enough() -> None:
    """A head whose fields are beyond their limits is refused though its checksum is right."""
    entry = facts_of("x", b"x" * 10)
    assert decode_head(encode_head(Head(Op.PIN, entry, 0), MARKER), MARKER) is None
    empty = facts_of("x", b"")
    assert decode_head(encode_head(Head(Op.ENTRY, empty, 0), MARKER), MARKER) is None


def test_segment_heads_and_names() -> None:
    head = SegmentHead(7, 1_700_000_000_000, b"12345678")
    assert decode_segment_head(encode_segment_head(head)) == head
    assert len(encode_segment_head(head)) == SEGMENT_HEAD_BYTES
    assert segment_number(segment_name(123)) == 123
    for name in ("lock", "123.segment", "x" * 16 + ".segment", segment_name(1) + "~"):
        assert segment_number(name) is None


def write_segment(files: Files, number: int, count: int, *, sealed: bool = False) -> Segment:
    """A segment of `count` entries named (number, 0), (number, 1), … and a pin of the first."""
    segment = create_segment(files, number, 0)
    for index in range(count):
        data = data_of((number, index), 300 + index)
        segment.append(Head(Op.ENTRY, facts_of((number, index), data), 0), data)
    segment.append(note(Op.PIN, EntryKey("kv", hash_of((number, 0))), until_ms=5))
    if sealed:
        segment.seal()
    return segment


def scan_of(files: Files, segment: Segment) -> Scan:
    return Reader(files, segment.fd, files.size(segment.fd), segment.marker).scan()


def directory(tmp_path: Path) -> Files:
    tmp_path.mkdir(exist_ok=True)
    return Files(tmp_path)


def test_by_index_and_by_walking_the_same_is_found(tmp_path: Path) -> None:
    files = directory(tmp_path)
    unsealed, sealed = write_segment(files, 1, 20), write_segment(files, 2, 20, sealed=True)
    walked, listed = scan_of(files, unsealed), scan_of(files, sealed)
    assert not walked.sealed and listed.sealed
    assert len(walked.records) == len(listed.records) == 21
    assert [each.offset for each in walked.records] == [each.offset for each in listed.records]
    assert walked.end == listed.end == unsealed.end
    assert unsealed.charged_bytes == sealed.charged_bytes == files.size(sealed.fd)
    for found in listed.records[:-1]:
        assert os.pread(sealed.fd, 32, found.offset + found.head_bytes) == found.head.facts.key.hash
    for segment in (unsealed, sealed):
        files.close(segment.fd)


def test_what_a_record_takes_is_known_before_it_is_written(tmp_path: Path) -> None:
    files = directory(tmp_path)
    segment = create_segment(files, 1, 0)
    for tenant in ("", "t", "ténant" * 20):
        data = data_of(tenant, 500)
        head = Head(Op.ENTRY, facts_of(tenant, data, tenant=tenant), 0)
        before = segment.charged_bytes
        segment.append(head, data)
        assert segment.charged_bytes - before == record_bytes(head)
    segment.seal()
    assert segment.charged_bytes == files.size(segment.fd)
    files.close(segment.fd)


def test_a_tail_torn_anywhere_costs_only_itself(tmp_path: Path) -> None:
    """Cut at every byte of the last two records: those before are there, none is half there."""
    files = directory(tmp_path)
    segment = write_segment(files, 1, 5)
    whole = scan_of(files, segment)
    for size in range(files.size(segment.fd), whole.records[3].offset, -7):
        os.ftruncate(segment.fd, size)
        scan = scan_of(files, segment)
        assert scan.records == [each for each in whole.records if each.end <= size]
        assert scan.end <= size
    files.close(segment.fd)


def test_a_torn_index_leaves_the_records(tmp_path: Path) -> None:
    files = directory(tmp_path)
    segment = write_segment(files, 1, 5, sealed=True)
    whole = scan_of(files, segment)
    for size in range(files.size(segment.fd) - 1, whole.end, -5):
        os.ftruncate(segment.fd, size)
        scan = scan_of(files, segment)
        assert scan.records == whole.records and scan.end == whole.end and not scan.sealed
    files.close(segment.fd)


@given(st.data())
@settings(max_examples=FEW, deadline=None)
def test_flipped_bytes_never_make_a_record(tmp_path_factory: object, data: st.DataObject) -> None:
    """Whatever was flipped: records that are found are records that were written, at their place.

    What was lost is at most what was flipped; the rest is found behind it.
    """
    files = Files(tmp_path_factory.mktemp("segments"))  # type: ignore[attr-defined]
    sealed = data.draw(st.booleans())
    segment = write_segment(files, 1, 8, sealed=sealed)
    whole = scan_of(files, segment)
    size = files.size(segment.fd)
    content = bytearray(os.pread(segment.fd, size, 0))
    flips = data.draw(st.lists(st.integers(SEGMENT_HEAD_BYTES, size - 1), max_size=4))
    for at in flips:
        content[at] ^= data.draw(st.integers(1, 255))
    os.ftruncate(segment.fd, 0)
    os.write(segment.fd, content)
    scan = scan_of(files, segment)
    assert all(found in whole.records for found in scan.records)
    assert len(scan.records) >= len(whole.records) - len(flips)
    files.close(segment.fd)


@given(st.binary(max_size=3000), st.integers(0, 3))
@settings(max_examples=FEW, deadline=None)
def test_nonsense_in_a_file_is_survived(
    tmp_path_factory: object, noise: bytes, markers: int
) -> None:
    """Random bytes, sprinkled with the marker, yield no record and no error."""
    files = Files(tmp_path_factory.mktemp("segments"))  # type: ignore[attr-defined]
    segment = create_segment(files, 1, 0)
    os.write(segment.fd, segment.marker.join([noise] * (markers + 1)))
    assert scan_of(files, segment).records == []
    files.close(segment.fd)


def test_an_entry_that_looks_like_a_record_is_not_one(tmp_path: Path) -> None:
    """A client writes records into its bytes; the head before them is lost; none counts."""
    files = directory(tmp_path)
    segment = create_segment(files, 1, 0)
    forged_data = b"forged" * 50
    forged = Head(Op.ENTRY, facts_of("victim", forged_data), 0)
    data = b"".join(encode_head(forged, bytes([i]) * MARKER_BYTES) + forged_data for i in range(99))
    found = segment.append(Head(Op.ENTRY, facts_of("attacker", data), 0), data)
    path = files.directory / segment.name
    with path.open("r+b") as file:
        file.seek(found.offset + 20)
        file.write(b"\xff")
    scan = scan_of(files, segment)
    assert scan.records == [] and scan.lost == 1
    assert checksum(data) == found.head.facts.crc
    files.close(segment.fd)
