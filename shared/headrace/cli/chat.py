"""`headrace chat`: talk to a model in the terminal, over the Responses WebSocket."""

from __future__ import annotations

import asyncio
import json
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from headrace.cli.common import CommandError, DataDir, RunFile, data_dir_of, plain_errors

if TYPE_CHECKING:
    import aiohttp

CONNECT_S = 5.0
ANSWER_S_MAX = 600.0
FRAME_BYTES_MAX = 16 * 1024 * 1024
HELP = "Type a message; /clear forgets the conversation, /exit or Ctrl-D ends it."

Prompt = Annotated[
    list[str] | None, typer.Argument(help="One question, one answer. Default: a conversation.")
]
Url = Annotated[
    str | None, typer.Option(envvar="HEADRACE_URL", help="Default: that of the running fleet.")
]
Model = Annotated[str | None, typer.Option(help="Default: the first that is served.")]
System = Annotated[str | None, typer.Option(help="Instructions for the model.")]
MaxTokens = Annotated[int | None, typer.Option(min=1, help="Longest answer.")]
Temperature = Annotated[float | None, typer.Option(min=0.0, max=2.0)]
ApiKey = Annotated[str | None, typer.Option(envvar="HEADRACE_API_KEY")]


@plain_errors
def chat(
    prompt: Prompt = None,
    url: Url = None,
    model: Model = None,
    system: System = None,
    max_tokens: MaxTokens = None,
    temperature: Temperature = None,
    api_key: ApiKey = None,
    data_dir: DataDir = None,
) -> None:
    """Talk to a model; with a prompt (or one on stdin) answer it and end."""
    if url is None:
        running = RunFile.read(data_dir_of(data_dir))
        url = running.http_url if running else "http://127.0.0.1:8000"
    options = {
        "instructions": system,
        "max_output_tokens": max_tokens,
        "temperature": temperature,
    }
    given = {key: value for key, value in options.items() if value is not None}
    question = " ".join(prompt) if prompt else None
    if question is None and not sys.stdin.isatty():
        question = sys.stdin.read().strip()
        if not question:
            raise CommandError("no prompt: give one as an argument, or on stdin")
    talk = Talk(url.rstrip("/"), model, given, api_key)
    try:
        if question is None:
            talk.converse()
        else:
            talk.one_shot(question)
    except KeyboardInterrupt:
        raise typer.Exit(130) from None


class Talk:
    """One conversation with one model. Every turn sends all of it: any gateway can answer."""

    def __init__(
        self, url: str, model: str | None, options: dict[str, Any], api_key: str | None
    ) -> None:
        self._url = url
        self._model = model
        self._options = options
        self._headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
        self._messages: list[dict[str, str]] = []

    def one_shot(self, question: str) -> None:
        """Print the answer to one question. Raises CommandError, KeyboardInterrupt."""

        async def run() -> None:
            async with self._connect() as session:
                await self._choose_model(session)
                await self._turn(session, question)

        asyncio.run(run())

    def converse(self) -> None:
        """Read, answer, repeat. Ctrl-C during an answer ends that answer only."""
        import readline  # noqa: F401  # its import gives input() history and editing

        with asyncio.Runner() as runner:
            session = runner.run(self._open())
            print(f"{self._model} at {self._url}. {HELP}")
            try:
                while (line := _ask()) is not None:
                    self._command(runner, session, line)
            finally:
                runner.run(session.close())

    def _command(self, runner: asyncio.Runner, session: aiohttp.ClientSession, line: str) -> None:
        if line == "/clear":
            self._messages.clear()
        elif line:
            try:
                runner.run(self._turn(session, line))
            except KeyboardInterrupt:  # the socket was closed, which cancels the answer
                print(" [stopped]")
            except CommandError as error:
                print(f"headrace: {error.message}", file=sys.stderr)

    async def _open(self) -> aiohttp.ClientSession:
        session = self._connect()
        try:
            await self._choose_model(session)
        except BaseException:
            await session.close()
            raise
        return session

    def _connect(self) -> aiohttp.ClientSession:
        try:
            import aiohttp
        except ImportError as error:
            raise CommandError("chat needs aiohttp: pip install 'headrace[gateway]'") from error
        timeout = aiohttp.ClientTimeout(total=ANSWER_S_MAX, sock_connect=CONNECT_S)
        return aiohttp.ClientSession(headers=self._headers, timeout=timeout)

    async def _choose_model(self, session: aiohttp.ClientSession) -> None:
        import aiohttp

        try:
            async with session.get(f"{self._url}/v1/models") as answer:
                body = await answer.json(content_type=None)
                if answer.status != 200:
                    raise CommandError(_message_of(body) or f"HTTP {answer.status}")
        except (aiohttp.ClientError, OSError, TimeoutError, json.JSONDecodeError) as error:
            raise CommandError(
                f"nothing serves at {self._url}: start it with `headrace up`, "
                f"or name another address with --url ({error})"
            ) from error
        names = [model["id"] for model in body.get("data", [])]
        if self._model is None:
            if not names:
                raise CommandError(f"{self._url} has no model yet: see `headrace status`")
            self._model = names[0]

    async def _turn(self, session: aiohttp.ClientSession, question: str) -> None:
        import aiohttp

        messages = [*self._messages, {"role": "user", "content": question}]
        frame = {"type": "response.create", "model": self._model, "input": messages}
        try:
            async with session.ws_connect(
                f"{self._url}/v1/responses", max_msg_size=FRAME_BYTES_MAX
            ) as socket:
                await socket.send_json(frame | self._options)
                text = await self._print_answer(socket)
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            raise CommandError(f"the connection to {self._url} failed: {error}") from error
        self._messages = [*messages, {"role": "assistant", "content": text}]

    async def _print_answer(self, socket: aiohttp.ClientWebSocketResponse) -> str:
        import aiohttp

        text = []
        async for message in socket:
            if message.type is not aiohttp.WSMsgType.TEXT:
                break
            event = json.loads(message.data)
            kind = event.get("type")
            if kind == "response.output_text.delta":
                text.append(event["delta"])
                print(event["delta"], end="", flush=True)
            elif kind in ("response.completed", "response.incomplete"):
                print()
                return "".join(text)
            elif kind in ("error", "response.failed"):
                raise CommandError(_message_of(event) or _message_of(event.get("response")))
        raise CommandError("the gateway closed the connection before the answer was complete")


def _ask() -> str | None:
    """The next line, or None at its end (`/exit`, Ctrl-D, Ctrl-C)."""
    try:
        line = input("> ").strip()
    except (EOFError, KeyboardInterrupt):
        print()
        return None
    return None if line == "/exit" else line


def _message_of(body: Any) -> str:
    """The message in OpenAI's error shape, or ''."""
    error = body.get("error") if isinstance(body, dict) else None
    return str(error.get("message", "")) if isinstance(error, dict) else ""
