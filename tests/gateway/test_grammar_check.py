"""The grammar checker: hostile texts cost their own request a 400, and nobody else anything."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from headrace import grammars
from headrace.errors import CallerError, DependencyError, OverloadError
from headrace.grammars import Grammars
from headrace.types import ModelRecord
from headrace_gateway import grammar_check
from headrace_gateway.grammar_check import GrammarChecker
from support.api import make_record
from support.hostile import HOSTILE

TESTS = Path(__file__).parent.parent
PATIENCE_S = 20.0
"""For machines where a second of work takes longer; limits of processor time stay as they are."""
AT_ONCE = 4


@pytest.fixture
async def checker() -> AsyncIterator[GrammarChecker]:
    checker = GrammarChecker(PATIENCE_S)
    yield checker
    await checker.close()


@pytest.fixture
def record() -> ModelRecord:
    return make_record()


@pytest.fixture
def unruly(monkeypatch: pytest.MonkeyPatch) -> None:
    script = TESTS / "support" / "unruly_compiler.py"
    monkeypatch.setattr(grammar_check, "COMMAND", (sys.executable, str(script)))


async def refusal(checker: GrammarChecker, record: ModelRecord, grammar: str) -> CallerError:
    with pytest.raises(CallerError) as told:
        await checker.check(record, grammar)
    return told.value


async def compiler_pid(checker: GrammarChecker, record: ModelRecord) -> int:
    """Of the unruly compiler, which tells it."""
    return int((await refusal(checker, record, "tell")).message.removeprefix("pid "))


def runs(pid: int) -> bool:
    """Whether there is such a process, other than one that its parent has not collected."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


async def ended(pid: int) -> None:
    while runs(pid):
        await asyncio.sleep(0.01)


async def test_good_and_bad_grammars_are_told_apart(
    checker: GrammarChecker, record: ModelRecord
) -> None:
    for _ in range(2):
        await checker.check(record, grammars.json_object())
        wrong = await refusal(checker, record, grammars.regex("a["))
        assert (wrong.code, wrong.status) == ("invalid_grammar", 400)
        assert "unclosed character class" in wrong.message
        huge = await refusal(checker, record, grammars.regex("(x{10000}){10000}"))
        assert (huge.code, huge.status) == ("grammar_too_complex", 400)


async def test_hostile_texts_are_refused_or_bounded_while_honest_ones_pass(
    checker: GrammarChecker, record: ModelRecord
) -> None:
    """Several at a time, each time with an honest check that nobody made before."""
    assert len(HOSTILE) >= 50
    compiler = Grammars(record)
    codes: dict[str, str] = {}

    async def provoke(name: str) -> None:
        try:
            grammar = HOSTILE[name]()
            await checker.check(record, grammar)
        except CallerError as error:
            codes[name] = error.code or ""
            assert error.status == 400
            return
        codes[name] = ""
        matcher = compiler.compile(grammar)
        assert matcher.forced() or any(matcher.mask())
        assert not matcher.failure

    names = list(HOSTILE)
    for at in range(0, len(names), AT_ONCE):
        honest = grammars.choice([f"honest {at}", "other"])
        async with asyncio.timeout(PATIENCE_S):
            await asyncio.gather(
                *map(provoke, names[at : at + AT_ONCE]), checker.check(record, honest)
            )
    assert set(codes.values()) == {"", "invalid_grammar", "grammar_too_complex"}
    assert len(codes) == len(HOSTILE)
    for name in ("a repeated repetition", "multiples of a large prime", "4,000 optional keys"):
        assert codes[name] == "grammar_too_complex", name


async def test_a_check_is_made_once_however_many_ask(
    checker: GrammarChecker, record: ModelRecord, unruly: None
) -> None:
    """Also when the one that asked first leaves."""
    first = asyncio.create_task(checker.check(record, "tell 1"))
    others = [asyncio.create_task(refusal(checker, record, "tell 1")) for _ in range(20)]
    await asyncio.sleep(0)
    first.cancel()
    pids = {error.message for error in await asyncio.gather(*others)}
    assert len(pids) == 1
    pid = int(pids.pop().removeprefix("pid "))
    os.kill(pid, signal.SIGKILL)
    await ended(pid)
    assert (await refusal(checker, record, "tell 1")).message == f"pid {pid}", "it is remembered"
    assert await compiler_pid(checker, record) != pid, "for another one there is a new process"


