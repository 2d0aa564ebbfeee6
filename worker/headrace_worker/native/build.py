"""Compiles the kernels with the C++ compiler that is here, once for each version of their source.

Invariant: a file under its final name is complete; it is linked beside it and renamed. Its name
holds a hash of the sources and flags, so that a worker never loads another version's kernels. All
instruction sets are in one file and chosen when it is loaded: a cache may travel between machines,
as into a container's image.

Rejected: torch's extension builder, which needs ninja and its headers and takes half a minute; and
building when the package is installed, which most machines that run a wheel have no compiler for.
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

SOURCE = Path(__file__).parent.parent / "csrc"
FLAGS = ("-std=c++17", "-O3", "-fPIC", "-pthread", "-fvisibility=hidden", "-ffp-contract=off")
COMPILERS = ("g++", "c++", "clang++")
BUILD_S_MAX = 300
ERROR_CHARS_MAX = 600


class BuildError(Exception):
    """Why there are no kernels, for people to read."""


def built() -> Path:
    """The library's file, compiled now if it is not there. Raises BuildError, OSError."""
    machine = platform.machine()
    if machine not in ("x86_64", "AMD64"):
        raise BuildError(f"there are no kernels for {machine} processors")
    folder = default_cache_dir() / "kernels"
    path = folder / f"headrace-{machine}-{_version()}.so"
    if path.exists():
        return path
    compiler = _compiler()
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:  # two workers at once: one of them compiles
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            _compile(compiler, folder, path)
    return path


def _version() -> str:
    digest = hashlib.sha256(repr(FLAGS).encode())
    for file in sorted(SOURCE.iterdir()):
        digest.update(file.name.encode() + b"\n" + file.read_bytes())
    return digest.hexdigest()[:16]


def _compiler() -> str:
    for name in (os.environ.get("CXX", ""), *COMPILERS):
        found = shutil.which(name) if name else None
        if found is not None:
            return found
    raise BuildError("there is no C++ compiler (g++ or clang++)")


def _compile(compiler: str, folder: Path, path: Path) -> None:
    """One process a source file, side by side."""
    with tempfile.TemporaryDirectory(dir=folder) as name:
        work = Path(name)
        objects = [work / f"{file.stem}.o" for file in sorted(SOURCE.glob("*.cpp"))]
        running = [
            _start([compiler, *FLAGS, "-c", str(SOURCE / f"{out.stem}.cpp"), "-o", str(out)])
            for out in objects
        ]
        try:
            for process in running:
                _finish(process)
        finally:
            for process in running:
                process.kill()
                process.wait()
        linked = work / "linked.so"
        command = [compiler, "-shared", "-pthread", *map(str, sorted(objects)), "-o", str(linked)]
        _finish(_start(command))
        linked.replace(path)


def _start(command: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, errors="replace"
    )


def _finish(process: subprocess.Popen[str]) -> None:
    try:
        _, said = process.communicate(timeout=BUILD_S_MAX)
    except subprocess.TimeoutExpired as error:
        raise BuildError(f"compiling took more than {BUILD_S_MAX} s") from error
    if process.returncode != 0:
        raise BuildError(f"compiling failed: {said[:ERROR_CHARS_MAX]}")


if __name__ == "__main__":  # for images that have no compiler later
    print(built())
