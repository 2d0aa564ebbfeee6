"""C of our own, compiled where there is a compiler; what uses it works without.

Invariant: a file under its final name is complete, as it is written beside it and renamed; its name
holds a hash of source and flags, so that nobody loads another version's code.
Rejected: an extension module built when the package is installed, which would make a compiler a
condition of installing it.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

from headrace.models import default_cache_dir

SOURCES = Path(__file__).parent / "csrc"
FLAGS = ("-std=gnu11", "-O3", "-fPIC", "-shared", "-fvisibility=hidden")
COMPILERS = ("gcc", "cc", "clang")
MACHINES = ("x86_64", "AMD64")
BUILD_S_MAX = 60
ERROR_CHARS_MAX = 600


class BuildError(Exception):
    """Why there is no library, for people to read."""


def path_of(name: str) -> Path:
    """Where the library of `csrc/<name>.c` is, or will be."""
    digest = hashlib.sha256(repr(FLAGS).encode() + (SOURCES / f"{name}.c").read_bytes())
    file = f"{name}-{platform.machine()}-{digest.hexdigest()[:16]}.so"
    return default_cache_dir() / "kernels" / file


def build(name: str) -> Path:
    """The library of `csrc/<name>.c`, compiled now if it is not there. Raises BuildError, OSError.

    Takes half a second, once a version.
    """
    if platform.machine() not in MACHINES:
        raise BuildError(f"nothing is written for {platform.machine()} processors")
    path = path_of(name)
    if path.exists():
        return path
    compiler = _compiler()
    path.parent.mkdir(parents=True, exist_ok=True)
    with (path.parent / f".{name}.lock").open("w") as lock:  # of two processes one compiles
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            _compile([compiler, *FLAGS, str(SOURCES / f"{name}.c")], path)
    return path


def _compiler() -> str:
    for name in (os.environ.get("CC", ""), *COMPILERS):
        found = shutil.which(name) if name else None
        if found is not None:
            return found
    raise BuildError("there is no C compiler (gcc or clang)")


def _compile(command: list[str], path: Path) -> None:
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        made = Path(folder) / path.name
        try:
            done = subprocess.run(
                [*command, "-o", str(made)],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=BUILD_S_MAX,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise BuildError(f"compiling took more than {BUILD_S_MAX} s") from error
        if done.returncode != 0:
            raise BuildError(f"compiling failed: {done.stderr[:ERROR_CHARS_MAX]}")
        made.replace(path)


if __name__ == "__main__":  # for images that have no compiler later
    print(*(build(source.stem) for source in sorted(SOURCES.glob("*.c"))), sep="\n")
