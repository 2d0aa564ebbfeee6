"""A server of OpenAI's completions that counts words, to be compared with itself.

    python openai_server.py --port N --log FILE [--owner vllm] [--pieces 2] [--extra 1] [--child]

Each request's body goes into the log, a line, between a line at the start and one at the end.
`--pieces`: tokens in one piece of text. `--extra`: tokens that it counts on top of a prompt's.
`--refuse-over`: longer prompts are answered with 503. `--child`: a process of its own that has used
CPU time and does not end when asked.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from aiohttp import web

_CHILD = """
import signal, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
while time.process_time() < 0.3: pass
print("ready", flush=True)
time.sleep(600)
"""


class Fake:
    """What it says is the word `so`, as often as asked for."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._args = args

    def note(self, what: dict[str, Any]) -> None:
        with Path(self._args.log).open("a") as file:
            file.write(json.dumps({"at": time.monotonic(), **what}) + "\n")

    async def models(self, _: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": "words", "owned_by": self._args.owner}]})

    async def complete(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.note({"body": body})
        prompt = len(body["prompt"].split()) + self._args.extra
        if prompt > self._args.refuse_over:
            return web.json_response({"error": {"message": "too long"}}, status=503)
        if not body.get("stream"):
            return web.json_response({"choices": [{"text": " so"}]})
        answer = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await answer.prepare(request)
        left = body["max_tokens"]
        while left:
            piece = min(left, self._args.pieces)
            left -= piece
            await self._event(answer, {"choices": [{"text": " so" * piece}]})
            await asyncio.sleep(0.001)
        usage = {
            "prompt_tokens": prompt,
            "completion_tokens": body["max_tokens"],
            "prompt_tokens_details": {"cached_tokens": 0},
        }
        await self._event(answer, {"choices": [], "usage": usage})
        await answer.write(b"data: [DONE]\n\n")
        return answer

    @staticmethod
    async def _event(answer: web.StreamResponse, event: dict[str, Any]) -> None:
        await answer.write(f"data: {json.dumps(event)}\n\n".encode())


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--log", required=True)
    parser.add_argument("--owner", default="somebody")
    parser.add_argument("--pieces", type=int, default=1)
    parser.add_argument("--extra", type=int, default=0)
    parser.add_argument("--refuse-over", type=int, default=10**9)
    parser.add_argument("--child", action="store_true")
    args = parser.parse_args()
    fake = Fake(args)
    if args.child:
        child = subprocess.Popen([sys.executable, "-c", _CHILD], stdout=subprocess.PIPE)
        assert child.stdout is not None and child.stdout.readline()
        fake.note({"child": child.pid})
    fake.note({"event": "start"})
    app = web.Application()
    app.add_routes([web.get("/v1/models", fake.models), web.post("/v1/completions", fake.complete)])
    web.run_app(app, host="127.0.0.1", port=args.port, print=None)
    fake.note({"event": "end"})


if __name__ == "__main__":
    main()
