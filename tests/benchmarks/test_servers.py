"""The comparison of servers: what is asked of them, in which order, and what is made of it."""

from __future__ import annotations

import asyncio
import json
import random
import sys
from collections.abc import Iterable, Sequence
from itertools import pairwise, product
from pathlib import Path
from string import ascii_lowercase
from typing import Any

import pytest
from bench import _server_report as report
from bench import servers
from bench._load import Lag
from bench._server_load import (
    WORKLOADS,
    Reply,
    Request,
    Words,
    Workload,
    _read,
    body,
    figures,
    requests_of,
)
from bench._server_process import Live, Server, _born
from hypothesis import given, settings
from hypothesis import strategies as st

from support import openai_server

FAKE = Path(openai_server.__file__)


def words() -> Words:
    """A tokenizer by spaces, with 676 words that it knows and some that it does not."""
    known = {f"w{a}{b}": n for n, (a, b) in enumerate(product(ascii_lowercase, repeat=2))}

    def encode(text: str) -> list[int]:
        parts = [part for part in text.split(" ") if part]
        return [n for part in parts for n in ([known[part]] if part in known else [0, 0])]

    return Words(encode, [*(f"Ġ{word}" for word in known), "Ġunknown", "Ġ12", "plain"])


# --- what is typed


def test_a_server_is_a_url_or_a_command() -> None:
    assert Server.parse("a=http://h:1/v1/") == Server("a", url="http://h:1")
    assert Server.parse("b=http://h:1,pid=77") == Server("b", url="http://h:1", pid=77)
    made = Server.parse("c-8.2=env X=1 run 'two words' --port {port} -d {folder}/x")
    assert made.argv(9, Path("/f")) == (
        ["env", "X=1", "run", "two words", "--port", "9", "-d", "/f/x"]
    )


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("http://h:1", "NAME=URL"),
        ("=http://h:1", "NAME=URL"),
        ("a b=http://h:1", "NAME=URL"),
        ("a=", "NAME=URL"),
        ("a=http://h:1,pid=x", "pid=NUMBER"),
        ("a=http://h:1,cpu=2", "pid=NUMBER"),
        ("a=run --port 80", "{port}"),
        ("a=run '{port}", "split"),
    ],
)
def test_what_is_no_server_is_said(text: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Server.parse(text)


@given(st.text(max_size=60) | st.text("ab=:,{}'\"/ portpidhttp8", max_size=60))
def test_any_text_is_a_server_or_an_error_that_says_why(text: str) -> None:
    try:
        made = Server.parse(text)
    except ValueError:
        return
    assert made.name
    assert bool(made.url) != bool(made.command)
    assert not made.command or made.argv(1, Path("/f"))


def test_a_workload_is_a_name_with_changes() -> None:
    """Its number of requests is scaled, never below its streams."""
    assert Workload.parse("unique-8") == WORKLOADS["unique-8"]
    assert Workload.parse("unique-8:requests=40,output=16", 0.5).requests == 20
    assert Workload.parse("unique-32", 0.1).requests == 32
    assert Workload.parse("unique-8:name=long,output=900").name == "long"
    trace = Workload.parse("trace:file=some.csv,rate=2.5,divide=3")
    assert (trace.file, trace.rate, trace.divide) == ("some.csv", 2.5, 3.0)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("nothing", "there are unique-1"),
        ("shared:colour=3", "not one of"),
        ("shared:prompt", "not one of"),
        ("shared:prompt=many", "a number"),
        ("shared:prompt=0", "positive"),
        ("shared:prefix=-1", "positive"),
        ("trace", "file"),
        ("trace:file=x,rate=0", "positive"),
    ],
)
def test_what_is_no_workload_is_said(text: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Workload.parse(text)


@given(
    st.sampled_from([*WORKLOADS, "x"]),
    st.text("requstpmo=,.0123456789-naife", max_size=40),
)
def test_any_text_is_a_workload_or_an_error_that_says_why(name: str, options: str) -> None:
    try:
        made = Workload.parse(f"{name}:{options}")
    except ValueError:
        return
    assert made.requests >= made.streams >= 1


def test_a_command_line_may_stand_in_a_file(tmp_path: Path) -> None:
    """With remarks and empty lines; a mistake in it ends the program."""
    file = tmp_path / "peers.args"
    file.write_text("# ours\n--server=a=run {port} -x y\n\n--server=b=http://h:1\n--baseline=b\n")
    args = servers.parse([f"@{file}", "--out", "somewhere"])
    assert [s.name for s in args.servers] == ["a", "b"]
    assert args.servers[0].command == "run {port} -x y"
    for wrong in (["--server=a=http://h"], ["--baseline", "c"], ["--rounds", "0"]):
        with pytest.raises(SystemExit):
            servers.parse([f"@{file}", "--out", "somewhere", *wrong])


# --- what is sent


def test_prompts_have_exactly_their_tokens_and_share_only_what_they_shall() -> None:
    vocabulary, work = words(), Workload("w", streams=2, requests=6, prefix=40, prompt=8, output=3)
    made = requests_of(work, vocabulary, "1/0")
    assert made == requests_of(work, vocabulary, "1/0")
    assert {len(r.text.split()) for r in made} == {48} == {r.prompt for r in made}
    assert len({tuple(r.text.split()[:40]) for r in made}) == 1
    assert len({r.text for r in made}) == 6
    later = requests_of(work, vocabulary, "1/1")
    assert later[0].text.split()[:5] != made[0].text.split()[:5]


def test_a_text_that_the_tokenizer_counts_otherwise_is_refused() -> None:
    """Words that are one token alone and more side by side are no measure."""
    pairs = [f"Ġabab{a}{b}" for a in ascii_lowercase for b in ascii_lowercase]
    merging = Words(lambda text: range((len(text.split()) + 1) // 2), pairs)
    with pytest.raises(ValueError, match="has 5 tokens"):
        merging.text(10, random.Random(1))
    with pytest.raises(ValueError, match="too few"):
        Words(lambda text: range(len(text.split())), ["Ġone", "Ġtwo"])


def test_a_trace_gives_lengths(tmp_path: Path) -> None:
    """Divided, and bounded by the workload's own."""
    file = tmp_path / "trace.jsonl"
    lines = [{"timestamp": t, "input_length": n, "output_length": m} for t, n, m in
             ((0, 80, 16), (5, 800, 4), (9, 1, 900))]  # fmt: skip
    file.write_text("\n".join(json.dumps(line) for line in lines))
    work = Workload.parse(f"trace:file={file},divide=8,prompt=50,output=20,requests=9")
    assert work.lengths() == [(10, 2), (50, 1), (1, 20)]
    assert [r.prompt for r in requests_of(work, words(), "s")] == [10, 50, 1]


@pytest.mark.parametrize("dialect", ["headrace", "vllm", "llamacpp", "openai"])
def test_each_server_is_asked_in_its_own_words_for_as_many_tokens(dialect: str) -> None:
    live = Live("http://h", "m", dialect, 0, 0.0)
    made = json.loads(body(live, Request(" a b", 2, 7)))
    assert (made["max_tokens"], made["stream_options"]) == (7, {"include_usage": True})
    theirs = {name: made.get(name) for name in ("ignore_eos", "min_tokens", "n_predict")}
    assert (
        theirs
        == {
            "headrace": {"ignore_eos": True, "min_tokens": None, "n_predict": None},
            "vllm": {"ignore_eos": True, "min_tokens": 7, "n_predict": None},
            "llamacpp": {"ignore_eos": True, "min_tokens": None, "n_predict": 7},
            "openai": {"ignore_eos": None, "min_tokens": None, "n_predict": None},
        }[dialect]
    )
    shared = json.loads(body(live, Request(" a b", 2, 7, shares=True)))
    assert made.get("cache_prompt") == (False if dialect == "llamacpp" else None)
    assert shared.get("cache_prompt") == (True if dialect == "llamacpp" else None)


class Stream:
    """An answer that arrives in these parts."""

    def __init__(self, parts: Iterable[bytes]) -> None:
        self._parts = list(parts)

    @property
    def content(self) -> Stream:
        return self

    async def iter_any(self) -> Any:
        for part in self._parts:
            yield part


ANSWER = (
    b": waiting\n\n"
    b'data: {"choices": [{"text": " a", "finish_reason": null}]}\n\n'
    b'data: {"choices":[{"text":"","finish_reason":null}]}\n\n'
    b'data: {"choices":[{"text":" \\"text\\": \\"b","finish_reason":"length"}]}\n\n'
    b'data: {"choices":[],"usage":{"prompt_tokens":2,"completion_tokens":3,'
    b'"prompt_tokens_details":{"cached_tokens":1}}}\n\n'
    b"data: [DONE]\n\n"
)


@given(st.lists(st.integers(0, len(ANSWER)), max_size=12).map(sorted))
def test_an_answer_is_read_alike_however_it_is_cut(cuts: list[int]) -> None:
    """Two pieces of text with three tokens: usage counts tokens, pieces make gaps."""
    edges = [0, *cuts, len(ANSWER)]
    parts = [ANSWER[a:b] for a, b in pairwise(edges)]
    reply = Reply(Request(" a b", 2, 3), 0.0)
    asyncio.run(_read(Stream(parts), reply))  # type: ignore[arg-type]
    assert not reply.failed
    assert (reply.prompt_tokens, reply.tokens, reply.cached_tokens) == (2, 3, 1)
    assert len(reply.gaps_s) == 1


@pytest.mark.parametrize(
    ("answer", "output", "says"),
    [
        (ANSWER, 4, "3 tokens came, not 4"),
        (ANSWER.replace(b'"usage"', b'"u"').replace(b"completion_tokens", b"c"), 3, "no usage"),
        (b'data: {"error": "out of memory"}\n\n', 3, "out of memory"),
    ],
)
def test_an_answer_that_is_not_what_was_asked_for_fails(
    answer: bytes, output: int, says: str
) -> None:
    reply = Reply(Request(" a b", 2, output), 0.0)
    asyncio.run(_read(Stream([answer]), reply))  # type: ignore[arg-type]
    assert says in reply.failed


# --- what is made of it


def reply(sent: float, first: float, gaps: Sequence[float], tokens: int, failed: str = "") -> Reply:
    last = first + sum(gaps)
    request = Request("", 10, tokens)
    return Reply(request, sent, first, last, last + 0.5, list(gaps), 10, tokens, 0, failed)


def test_figures_count_tokens_and_leave_out_what_failed() -> None:
    found = figures(
        [
            reply(0.0, 1.0, [0.25, 0.75], tokens=5),
            reply(0.5, 2.0, [0.5], tokens=3),
            reply(0.0, 9.0, [9.0], tokens=100, failed="503"),
        ],
        Lag(),
    )
    assert (found["requests"], found["failed"]) == (3, 1)
    assert found["took_s"] == 3.0
    assert found["output_tok_s"] == pytest.approx(8 / 3)
    assert found["all_tok_s"] == pytest.approx(28 / 3)
    assert (found["ttft_p50_ms"], found["ttft_p99_ms"]) == (1000, 1500)
    assert (found["itl_p50_ms"], found["itl_p99_ms"]) == (500, 750)
    assert found["itl_mean_ms"] == pytest.approx(1500 / 6)
    assert found["tokens_per_piece"] == pytest.approx(8 / 5)
    assert figures([reply(0, 0, [], 1, failed="x")], Lag()) == {"requests": 1, "failed": 1}


def test_everybody_has_every_place_once() -> None:
    """Over as many rounds as servers; the next ones repeat them."""
    names = ["a", "b", "c"]
    rounds = [report.order(names, number) for number in range(6)]
    assert rounds[:3] == [["a", "b", "c"], ["b", "c", "a"], ["c", "a", "b"]] == rounds[3:]
    assert report.order(["a"], 5) == ["a"]


def turns_of(**rates: Sequence[float | None]) -> list[dict[str, Any]]:
    """Turns of one workload: a server's tokens/s by round, None where it had none."""
    return [
        {"round": n, "server": name, "workload": "w", "output_tok_s": rate}
        for name, values in rates.items()
        for n, rate in enumerate(values)
        if rate is not None
    ]


def test_a_slow_round_of_the_machine_moves_no_ratio() -> None:
    """Ratios pair what ran in the same round; a server that missed one is compared in the rest."""
    turns = turns_of(base=[100.0, 20.0, 90.0], ours=[200.0, 40.0, None])
    found = report.summary(turns, "base")["w"]
    assert found["base"]["output_tok_s"]["median"] == 90.0
    assert found["base"]["output_tok_s"]["ratio"] == 1.0
    ours = found["ours"]["output_tok_s"]
    assert (ours["median"], ours["least"], ours["most"]) == (120.0, 40.0, 200.0)
    assert ours["ratio"] == ours["ratio_least"] == ours["ratio_most"] == 2.0
    assert "2.00 times the tokens/s" in report.table(turns, "base", {})
    assert "ratio" not in report.summary(turns, "absent")["w"]["ours"]["output_tok_s"]


def test_doubts_are_told() -> None:
    good = {"workload": "w", "server": "a", "round": 0, "failed": 0, "shares": False}
    assert report.doubts([good, good | {"cached_tokens": 9, "shares": True}]) == []
    bad = [
        good | {"failed": 2, "failures": ["503: busy"]},
        good | {"prompt_tokens_off": 4},
        good | {"cached_tokens": 64},
        good | {"others_share": 0.2},
    ]
    (told,) = report.doubts(bad)
    for part in ("503: busy", "4 tokens off", "64 tokens of unique", "20% of the machine"):
        assert part in told


# --- a real run


def fake(name: str, log: Path, *flags: str) -> str:
    return f"--server={name}={sys.executable} {FAKE} --port {{port}} --log {log} {' '.join(flags)}"


def noted(log: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in log.read_text().splitlines()]


def test_two_servers_take_turns_at_the_same_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Never both at once, the same texts in a round, others in the next; then table and files."""
    monkeypatch.setattr(servers, "REST_S", 0.0)
    monkeypatch.setattr(servers, "words_of", lambda _: words())
    out, log_a, log_b = tmp_path / "out", tmp_path / "a.log", tmp_path / "b.log"
    servers.main(
        [
            *(fake("a", log_a, "--owner", "vllm"), fake("b", log_b, "--pieces", "2")),
            *("--rounds", "2", "--out", str(out), "--workloads"),
            *("unique-8:streams=3,requests=5,prompt=6,output=4", "shared:prefix=9,output=2"),
        ]
    )
    notes = sorted(noted(log_a) + noted(log_b), key=lambda note: note["at"])
    assert [n["event"] for n in notes if "event" in n] == ["start", "end"] * 4
    texts = [{n["body"]["prompt"] for n in noted(log) if "body" in n} for log in (log_a, log_b)]
    assert texts[0] == texts[1] and len(texts[0]) == 1 + 2 * (4 + 5 + 24)
    assert all(n["body"].get("ignore_eos") for n in noted(log_a) if n.get("body", {}).get("stream"))
    assert not any("ignore_eos" in n["body"] for n in noted(log_b) if "body" in n)

    results = json.loads((out / "results.json").read_text())
    assert [(t["round"], t["server"]) for t in results["turns"][::2]] == (
        [(0, "a"), (0, "b"), (1, "b"), (1, "a")]
    )
    assert all(t["failed"] == 0 and t["prompt_tokens_off"] == 0 for t in results["turns"])
    assert all(t["cpu_s"] >= 0 and t["peak_mib"] > 5 for t in results["turns"])
    pieces = {t["server"]: t["tokens_per_piece"] for t in results["turns"]}
    assert pieces == {"a": 1.0, "b": 2.0}
    assert (out / "results.png").read_bytes().startswith(b"\x89PNG")
    table = (out / "results.txt").read_text()
    assert "b / a:" in table and table in capsys.readouterr().out
    servers.main(["--again", "--out", str(out), "--baseline", "b"])
    assert "a / b:" in capsys.readouterr().out


def test_a_server_that_dies_is_told_and_the_others_are_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the end of its log; and one that fails some requests or counts otherwise is doubted."""
    monkeypatch.setattr(servers, "REST_S", 0.0)
    monkeypatch.setattr(servers, "words_of", lambda _: words())
    odd = fake("odd", tmp_path / "log", "--refuse-over", "67", "--extra", "2")
    dead = f"--server=dead={sys.executable} -c 'print(5 / 0)' {{port}}"
    with pytest.raises(SystemExit) as ended:
        servers.main(
            [
                *(dead, odd, "--rounds", "1", "--out", str(tmp_path / "out"), "--workloads"),
                *("unique-1:requests=2,prompt=20,output=2", "prefill:requests=2,prompt=66"),
            ]
        )
    assert ended.value.code == 1
    told = capsys.readouterr().out
    assert "ZeroDivisionError" in told and "dead could not be measured" in told
    assert "2 requests failed" in told and "503" in told
    assert "4 tokens off" in told


def test_a_server_ends_with_all_that_it_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A child that does not listen is killed; what it used before the workload does not count."""
    monkeypatch.setattr(servers, "REST_S", 0.0)
    log = tmp_path / "log"
    args = servers.parse(
        [
            *(fake("a", log, "--child"), "--out", str(tmp_path), "--rounds", "1"),
            *("--workloads", "unique-1:requests=1,prompt=2,output=2"),
        ]
    )
    (row,) = servers.compare(args, words())["turns"]
    (child,) = [note["child"] for note in noted(log) if "child" in note]
    assert _born(child) == 0
    assert row["cpu_s"] < 0.3 < row["start_peak_mib"]


@settings(max_examples=20)
@given(st.lists(st.floats(0.1, 1e4), min_size=1, max_size=5))
def test_a_spread_is_ordered(values: list[float]) -> None:
    found = report.Spread.of(values)
    assert found.least <= found.median <= found.most


def test_words_are_one_token_each_for_the_real_model(smollm2_path: Path) -> None:
    """A text of 300 words has 300 tokens of SmolLM2's, whoever counts them."""
    from tokenizers import Tokenizer

    from headrace_worker.loading.gguf_file import GgufSource

    text = servers.words_of("smollm2").text(300, random.Random(1))
    tokenizer = Tokenizer.from_str(GgufSource(smollm2_path).tokenizer().json.decode())
    assert len(tokenizer.encode(text, add_special_tokens=False).ids) == 300
    assert len(set(text.split())) > 200
