"""Frames of a worker that fell behind: fewer rows, the same tokens."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from headrace.policy.reply_log import ReplyLog
from headrace.types import Delta, TokenLogprobs
from headrace_worker.publisher import _frames


@given(st.data())
def test_what_is_joined_reads_as_what_was_said(data: st.DataObject) -> None:
    """Several jobs' steps, with attempts that end, logprobs, repetitions and empty deltas."""
    deltas: list[Delta] = []
    at = {"a": 0, "b": 0}
    attempts = {"a": 1, "b": 1}
    for _ in range(data.draw(st.integers(1, 20))):
        job = data.draw(st.sampled_from(["a", "b"]))
        if data.draw(st.integers(0, 9)) == 0:
            attempts[job] += 1
        count = data.draw(st.integers(0, 3))
        tokens = tuple(range(at[job], at[job] + count))
        scored = job == "b"
        logprobs = tuple(TokenLogprobs(-float(token)) for token in tokens) if scored else ()
        first, written = at[job], data.draw(st.integers(0, 2))
        deltas.append(Delta(job, attempts[job], first, tokens, None, 3, logprobs, (), written))
        if data.draw(st.booleans()):
            at[job] += count  # else the same positions come again
    said = {job: ReplyLog() for job in at}
    read = {job: ReplyLog() for job in at}
    for delta in deltas:
        said[delta.job].accept(delta)
    joined = [delta for frame in _frames(deltas) for delta in frame]
    for delta in joined:
        read[delta.job].accept(delta)
    for job in at:
        assert vars(read[job]) == vars(said[job])


def test_steps_of_one_job_become_one_row() -> None:
    deltas = [Delta("a", 1, at, (at,)) for at in range(5)]
    assert _frames(deltas) == [[Delta("a", 1, 0, (0, 1, 2, 3, 4))]]