@pytest.mark.parametrize("what", ["spin", "memory", "abort"])
async def test_a_fork_that_goes_too_far_takes_nothing_with_it(
    what: str, checker: GrammarChecker, record: ModelRecord, unruly: None
) -> None:
    pid = await compiler_pid(checker, record)
    told = await asyncio.gather(
        *(refusal(checker, record, f"{what} {at}") for at in range(3)),
        refusal(checker, record, "tell again"),
    )
    *hostile, honest = told
    assert {error.code for error in hostile} == {"grammar_too_complex"}
    assert honest.message == f"pid {pid}"


async def test_without_time_nothing_is_said_about_a_grammar(
    record: ModelRecord, unruly: None
) -> None:
    """A fork that waits has used no processor: that is the machine's fault, and not remembered."""
    checker = GrammarChecker(0.2)
    for _ in range(2):
        with pytest.raises(OverloadError) as told:
            await checker.check(record, "sleep")
        assert told.value.code == "grammar_check_busy"
        assert told.value.retry_after_ms
    await checker.close()


async def test_many_that_wait_do_not_keep_others_for_longer_than_the_limit(
    record: ModelRecord, unruly: None
) -> None:
    checker = GrammarChecker(0.5)
    asleep = [asyncio.create_task(checker.check(record, f"sleep {at}")) for at in range(30)]
    told = await asyncio.gather(*asleep, return_exceptions=True)
    assert {type(error) for error in told} == {OverloadError}
    assert await compiler_pid(checker, record)
    await checker.close()


async def test_a_compiler_that_died_is_replaced(
    checker: GrammarChecker, record: ModelRecord, unruly: None
) -> None:
    pid = await compiler_pid(checker, record)
    os.kill(pid, signal.SIGKILL)
    await ended(pid)
    told = await refusal(checker, record, "tell me")
    assert told.message != f"pid {pid}"


async def test_a_compiler_that_hangs_is_replaced(
    record: ModelRecord, unruly: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grammar_check, "GRACE_S", 0.5)
    checker = GrammarChecker(1.0)
    pid = await compiler_pid(checker, record)
    os.kill(pid, signal.SIGSTOP)
    told = await refusal(checker, record, "tell me")
    assert told.message not in ("", f"pid {pid}")
    await ended(pid)
    await checker.close()


async def test_a_vocabulary_that_cannot_be_read_is_the_callers_answer(
    checker: GrammarChecker, record: ModelRecord, unruly: None
) -> None:
    for _ in range(2):
        told = await refusal(checker, replace(record, name="broken"), "tell")
        assert told.code == "grammar_unsupported"


async def test_a_compiler_that_never_starts_is_a_dependency_away(
    checker: GrammarChecker, record: ModelRecord, unruly: None
) -> None:
    with pytest.raises(DependencyError, match="does not answer"):
        await checker.check(replace(record, name="dead"), "tell")


async def test_few_models_have_a_compiler_at_a_time(
    checker: GrammarChecker, record: ModelRecord, unruly: None
) -> None:
    """The least recently used one goes, and comes back when it is asked for."""
    pids = []
    for at in range(grammar_check.PROCESSES_MAX + 1):
        named = replace(record, name=f"m{at}", fingerprint=f"f{at}")
        pids.append(await compiler_pid(checker, named))
    await ended(pids[0])
    again = await refusal(checker, replace(record, fingerprint="f0"), "tell again")
    assert again.message.removeprefix("pid ") not in map(str, pids)


async def test_compilers_end_with_the_checker_and_with_the_gateway(
    record: ModelRecord, unruly: None
) -> None:
    checker = GrammarChecker(PATIENCE_S)
    pid = await compiler_pid(checker, record)
    await checker.close()
    await ended(pid)


GATEWAY = """
import asyncio, os, signal, sys
sys.path.insert(0, {tests!r})
from headrace_gateway import grammar_check
from support.api import make_record

async def main():
    grammar_check.COMMAND = (sys.executable, {script!r})
    checker = grammar_check.GrammarChecker(20.0)
    try:
        await checker.check(make_record(), "tell")
    except Exception as told:
        print(told.message.removeprefix("pid "), flush=True)
    asyncio.ensure_future(checker.check(make_record(), "sleep"))
    await asyncio.sleep(0.1)
    os.kill(os.getpid(), signal.SIGKILL)

asyncio.run(main())
"""


async def test_a_killed_gateway_leaves_no_compiler_behind() -> None:
    script = str(TESTS / "support" / "unruly_compiler.py")
    code = GATEWAY.format(tests=str(TESTS), script=script)
    gateway = await asyncio.create_subprocess_exec(
        sys.executable, "-c", code, stdout=subprocess.PIPE
    )
    said, _ = await gateway.communicate()
    assert gateway.returncode == -signal.SIGKILL
    await ended(int(said))
