"""Two hosts on one machine: network namespaces that reach each other and nothing else."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Host:
    """A network namespace. `inside` starts a command there; `device` has its `address`."""

    name: str
    address: str
    device: str

    @property
    def inside(self) -> list[str]:
        return ["ip", "netns", "exec", self.name]


@contextlib.contextmanager
def two_hosts() -> Iterator[tuple[Host, Host]]:
    """Raises PermissionError where namespaces may not be made."""
    number = os.getpid() % 10_000
    first = Host(f"hr{number}a", "10.231.7.1", f"hr{number}a")
    second = Host(f"hr{number}b", "10.231.7.2", f"hr{number}b")
    try:
        _ip("netns", "add", first.name)
        _ip("netns", "add", second.name)
        _ip("link", "add", first.device, "netns", first.name, "type", "veth",
            "peer", "name", second.device, "netns", second.name)  # fmt: skip
        for host in (first, second):
            inside = ("-n", host.name)
            _ip(*inside, "addr", "add", f"{host.address}/24", "dev", host.device)
            _ip(*inside, "link", "set", "lo", "up")
            _ip(*inside, "link", "set", host.device, "up")
        yield first, second
    finally:
        for host in (first, second):
            subprocess.run(["ip", "netns", "del", host.name], capture_output=True, check=False)


def _ip(*arguments: str) -> None:
    try:
        subprocess.run(["ip", *arguments], capture_output=True, check=True, text=True)
    except FileNotFoundError as error:
        raise PermissionError("there is no `ip` command here") from error
    except subprocess.CalledProcessError as error:
        raise PermissionError(f"ip {' '.join(arguments)}: {error.stderr.strip()}") from error
