"""The gateway alone: workers that answer at once, streams of one token an event, many clients.

A fleet of its own: Valkey, one gateway, and a worker that computes nothing but speaks through Redis
as all do. Beside it, in the same run, a plain aiohttp server that streams the same bytes.
Everything shares this machine's cores, so a process' CPU per event says most; events per second
say what all of them do together. `--step-ms 0` lets the worker run ahead, so that deliveries hold
many tokens; with a distance between steps an event holds one token as long as the gateway keeps up.

The time to the first token is told for two things. With one client that asks again when it was
answered, at once or after a pause in which caches are somebody else's, nobody waits for anybody:
what it is more than the plain server's, asked in turns with it, is what gateway, Redis and back
add, as the worker adds nothing. With `--clients` at once the cores are busy, and it is how long a
request waits for its turn. `--where` times single requests by what Redis executes of them;
`--consumer` puts all that a worker has but the engine behind the gateway.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import itertools
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from bench._fleet import Fleet, cpu_s, free_port
from bench._instant_worker import MODEL, output, tokenizer
from bench._load import percentile, run
from bench._streams import Client, SseClient, Tally, WebSocketClient, sse_events
from headrace import embedded, scripts

KINDS: dict[str, type[Client]] = {"sse": SseClient, "ws": WebSocketClient}
WARM_S = 1.0
START_S_MAX = 30
RECENT = 200
"""Requests that `--where` times, one at a time."""
ROUNDS, ROUND = 10, 40
"""Requests of a single client: rounds, and how many of a server in each."""
PAUSES_S = (0.0, 0.005)
QUESTION = (
    "A gate at the head of a channel decides how much of the river may enter, and what does not "
    "fit stays outside. Who waits is told how long. When a wheel breaks, the water finds its way "
    "to the others. Tell me about the mill, the river and its wheels."
)
"""Makes prompts of some 130 tokens, of which the first ones tell them apart."""


@dataclass(frozen=True, slots=True)
class Server:
    """Who answers at `port`, and the processes that it takes, by name."""

    name: str
    port: int
    pids: dict[str, int]


def asks(kind: str, tokens: int) -> Callable[[], bytes]:
    """Makes requests that differ in a word, so that none is shared with another."""
    number = itertools.count()

    def ask() -> bytes:
        text = f"Question {next(number)}. {QUESTION}"
        body: dict[str, object] = {"model": MODEL}
        if kind == "sse":
            messages = [
                {"role": "system", "content": "You are a helpful assistant."},
                {"role": "user", "content": text},
            ]
            body |= {"messages": messages, "max_tokens": tokens, "stream": True}
            body |= {"stream_options": {"include_usage": True}}
        else:
            body |= {"type": "response.create", "input": text, "max_output_tokens": tokens}
        return json.dumps(body).encode()

    return ask


async def connect(kind: str, server: Server, tally: Tally, tokens: int) -> Client:
    text = tokenizer().decode(output(tokens))
    ask = asks(kind, tokens)
    loop = asyncio.get_running_loop()
    _, client = await loop.create_connection(
        lambda: KINDS[kind](tally, ask, text, tokens), "127.0.0.1", server.port
    )
    if isinstance(client, WebSocketClient):
        await client.open()
    return client


def machine_s() -> float:
    """CPU seconds that everything on this machine has used."""
    fields = [int(field) for field in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]]
    idle, iowait = fields[3], fields[4]
    return (sum(fields) - idle - iowait) / os.sysconf("SC_CLK_TCK")


async def throughput(kind: str, server: Server, clients: int, tokens: int, seconds: float) -> None:
    """`clients` streams at any time, for `seconds` after a warm-up; prints what came of it."""
    tally = Tally()
    all_clients = [await connect(kind, server, tally, tokens) for _ in range(clients)]
    stop_s = time.perf_counter() + WARM_S + seconds

    async def go(client: Client) -> None:
        while time.perf_counter() < stop_s:
            await client.stream()

    tasks = [asyncio.create_task(go(client)) for client in all_clients]
    await asyncio.sleep(WARM_S)
    before, cpu = tally.copy(), {name: cpu_s(pid) for name, pid in server.pids.items()}
    own_s, all_s, began_s = time.process_time(), machine_s(), time.perf_counter()
    await asyncio.sleep(stop_s - time.perf_counter())
    took_s = time.perf_counter() - began_s
    all_s = machine_s() - all_s
    events = tally.events - before.events
    streams = tally.streams - before.streams
    spent = {name: (cpu_s(pid) - cpu[name]) / events * 1e6 for name, pid in server.pids.items()}
    spent["client"] = (time.process_time() - own_s) / events * 1e6
    others = 1 - sum(spent.values()) * events / 1e6 / all_s
    await asyncio.gather(*tasks)
    for client in all_clients:
        client.close()
    per_event = tally.tokens / tally.events
    firsts = [(first - sent) * 1000 for sent, first in tally.firsts]
    print(
        f"{kind:>4} {server.name:<8} {clients:>3} clients: {streams / took_s:7.1f} streams/s "
        f"{events / took_s:8.0f} events/s, {per_event:5.2f} tokens each; us of CPU per event: "
        + ", ".join(f"{name} {value:.1f}" for name, value in spent.items())
        + f"; {spent[next(iter(server.pids))] / per_event:.1f} of the first per token"
        + f"; first token p50 {percentile(firsts, 50):.1f} p99 {percentile(firsts, 99):.1f} ms "
        f"({tally.checked} streams checked; {others:.0%} of the CPU in use was others')",
        flush=True,
    )


async def first_tokens(
    kind: str, server: Server, count: int, tokens: int = 8, pause_s: float = 0.005
) -> list[tuple[float, float]]:
    """When single requests, one after another, were sent and had their first token."""
    tally = Tally()
    client = await connect(kind, server, tally, tokens)
    for _ in range(5):
        await client.stream()
    tally.firsts.clear()
    for _ in range(count):
        await client.stream()
        if pause_s:
            await asyncio.sleep(pause_s)
    client.close()
    return tally.firsts


async def one_client(kind: str, server: Server, plain: Server | None, tokens: int) -> None:
    """First tokens of a single client, of the gateway and the plain server in turns.

    `tokens`: of the plain server's stream. Prints p50 of all, and the median over the rounds of
    what is added.
    """
    for pause_s in PAUSES_S:
        waits: dict[str, list[list[float]]] = {}
        for _ in range(ROUNDS):
            for each, own in ((server, 8), (plain, tokens)):
                if each is not None:
                    firsts = await first_tokens(
                        kind if each is server else "sse", each, ROUND, own, pause_s
                    )
                    found = [(first - sent) * 1000 for sent, first in firsts]
                    waits.setdefault(each.name, []).append(found)
        told = []
        for name, rounds in waits.items():
            all_waits = [wait for found in rounds for wait in found]
            told.append(
                f"{name} p50 {percentile(all_waits, 50):.2f} p99 {percentile(all_waits, 99):.2f} ms"
            )
        if plain is not None:
            pairs = zip(waits[server.name], waits[plain.name], strict=True)
            added = sorted(percentile(own, 50) - percentile(base, 50) for own, base in pairs)
            told.append(
                f"added p50 {percentile(added, 50):.2f} ms ({added[0]:.2f} to {added[-1]:.2f})"
            )
        how = f"after {pause_s * 1000:.0f} ms" if pause_s else "at once"
        print(f"{kind:>4} 1 client, again {how}: first token " + "; ".join(told), flush=True)


_MONITORED = re.compile(rb"^\+(\d+\.\d+) \[\d+ [^\]]*\] (.*)$")
STAGES = (
    "client → gateway → accepted in Redis",
    "accepted → handed to the worker",
    "handed over → tokens in Redis",
    "tokens in Redis → gateway → client",
)


async def where(kind: str, server: Server, socket: Path) -> None:
    """Splits the time to the first token by what Redis executes."""
    reader, writer = await asyncio.open_unix_connection(str(socket))
    writer.write(b"MONITOR\r\n")
    offset_s = time.time() - time.perf_counter()
    lines: list[bytes] = []

    async def listen() -> None:
        async for line in reader:
            lines.append(line)

    listening = asyncio.create_task(listen())
    firsts = await first_tokens(kind, server, RECENT)
    await asyncio.sleep(0.2)
    listening.cancel()
    writer.close()
    marks = list(_marks(lines))
    rows = [_split(sent + offset_s, first + offset_s, marks) for sent, first in firsts]
    found = [row for row in rows if row is not None]
    print(f"     of {len(found)} requests, one at a time, watched by MONITOR (ms, p50 / p99):")
    for stage, name in enumerate(STAGES):
        waits = [row[stage] * 1000 for row in found]
        print(f"       {name:<38} {percentile(waits, 50):6.2f} {percentile(waits, 99):6.2f}")


def _marks(lines: list[bytes]) -> Iterator[tuple[float, int]]:
    """(instant, stage that it ends) of the commands that move a job on; PLACE ends two."""
    place = hashlib.sha1(scripts.PLACE.encode()).hexdigest().encode()
    kinds = {
        hashlib.sha1(source.encode()).hexdigest().encode(): stage
        for stage, source in enumerate((scripts.ACCEPT, scripts.HANDOFF, scripts.FINISH))
    }
    for line in lines:
        match = _MONITORED.match(line.rstrip(b"\r\n"))
        if match is None:
            continue
        words = match[2][:400].split(b'" "')
        name = words[0].strip(b'"').upper()
        if name == b"EVALSHA" and words[1] == place:
            yield from ((float(match[1]), 0), (float(match[1]), 1))
        elif name == b"EVALSHA" and words[1] in kinds:
            yield float(match[1]), kinds[words[1]]
        elif name == b"XADD" and b":replies:" in words[1] and b"lua]" not in line[:60]:
            yield float(match[1]), 2


def _split(sent_s: float, first_s: float, marks: list[tuple[float, int]]) -> list[float] | None:
    stamps = [sent_s]
    for stage in range(3):
        at = next((at for at, kind in marks if kind == stage and stamps[-1] <= at <= first_s), None)
        if at is None:
            return None
        stamps.append(at)
    stamps.append(first_s)
    return [after - before for before, after in itertools.pairwise(stamps)]


@contextmanager
def serving(step_ms: float, log_level: str, consumer: bool) -> Iterator[tuple[Fleet, Server]]:
    """A fleet with an instant worker, ready."""
    # nobody is refused for the wait that is predicted before anything was measured
    patient = {"HEADRACE_WAIT_STANDARD_MS_MAX": "3600000"}
    with Fleet(0, env={"HEADRACE_LOG_LEVEL": log_level} | patient) as fleet:
        module = "bench._instant_engine" if consumer else "bench._instant_worker"
        argv = [sys.executable, "-m", module, "--step-ms", str(step_ms)]
        fleet.start("worker", argv, {"HEADRACE_WORKER_ID": "instant"})
        fleet.wait_serving()
        names = {"gateway": "gw0", "redis": "valkey", "worker": "worker"}
        pids = {name: fleet.processes[own].pid for name, own in names.items()}
        port = int(fleet.urls[0].rpartition(":")[2])
        yield fleet, Server("headrace", port, pids)


async def record(server: Server, tokens: int) -> bytes:
    """One answer's events, each with one token, for the plain server."""
    client = await connect("sse", server, Tally(), tokens)
    await client.stream()
    events = sse_events(client.answer)
    client.close()
    opening, text, usage = events[0], json.loads(events[1][len(b"data: ") :]), events[-1]
    [end] = [event for event in events if b'"finish_reason":"length"' in event]
    decode, said = tokenizer().decode, []
    for token in output(tokens):
        text["choices"][0]["delta"]["content"] = decode([token])
        said.append(b"data: " + json.dumps(text, separators=(",", ":")).encode())
    return b"\n\n".join([opening, *said, end, usage, b"data: [DONE]\n\n"])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--mode", choices=("sse", "ws", "both"), default="both")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=128, help="of a stream")
    parser.add_argument("--seconds", type=float, default=4.0, help="of each round")
    parser.add_argument(
        "--step-ms", type=float, nargs="+", default=[0.0, 2.0], help="between two of the worker's"
    )
    parser.add_argument("--where", action="store_true", help="where a first token's time goes")
    parser.add_argument("--consumer", action="store_true", help="all of a worker but the engine")
    parser.add_argument("--no-direct", action="store_true", help="leave the plain server out")
    parser.add_argument("--log-level", default="info", help="the gateway's")
    args = parser.parse_args()
    modes = ("sse", "ws") if args.mode == "both" else (args.mode,)
    for step_ms in args.step_ms:
        print(f"the worker's steps: {f'{step_ms} ms apart' if step_ms else 'at once'}")
        run_round(args, modes, step_ms)


