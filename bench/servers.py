"""Servers beside each other: ours and any OpenAI-compatible one, the same work, in alternation.

    python -m bench servers --server NAME=COMMAND|URL … [--baseline NAME] [--rounds 3]
        [--workloads unique-1 unique-8 …] [--scale 1.0] --out FOLDER

A command has `{port}` where its port goes (and `{folder}` for an empty one of its own); it is
started before each of its turns and stopped after it, so that two never share the cores. A URL may
say `,pid=N` to have that process's tree counted. Round 1 goes A B C, round 2 B C A, and so on.
Arguments may stand in a file, one a line: `python -m bench servers @peers.args`. docs/benchmarks.md
has ready commands for peers. `--again` reports once more what is in the folder.

Prompts are words that are one token each (`--tokenizer`: the model whose tokens they are), the same
for all servers in a round and never seen before. Medians over rounds are printed, beside them how
many times the baseline's they are; `results.json` has every turn, `results.png` draws it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from bench import _server_report as report
from bench._load import Lag, run
from bench._server_load import (
    Words,
    Workload,
    figures,
    play,
    requests_of,
    warm_up,
)
from bench._server_process import (
    Live,
    Server,
    ServerError,
    busy_s,
    forget_peaks,
    running,
    usage,
)
from headrace.errors import HeadraceError, SettingsError

DEFAULT_WORKLOADS = ("unique-1", "unique-8", "unique-32", "shared", "prefill")
REST_S = 1.0
"""Between two workloads, for what a server does after its last answer."""
VERSION = 1


def words_of(model: str) -> Words:
    """Raises ModelError, ValueError."""
    from tokenizers import Tokenizer

    from headrace.models import resolve
    from headrace_worker.loading.gguf_file import GgufSource
    from headrace_worker.loading.hf_folder import HfSource

    path = resolve(model)
    source = HfSource(path) if path.is_dir() else GgufSource(path)
    tokenizer = Tokenizer.from_str(source.tokenizer().json.decode())

    def encode(text: str) -> list[int]:
        ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    return Words(encode, list(tokenizer.get_vocab()))


def measure(live: Live, workload: Workload, words: Words, seed: str) -> dict[str, Any]:
    """One workload on one server, with what its processes and others used meanwhile."""
    requests, lag = requests_of(workload, words, seed), Lag()
    before = None
    if live.pid:
        forget_peaks(live.pid)
        before = usage(live.pid)
    began, busy, own = time.monotonic(), busy_s(), time.process_time()
    replies = run(play(live, workload, requests, seed, lag))
    own, busy, took_s = (
        time.process_time() - own,
        busy_s() - busy,
        time.monotonic() - began,
    )
    found: dict[str, Any] = figures(replies, lag)
    found |= {"generator_cpu_s": own, "shares": bool(workload.prefix)}
    found["failures"] = sorted({reply.failed for reply in replies if reply.failed})[:3]
    if before is not None:
        after = usage(live.pid)
        cpu_s = after.cpu_s - before.cpu_s
        machine_s = took_s * (os.cpu_count() or 1)
        found |= {
            "cpu_s": cpu_s,
            "peak_mib": after.peak_bytes / 2**20,
            "share_mib": after.share_bytes / 2**20,
            "others_share": max(0.0, busy - own - cpu_s) / machine_s,
        }
        if found.get("output_tokens"):
            found["cpu_s_per_1k"] = cpu_s / found["output_tokens"] * 1000
    return found


def turn(
    server: Server, workloads: Sequence[Workload], words: Words, seed: str, log: Path
) -> list[dict[str, Any]]:
    """All workloads on one server, from its start to its end. Raises ServerError."""
    found = []
    with running(server, log) as live:
        start_mib = usage(live.pid).peak_bytes / 2**20 if live.pid else None
        small, requests = warm_up(words, seed)
        run(play(live, small, requests, seed, Lag()))
        for workload in workloads:
            time.sleep(REST_S)
            row = {
                "workload": workload.name,
                "server": server.name,
                "dialect": live.dialect,
                "start_s": live.start_s,
                "start_peak_mib": start_mib,
                **measure(live, workload, words, seed),
            }
            found.append(row)
            print(
                f"  {server.name:<20} {workload.name:<10} {row.get('output_tok_s', 0):8.1f} tok/s, "
                f"TTFT {row.get('ttft_p50_ms', 0):7.0f} ms, "
                f"{row['failed']} of {row['requests']} failed",
                flush=True,
            )
    return found


def machine() -> dict[str, Any]:
    """What the figures hold for."""
    name = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.machine(),
    )
    return {"cpu": name, "cores": os.cpu_count(), "kernel": platform.release()}


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="bench servers",
        description=(__doc__ or "").splitlines()[0],
        fromfile_prefix_chars="@",
    )
    parser.convert_arg_line_to_args = _argument_of  # type: ignore[method-assign]
    parser.add_argument("--server", action="append", default=[], metavar="NAME=COMMAND|URL")
    parser.add_argument("--baseline", help="whom the others are compared with; default: the first")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workloads", nargs="+", default=list(DEFAULT_WORKLOADS))
    parser.add_argument("--scale", type=float, default=1.0, help="on the number of requests")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--tokenizer", default="smollm2", help="the model that all serve")
    parser.add_argument("--out", type=Path, required=True, help="folder for results and logs")
    parser.add_argument("--again", action="store_true", help="report what is in --out, no more")
    args = parser.parse_args(argv)
    try:
        args.servers = [Server.parse(text) for text in args.server]
        args.workloads = [Workload.parse(text, args.scale) for text in args.workloads]
    except ValueError as error:
        parser.error(str(error))
    names = [server.name for server in args.servers]
    if not args.again and (not names or len(set(names)) < len(names)):
        parser.error("--server has to name at least one server, each once")
    if len({w.name for w in args.workloads}) < len(args.workloads):
        parser.error("--workloads names one twice")
    if args.rounds < 1 or (args.baseline and names and args.baseline not in names):
        parser.error("--rounds is at least 1, --baseline one of the servers")
    return args


def _argument_of(line: str) -> list[str]:
    """A line of a file: one argument, none for a remark."""
    line = line.strip()
    return [line] if line and not line.startswith("#") else []


def compare(args: argparse.Namespace, words: Words) -> dict[str, Any]:
    """All rounds; what is measured is written after each turn."""
    servers = {server.name: server for server in args.servers}
    results: dict[str, Any] = {
        "version": VERSION,
        "machine": machine(),
        "baseline": args.baseline or args.servers[0].name,
        "servers": {s.name: s.command or s.url for s in args.servers},
        "workloads": {w.name: w.says for w in args.workloads},
        "rounds": args.rounds,
        "seed": args.seed,
        "lost": {},
        "turns": [],
    }
    for number in range(args.rounds):
        names = report.order(list(servers), number)
        print(f"round {number + 1}: {', '.join(names)}", flush=True)
        for name in names:
            log = args.out / f"{name}.log"
            try:
                rows = turn(servers[name], args.workloads, words, f"{args.seed}/{number}", log)
            except ServerError as error:
                print(f"  {name}: {error}", flush=True)
                results["lost"].setdefault(name, str(error))
                continue
            results["turns"] += [{"round": number, **row} for row in rows]
            (args.out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    return results


def tell(results: dict[str, Any], folder: Path) -> None:
    """Prints the table and draws the picture."""
    turns = results["turns"]
    if not turns:
        raise SystemExit("nothing was measured")
    text = report.table(turns, results["baseline"], results["workloads"])
    results["summary"] = report.summary(turns, results["baseline"])
    (folder / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    (folder / "results.txt").write_text(text + "\n")
    try:
        report.draw(turns, folder / "results.png")
    except SettingsError as error:
        print(error.message)
    print(f"\n{text}")
    for name, reason in results["lost"].items():
        print(f"! {name} could not be measured: {reason.splitlines()[0]}")


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    if args.again:
        results = json.loads((args.out / "results.json").read_text())
        tell(results | ({"baseline": args.baseline} if args.baseline else {}), args.out)
        return
    args.out.mkdir(parents=True, exist_ok=True)
    with suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a peer's crash leaves a line, no file
    try:
        words = words_of(args.tokenizer)
    except (HeadraceError, ValueError) as error:
        raise SystemExit(f"--tokenizer: {error}") from error
    results = compare(args, words)
    tell(results, args.out)
    if results["lost"]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
