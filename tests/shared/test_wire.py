"""The wire format: what is packed comes back, what is malformed is refused by name."""

from __future__ import annotations

import contextlib
from dataclasses import replace

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace import wire, wire_reports
from headrace.errors import WireError
from headrace.types import (
    BLOCK_KEY_BYTES,
    Band,
    BlockSnapshot,
    Board,
    CacheMode,
    Delta,
    Finish,
    FinishReason,
    Job,
    JobDone,
    JobProgress,
    Progress,
    Sampling,
    TokenLogprobs,
    WorkerState,
    WorkerStatus,
    pack_tokens,
)
from support.fleet import MODEL

tokens = st.lists(st.integers(0, 2**32 - 1), max_size=40)
jobs = st.builds(
    Job,
    id=st.text(max_size=20),
    model=st.text(max_size=20),
    tenant=st.text(max_size=20),
    band=st.sampled_from(Band),
    arrived_ms=st.integers(0, 2**50),
    gateway=st.text(max_size=20),
    prompt=tokens.map(pack_tokens),
    sampling=st.builds(
        Sampling,
        max_tokens=st.integers(1, 2**31),
        temperature=st.floats(0, 2),
        top_p=st.floats(0, 1),
        top_k=st.integers(0, 1000),
        seed=st.integers(-(2**63), 2**63 - 1),
        stop_token_ids=st.lists(st.integers(0, 2**31), max_size=4).map(tuple),
        ignore_eos=st.booleans(),
        min_p=st.floats(0, 1),
        typical_p=st.floats(0, 1),
        presence_penalty=st.floats(-2, 2),
        frequency_penalty=st.floats(-2, 2),
        repetition_penalty=st.floats(0.1, 2),
        logit_bias=st.lists(
            st.tuples(st.integers(0, 2**32 - 1), st.floats(-100, 100)), max_size=3
        ).map(tuple),
        min_tokens=st.integers(0, 2**31),
        bad_words=st.lists(tokens.map(tuple), max_size=3).map(tuple),
        logprobs=st.integers(-1, 20),
        prompt_logprobs=st.integers(-1, 20),
        grammar=st.text(max_size=40),
    ),
    salt=st.binary(max_size=40),
    affinity=st.binary(max_size=40),
    attempt=st.integers(1, 2**31),
    logged=tokens.map(pack_tokens),
    trace=st.dictionaries(st.text(max_size=10), st.text(max_size=60), max_size=2),
    priority=st.integers(-600, 600),
    weight=st.floats(0.01, 100),
    virtual=st.floats(0, 1e12),
    ttft_by_ms=st.integers(0, 2**50),
    done_by_ms=st.integers(0, 2**50),
    expected_tokens=st.integers(0, 2**31),
    cached_tokens=st.integers(0, 2**31),
    blocks=st.binary(max_size=40),
    cache_until_tokens=st.integers(0, 2**31),
    cache_ttl_ms=st.integers(0, 2**31),
    cache_mode=st.sampled_from(CacheMode),
)
block_keys = st.lists(st.binary(min_size=8, max_size=8), max_size=5).map(b"".join)
counts = st.integers(0, 2**40)
job_progress = st.builds(JobProgress, st.text(max_size=20), counts, counts, counts)
events = st.one_of(
    st.builds(
        Progress,
        st.text(max_size=20),
        counts,
        st.lists(job_progress, max_size=4).map(tuple),
        block_keys,
        block_keys,
        counts,
        counts,
        counts,
    ),
    st.builds(JobDone, st.text(max_size=20), job_progress, st.sampled_from(FinishReason)),
)
finishes = st.builds(Finish, st.sampled_from(FinishReason), st.text(max_size=30))
token_logprobs = st.builds(
    TokenLogprobs,
    st.floats(-100, 0),
    st.lists(st.tuples(st.integers(0, 2**32 - 1), st.floats(-100, 0)), max_size=3).map(tuple),
)


@st.composite
def made_deltas(draw: st.DrawFn) -> Delta:
    made = draw(st.lists(st.tuples(st.integers(0, 2**32 - 1), token_logprobs), max_size=8))
    return Delta(
        draw(st.text(max_size=20)),
        draw(st.integers(1, 2**31)),
        draw(st.integers(0, 2**31)),
        tuple(token for token, _ in made),
        draw(st.none() | finishes),
        logprobs=tuple(item for _, item in made) if draw(st.booleans()) else (),
        prompt_logprobs=tuple(draw(st.lists(token_logprobs, max_size=3))),
        cache_write_tokens=draw(st.integers(0, 2**31)),
    )


deltas = made_deltas() | st.builds(
    Delta,
    st.text(max_size=20),
    st.integers(1, 2**31),
    st.integers(0, 2**31),
    tokens.map(tuple),
    st.none() | finishes,
    st.integers(0, 2**31),
)


