"""Traces of two formats: read whole, or refused with file and line."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from headrace_sim.trace import TraceError, TraceRequest, read_trace
from headrace_sim.workload import prefix_blocks
from simulation.builders import TRACES

MOONCAKE = (
    '{"timestamp": 100, "input_length": 600, "output_length": 5, "hash_ids": [7, 8]}\n'
    "\n"
    '{"timestamp": 50, "input_length": 512, "output_length": 0, "hash_ids": [7]}\n'
)
AZURE = (
    "TIMESTAMP,ContextTokens,GeneratedTokens\r\n"
    "2023-11-16 18:15:46.6805900,374,44\r\n"
    "2023-11-16 18:15:50.9951690,396,109\r\n"
)
ZONED = (
    "TIMESTAMP,ContextTokens,GeneratedTokens\n"
    "2024-05-10 00:00:00.009930+00:00,2162,5\n"
    "2024-05-10 02:00:01.009930+02:00,2399,6\n"
)


def write(folder: Path, text: str | bytes) -> Path:
    path = folder / "trace"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_mooncake_lines_become_requests_in_order_of_time(tmp_path: Path) -> None:
    """The first is at 0, an empty answer still has its end, blank lines are nothing."""
    trace = read_trace(write(tmp_path, MOONCAKE))
    assert trace.block_tokens == 512
    assert trace.requests == (
        TraceRequest(0.0, 512, 1, (7,)),
        TraceRequest(50.0, 600, 5, (7, 8)),
    )
    assert trace.span_ms == 100.0


@pytest.mark.parametrize(("text", "gap_ms"), [(AZURE, 4314.579), (ZONED, 1_000.0)])
def test_azures_both_years_are_read(tmp_path: Path, text: str, gap_ms: float) -> None:
    trace = read_trace(write(tmp_path, text))
    assert trace.requests[1].at_ms == pytest.approx(gap_ms)
    assert [r.blocks for r in trace.requests] == [(), ()]


def test_a_limit_reads_no_further(tmp_path: Path) -> None:
    trace = read_trace(write(tmp_path, AZURE + "nonsense\n"), limit=2)
    assert len(trace.requests) == 2


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "column TIMESTAMP"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n\n", "holds no requests"),
        ("a,b,c\n1,2,3\n", "column TIMESTAMP"),
        (AZURE + "2023-11-16 18:16:00,374\n", ":4: has 2 columns"),
        (AZURE + "yesterday,374,44\n", ":4: TIMESTAMP is no date"),
        (AZURE + "2023-11-16 18:16:00,-1,44\n", ":4: ContextTokens has to be"),
        (AZURE + "2023-11-16 18:16:00,1,4e9\n", ":4: GeneratedTokens has to be"),
        ("{\n", ":1: not JSON"),
        (MOONCAKE + "[]\n", ":4: expected an object"),
        ('{"timestamp": "0"}\n', ":1: timestamp has to be"),
        ('{"timestamp": NaN}\n', ":1: timestamp has to be"),
        ('{"timestamp": 0, "input_length": true}\n', ":1: input_length"),
        (MOONCAKE.replace("512", "5").replace("[7]", "[1, 2]"), "more than"),
        (MOONCAKE.replace("[7]", "[-7]"), ":3: hash_ids has to be"),
        (b"\xff\xfe{", "cannot be read"),
    ],
)
def test_what_is_wrong_is_told_with_its_place(tmp_path: Path, text: str, told: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(TraceError) as error:
        read_trace(path)
    assert told in error.value.message
    assert str(path) in error.value.message


def test_a_missing_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="cannot be read"):
        read_trace(tmp_path / "none")


@settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.one_of(
        st.binary(max_size=200),
        st.text(max_size=200).map(lambda text: (AZURE + text).encode("utf-8", "replace")),
        st.text(max_size=200).map(lambda text: (MOONCAKE + "{" + text).encode("utf-8", "replace")),
    )
)
@example(b'{"timestamp":' + b"[" * 20_000)
@example(b'TIMESTAMP,ContextTokens,GeneratedTokens\n"')
@example(("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-01-01," + "\u0663" + ",1\n").encode())
def test_whatever_a_file_holds_it_is_read_or_refused(tmp_path: Path, data: bytes) -> None:
    try:
        trace = read_trace(write(tmp_path, data))
    except TraceError:
        return
    assert trace.requests[0].at_ms == 0
    assert all(r.input_tokens > 0 and r.output_tokens > 0 for r in trace.requests)


def test_the_last_prefix_block_is_as_long_as_what_kv_blocks_hold() -> None:
    assert prefix_blocks(TraceRequest(0, 600, 1, (7, 8)), 512, 100) == ((107, 512), (108, 80))
    assert prefix_blocks(TraceRequest(0, 520, 1, (7, 8)), 512, 0) == ((7, 512),)
    assert prefix_blocks(TraceRequest(0, 1024, 1, (7, 8)), 512, 0) == ((7, 512), (8, 512))
    assert prefix_blocks(TraceRequest(0, 5_000, 1, (7,)), 512, 0) == ((7, 512),)


@pytest.mark.skipif(not TRACES.exists(), reason="the shared traces are not here")
@pytest.mark.parametrize(
    ("name", "count"),
    [("mooncake_conversation.jsonl", 12_031), ("azure_2023_conversation.csv", 19_366)],
)
def test_the_shared_traces_are_read_whole(name: str, count: int) -> None:
    trace = read_trace(TRACES / name)
    assert len(trace.requests) == count
    assert 3_400_000 < trace.span_ms < 3_600_000
