"""`python -m headrace_gateway` as operators run it: starts, says why it is unready, leaves."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator

import pytest

from support.valkey import Valkey


@pytest.fixture(scope="module")
def valkey() -> Iterator[Valkey]:
    server = Valkey()
    server.start()
    yield server
    server.close()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def start(**variables: str) -> subprocess.Popen[str]:
    env = {k: v for k, v in os.environ.items() if not k.startswith("HEADRACE_")}
    env |= {f"HEADRACE_{name.upper()}": value for name, value in variables.items()}
    return subprocess.Popen(
        [sys.executable, "-m", "headrace_gateway"], env=env, stderr=subprocess.PIPE, text=True
    )


def get(url: str) -> tuple[int, dict[str, object]]:
    """Status and body, retried while the process is still starting."""
    deadline = time.monotonic() + 20
    while True:
        try:
            with urllib.request.urlopen(url, timeout=5) as response:
                return response.status, json.load(response)
        except urllib.error.HTTPError as error:
            with error:
                return error.code, json.load(error)
        except urllib.error.URLError:
            assert time.monotonic() < deadline, "the gateway did not start"
            time.sleep(0.05)


def test_it_serves_until_sigterm(valkey: Valkey) -> None:
    """Alive at once, unready while there is no worker, gone with status 0 when told."""
    port = free_port()
    process = start(redis_url=valkey.url, port=str(port), gateway_id="gw-1", log_json="true")
    try:
        url = f"http://127.0.0.1:{port}"
        assert get(f"{url}/live")[0] == 200
        status, body = get(f"{url}/ready")
        assert (status, body["status"]) == (503, "not ready")
        assert get(f"{url}/health")[1]["gateway"] == "gw-1"
        process.send_signal(signal.SIGTERM)
        _, log = process.communicate(timeout=20)
        assert process.returncode == 0, log
        events = [json.loads(line)["event"] for line in log.splitlines() if line.startswith("{")]
        assert events[0] == "gateway listens"
        assert "gateway drains" in events
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"port": "many"}, "HEADRACE_PORT"),
        ({"gateway_id": "a b"}, "HEADRACE_GATEWAY_ID"),
        ({"api_keys": "top-secret:t:nobody"}, "HEADRACE_API_KEYS"),
        ({"cache_url": "tcp://cache:7700,nowhere"}, "HEADRACE_CACHE_URL"),
    ],
)
def test_a_bad_setting_stops_the_start_and_names_itself(
    variables: dict[str, str], said: str
) -> None:
    process = start(**variables)
    _, log = process.communicate(timeout=20)
    assert process.returncode == 2
    assert said in log
    assert "top-secret" not in log


def test_a_taken_port_is_said_plainly(valkey: Valkey) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        process = start(redis_url=valkey.url, port=str(port))
        _, log = process.communicate(timeout=20)
        assert process.returncode == 1
        assert f"cannot listen on 127.0.0.1:{port}: " in log
        assert "Traceback" not in log
