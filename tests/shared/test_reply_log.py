"""Whatever happens to attempts, the log holds each position once and in order."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from headrace.policy.reply_log import ReplyLog
from headrace.types import Delta, Finish, FinishReason

END = Finish(FinishReason.LENGTH)


def test_positions_that_stand_already_are_dropped() -> None:
    log = ReplyLog()
    assert log.accept(Delta("j", 1, 0, (1, 2))) == (1, 2)
    assert log.accept(Delta("j", 1, 0, (1, 2))) == ()
    assert log.accept(Delta("j", 1, 1, (2, 3))) == (3,)
    assert log.tokens == [1, 2, 3]


def test_nothing_counts_behind_the_finish() -> None:
    log = ReplyLog()
    log.accept(Delta("j", 1, 0, (1,), END))
    assert log.accept(Delta("j", 2, 1, (2,))) == ()
    assert log.tokens == [1]


def test_a_gap_in_the_current_attempt_is_seen_and_one_of_a_stale_attempt_is_not() -> None:
    log = ReplyLog()
    log.accept(Delta("j", 2, 0, (1,)))
    assert log.is_gap(Delta("j", 2, 5, (9,)))
    assert not log.is_gap(Delta("j", 1, 5, (9,)))


def _take(log: ReplyLog, delta: Delta) -> tuple[int, ...]:
    """As the gateway does: without a look at what merely goes on."""
    if delta.finish is None and log.extend(
        delta.attempt, delta.first, delta.tokens, delta.cached_tokens
    ):
        return delta.tokens
    return log.accept(delta)


@given(st.data())
def test_every_reader_and_every_next_attempt_agree(data: st.DataObject) -> None:
    """Workers die, wake up and write late, frames are repeated; two readers see one stream.

    Each attempt starts from what the dispatcher read up to its fence. Tokens are labelled with
    the attempt that made them, so a token of a fenced attempt behind the fence would show.
    """
    stream: list[Delta] = []
    position, attempt = 0, 1
    zombies: list[Delta] = []
    for _ in range(data.draw(st.integers(1, 5), label="attempts")):
        for _ in range(data.draw(st.integers(0, 4), label="steps")):
            count = data.draw(st.integers(1, 3))
            step = Delta("j", attempt, position, (attempt * 1000 + position,) * count)
            stream.append(step)
            if data.draw(st.booleans(), label="sent twice"):
                stream.append(step)
            if zombies and data.draw(st.booleans(), label="a zombie writes"):
                stream.append(data.draw(st.sampled_from(zombies)))
            position += count
        zombies.append(Delta("j", attempt, position, (666, 666)))
        attempt += 1
        stream.append(Delta("j", attempt, 0))
        dispatcher = ReplyLog()
        for delta in stream:
            dispatcher.accept(delta)
        assert len(dispatcher.tokens) == position
    stream.append(Delta("j", attempt, position, (7,), END))
    gateway = ReplyLog()
    got = [token for delta in stream for token in _take(gateway, delta)]
    gateway.check_integrity()
    assert len(got) == position + 1
    assert 666 not in got
    assert gateway.finish is END
