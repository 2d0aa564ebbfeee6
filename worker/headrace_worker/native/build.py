"""The kernels' library, compiled with the C++ compiler that is here, once for each version.

Invariant: of its own it has only what is compiled, and how; see headrace.compiled.
"""

from __future__ import annotations

from pathlib import Path

from headrace.compiled import CPP, BuildError, Library

__all__ = ["BuildError", "built"]

SOURCE = Path(__file__).parent.parent / "csrc"
FLAGS = ("-std=c++17", "-O3", "-fPIC", "-pthread", "-fvisibility=hidden", "-ffp-contract=off")


def built() -> Path:
    """The library's file, compiled now if it is not there. Raises BuildError, OSError."""
    return Library("headrace", CPP, SOURCE, FLAGS).build()


if __name__ == "__main__":  # for images that have no compiler later
    print(built())