def run_round(args: argparse.Namespace, modes: tuple[str, ...], step_ms: float) -> None:
    with serving(step_ms, args.log_level, args.consumer) as (fleet, server):
        plain = None if args.no_direct else direct(args, fleet, server, step_ms)
        if plain is not None:
            run(throughput("sse", plain, args.clients, args.tokens, args.seconds))
        for mode in modes:
            run(throughput(mode, server, args.clients, args.tokens, args.seconds))
            if step_ms == 0:
                run(one_client(mode, server, plain, args.tokens))
        if args.where:
            run(where(modes[0], server, embedded.socket_path(fleet.folder)))


def direct(args: argparse.Namespace, fleet: Fleet, server: Server, step_ms: float) -> Server:
    """The plain server, started; it says what the gateway has said."""
    events, port = fleet.folder / "events", free_port()
    events.write_bytes(run(record(server, args.tokens)))
    argv = [sys.executable, "-m", "bench._direct", "--events", str(events), "--port", str(port)]
    fleet.start("direct", [*argv, "--step-ms", str(step_ms)], {})
    wait_open(port)
    return Server("plain", port, {"server": fleet.processes["direct"].pid})


def wait_open(port: int) -> None:
    """Until somebody listens at `port`."""

    async def knock() -> None:
        async with asyncio.timeout(START_S_MAX):
            while True:
                try:
                    _, writer = await asyncio.open_connection("127.0.0.1", port)
                except OSError:
                    await asyncio.sleep(0.1)
                else:
                    writer.close()
                    return

    run(knock())


if __name__ == "__main__":
    main()