@given(jobs)
def test_a_job_survives_the_wire(job: Job) -> None:
    assert wire.decode_job(wire.encode_job(job)) == job


@given(st.lists(deltas, max_size=8))
def test_a_steps_deltas_survive_the_wire(step: list[Delta]) -> None:
    assert wire.decode_deltas(wire.encode_deltas(step)) == step


def test_status_and_board_survive_the_wire() -> None:
    status = WorkerStatus(WorkerState.DRAINING, 3, 2, 100, 9)
    assert wire_reports.decode_status(wire_reports.encode_status(status)) == status
    board = Board("g", 5, (1, 2, 3), (4, 5, 6), (7, 8, 9), 5, 6, 7, 8.5, 9.5, (1.5, 2.5, 3.5), 4)
    assert wire_reports.decode_board(wire_reports.encode_board(board)) == board
    assert board.queued_tokens == 15


@given(events)
def test_workers_reports_survive_the_wire(event: Progress | JobDone) -> None:
    encode = {Progress: wire_reports.encode_progress, JobDone: wire_reports.encode_done}
    assert wire_reports.decode_event(encode[type(event)](event)) == event  # type: ignore[operator]


@given(block_keys, counts)
def test_snapshots_places_and_news_survive_the_wire(blocks: bytes, number: int) -> None:
    snapshot = BlockSnapshot(number, blocks)
    assert wire_reports.decode_snapshot(wire_reports.encode_snapshot(snapshot)) == snapshot
    places = {"a": (1, number), "b": (2, 0)}
    assert wire_reports.decode_positions(wire_reports.encode_positions(places)) == places
    assert wire_reports.decode_event(wire_reports.encode_news("join", "w")) == "join"


def test_block_keys_that_are_cut_short_are_refused() -> None:
    half = b"\0" * (BLOCK_KEY_BYTES // 2)
    for report in (Progress("w", 1, stored=half), Progress("w", 1, removed=half)):
        with pytest.raises(WireError, match="block keys"):
            wire_reports.decode_event(wire_reports.encode_progress(report))
    with pytest.raises(WireError, match="block keys"):
        wire_reports.decode_snapshot(wire_reports.encode_snapshot(BlockSnapshot(1, half)))


@given(st.binary(max_size=200))
def test_random_bytes_are_refused_and_nothing_else_happens(data: bytes) -> None:
    for decode in (
        wire.decode_job, wire.decode_deltas, wire.decode_model, wire.decode_worker,
        wire_reports.decode_status, wire_reports.decode_board, wire_reports.decode_event,
        wire_reports.decode_snapshot, wire_reports.decode_positions,
    ):  # fmt: skip
        with contextlib.suppress(WireError):
            decode(data)


@given(jobs, st.data())
def test_a_job_with_one_field_of_a_wrong_kind_is_refused_by_name(
    job: Job, data: st.DataObject
) -> None:
    fields = wire.unpack(wire.encode_job(job))
    name = data.draw(st.sampled_from(sorted(fields)))
    fields[name] = data.draw(st.sampled_from([None, [None], {"a": 1.5}, object.__name__, 0.5]))
    try:
        wire.decode_job(wire.pack(fields))
    except WireError as error:
        assert f"job.{name}" in error.message
    else:
        # the replacement happened to be of the right kind
        assert isinstance(fields[name], str | float)


def test_extension_types_are_refused() -> None:
    """The door through which other systems' msgpack let pickles in."""
    for payload in (b"", b"payload"):
        with pytest.raises(WireError, match=r"extension type|max_ext_len"):
            wire.unpack(msgpack.packb(msgpack.ExtType(42, payload)))


@pytest.mark.parametrize(
    "data",
    [b"\xdd\xff\xff\xff\xff", b"\x91" * 5_000, b"\xc6\xff\xff\xff\xff", b"", b"\x01\x02"],
    ids=["huge array", "deep", "huge bytes", "nothing", "two values"],
)
def test_bombs_are_refused(data: bytes) -> None:
    with pytest.raises(WireError):
        wire.unpack(data)


def test_a_large_tokenizer_travels_and_a_bomb_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gemma's JSON is larger than any string may be, and compresses; inflating it is bounded."""
    large = replace(MODEL, tokenizer_json=b'"token": 12345,' * 2_000_000)
    assert len(large.tokenizer_json) > wire.STRING_BYTES_MAX
    packed = wire.encode_model(large)
    assert wire.decode_model(packed) == large
    monkeypatch.setattr(wire, "TOKENIZER_BYTES_MAX", 1_000_000)
    with pytest.raises(WireError, match=r"model\.tokenizer"):
        wire.decode_model(packed)
    fields = wire.unpack(wire.encode_model(MODEL))
    for broken in (b"no zlib", fields["tokenizer"][:-1]):
        with pytest.raises(WireError, match=r"model\.tokenizer"):
            wire.decode_model(wire.pack(fields | {"tokenizer": broken}))
