"""C and C++ of our own, compiled where there is a compiler; what uses it works without.

Invariant: a file under its final name is complete, as it is linked beside it and renamed; its name
holds a hash of sources and flags, so that nobody loads another version's code. All instruction sets
are in one file and chosen when it is loaded: a cache may travel between machines, as into a
container's image.
Rejected: an extension module built when the package is installed, which would make a compiler a
condition of installing it; torch's extension builder, which needs ninja and takes half a minute.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from headrace.models import default_cache_dir

MACHINES = ("x86_64", "AMD64")
BUILD_S_MAX = 300
ERROR_CHARS_MAX = 600


class BuildError(Exception):
    """Why there is no library, for people to read."""


@dataclass(frozen=True, slots=True)
class Language:
    """`variable` may name a compiler that is tried before `compilers`."""

    name: str
    suffix: str
    variable: str
    compilers: tuple[str, ...]

    def compiler(self) -> str:
        for name in (os.environ.get(self.variable, ""), *self.compilers):
            found = shutil.which(name) if name else None
            if found is not None:
                return found
        raise BuildError(f"there is no {self.name} compiler ({' or '.join(self.compilers)})")


C = Language("C", ".c", "CC", ("gcc", "cc", "clang"))
CPP = Language("C++", ".cpp", "CXX", ("g++", "c++", "clang++"))


@dataclass(frozen=True, slots=True)
class Library:
    """All of `folder`, compiled with `flags`, as one file whose name begins with `name`."""

    name: str
    language: Language
    folder: Path
    flags: tuple[str, ...]

    @property
    def path(self) -> Path:
        """Where the library is, or will be."""
        digest = hashlib.sha256(repr(self.flags).encode())
        for file in sorted(self.folder.iterdir()):
            digest.update(file.name.encode() + b"\n" + file.read_bytes())
        file_name = f"{self.name}-{platform.machine()}-{digest.hexdigest()[:16]}.so"
        return default_cache_dir() / "kernels" / file_name

    def build(self) -> Path:
        """The library's file, compiled now if it is not there. Raises BuildError, OSError."""
        if platform.machine() not in MACHINES:
            raise BuildError(f"nothing is written for {platform.machine()} processors")
        path = self.path
        if path.exists():
            return path
        compiler = self.language.compiler()
        path.parent.mkdir(parents=True, exist_ok=True)
        with (path.parent / f".{self.name}.lock").open(
            "w"
        ) as lock:  # of two processes one compiles
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not path.exists():
                self._compile(compiler, path)
        return path

    def _compile(self, compiler: str, path: Path) -> None:
        """One process a source file, side by side."""
        sources = sorted(self.folder.glob(f"*{self.language.suffix}"))
        with tempfile.TemporaryDirectory(dir=path.parent) as name:
            work = Path(name)
            objects = [work / f"{source.stem}.o" for source in sources]
            running = [
                _start([compiler, *self.flags, "-c", str(source), "-o", str(made)])
                for source, made in zip(sources, objects, strict=True)
            ]
            try:
                for process in running:
                    _finish(process)
            finally:
                for process in running:
                    process.kill()
                    process.wait()
            linked = work / "linked.so"
            command = [compiler, "-shared", "-pthread", *map(str, objects), "-o", str(linked)]
            _finish(_start(command))
            linked.replace(path)


COPYING = Library(
    "copying",
    C,
    Path(__file__).parent / "csrc",
    ("-std=gnu11", "-O3", "-fPIC", "-pthread", "-fvisibility=hidden"),
)


def _start(command: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
    )


def _finish(process: subprocess.Popen[str]) -> None:
    try:
        _, said = process.communicate(timeout=BUILD_S_MAX)
    except subprocess.TimeoutExpired as error:
        raise BuildError(f"compiling took more than {BUILD_S_MAX} s") from error
    if process.returncode != 0:
        raise BuildError(f"compiling failed: {said[:ERROR_CHARS_MAX]}")


if __name__ == "__main__":  # for images that have no compiler later
    print(COPYING.build())
