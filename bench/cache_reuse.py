"""Time to first token of one prompt: computed, found in the pool, fetched from the cache service.

    python -m bench cache_reuse [--model smollm2] [--tokens 1024] [--prompts 5] [--threads 2]

Each prompt is asked of worker A cold, then of A again (its pool), of worker B, which started empty
and reads A's blocks from the arena, and of a worker A that was started again together with the
cache service, which has them on disk only. Worker B also shows what a prompt that nobody has costs
beside a lookup that finds nothing. Texts are greedy and have to be the same each time. With --dtype
float32 that is exact; in bfloat16 the same bytes come back, but a chunk of other length rounds
otherwise now and then, and the table says how often.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench._fleet import Fleet, free_port

OUTPUT_TOKENS = 8
SETTLE_S = 1.0
"""For the last blocks of a prompt to be written, and to reach the disk."""
METRICS = ("fetched_bytes", "fetch_seconds", "saved_seconds", "written_bytes")


@dataclass(frozen=True, slots=True)
class Asked:
    ttft_ms: float
    cached_tokens: int
    text: str


def ask(url: str, model: str, prompt: Sequence[int]) -> Asked:
    body = {
        "model": model,
        "prompt": list(prompt),
        "max_tokens": OUTPUT_TOKENS,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    request = urllib.request.Request(
        f"{url}/v1/completions", json.dumps(body).encode(), {"content-type": "application/json"}
    )
    began_s, first_s, text, cached = time.perf_counter(), 0.0, "", 0
    with urllib.request.urlopen(request, timeout=300) as answer:
        for line in answer:
            if not line.startswith(b"data: {"):
                continue
            first_s = first_s or time.perf_counter()
            event = json.loads(line[6:])
            text += "".join(choice["text"] for choice in event["choices"])
            details = (event.get("usage") or {}).get("prompt_tokens_details") or {}
            cached = details.get("cached_tokens") or cached
    return Asked(1000 * (first_s - began_s), cached, text)


def told(port: int) -> dict[str, float]:
    """A worker's own figures of what the cache service cost and saved, over all tiers."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    found = dict.fromkeys(METRICS, 0.0)
    for line in lines:
        name = line.partition("{")[0].removeprefix("headrace_worker_cache_").removesuffix("_total")
        if name in found:
            found[name] += float(line.split()[-1])
    return found


class Run:
    """The rows of the table as they are measured."""

    def __init__(self, fleet: Fleet, prompts: list[list[int]]) -> None:
        self._fleet = fleet
        self._prompts = prompts
        self._texts: list[str] = []
        self.rows: dict[str, dict[str, object]] = {}

    def measure(self, name: str, prompts: list[list[int]] | None = None) -> None:
        url, model = self._fleet.urls[0], self._fleet.model
        ask(url, model, [5, 6, 7])  # the first request of a process is slow
        asked = [ask(url, model, prompt) for prompt in prompts or self._prompts]
        same = 0
        if prompts is None:
            self._texts = self._texts or [each.text for each in asked]
            same = sum(a.text == b for a, b in zip(asked, self._texts, strict=True))
        times = [each.ttft_ms for each in asked]
        self.rows[name] = {
            "ttft_ms_median": round(statistics.median(times), 1),
            "ttft_ms_min": round(min(times), 1),
            "ttft_ms_max": round(max(times), 1),
            "cached_tokens": round(statistics.mean(each.cached_tokens for each in asked)),
            "same_text": f"{same}/{len(asked)}" if prompts is None else "",
        }
        print(f"{name:28}" + "".join(f"{value!s:>16}" for value in self.rows[name].values()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--prompts", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    dice = random.Random(7)

    def made() -> list[list[int]]:
        return [
            [dice.randrange(100, 5_000) for _ in range(args.tokens)] for _ in range(args.prompts)
        ]

    prompts, port = made(), free_port()
    env = {
        "HEADRACE_DTYPE": args.dtype,
        "HEADRACE_KV_TOKENS": str(2 * args.prompts * (args.tokens + 64)),
        "HEADRACE_CACHE_BYTES": str(2 << 30),
        "HEADRACE_METRICS_PORT": "0",
    }
    with Fleet(1, model=args.model, threads=args.threads, cache=True, env=env) as fleet:
        restart_cache(fleet)
        run = Run(fleet, prompts)
        columns = ("median", "min", "max", "cached tokens", "same text")
        print(f"{'TTFT in ms':28}" + "".join(f"{column:>16}" for column in columns))
        run.measure("A, cold")
        run.measure("A, in its pool")
        replace_worker(fleet, "w0", "w1", port)
        run.measure("B, from the arena")
        run.measure("B, nowhere: a miss", made())
        figures = told(port)
        time.sleep(SETTLE_S)
        restart_cache(fleet)
        replace_worker(fleet, "w1", "w2", port)
        run.measure("A again, from disk")
        for name, counted in (("B", figures), ("A again", told(port))):
            print(f"{name} counted: " + ", ".join(f"{k} {v:,.3f}" for k, v in counted.items()))
        if args.json:
            args.json.write_text(json.dumps({"rows": run.rows, "args": vars(args)}, default=str))


def restart_cache(fleet: Fleet) -> None:
    """What it has in memory is gone, what is on its disk is not."""
    fleet.stop("cache")
    fleet.start_cache({"HEADRACE_CACHE_DISK_PATH": str(fleet.folder / "disk")})
    time.sleep(SETTLE_S)


def replace_worker(fleet: Fleet, old: str, new: str, port: int) -> None:
    """`new` takes over with an empty pool, and answers for its metrics at `port`."""
    fleet.stop(old)
    fleet.start_worker(new, {"HEADRACE_METRICS_PORT": str(port)})
    fleet.wait_workers(1)
    fleet.wait_serving()  # the gateway hears of it a moment later


if __name__ == "__main__":
    main()
