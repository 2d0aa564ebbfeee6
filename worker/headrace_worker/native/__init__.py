"""Native CPU kernels: built on first use, chosen at run time, never required.

Invariant: `library()` answers the same for the life of a process unless `choose` is called, and a
worker without a compiler, or on another processor, computes with torch instead and says so. Which
of the two is `state()`, which goes into the log and the metrics.
"""

from __future__ import annotations

import os
from typing import Literal

import structlog

from headrace_worker.native.abi import Library
from headrace_worker.native.build import BuildError, built

Mode = Literal["auto", "avx512", "off"]
"""`auto` takes the kernels for AVX2: those for AVX-512 have not run on such a processor yet."""
VARIABLE = "HEADRACE_KERNELS"

log = structlog.get_logger()


class _Choice:
    """What was asked for and what came of it; None until somebody needs to know."""

    def __init__(self) -> None:
        self.mode: Mode | None = None
        self.found: tuple[Library | None, str] | None = None


_choice = _Choice()


def choose(mode: Mode) -> None:
    """Use the kernels where they can be had, or none at all ("off"); for models loaded after it."""
    _choice.mode, _choice.found = mode, None


def library() -> Library | None:
    """The kernels, built now if need be; None where there are none."""
    return _find()[0]


def state() -> str:
    """The instruction set in use ("avx2", "avx512"), "off", or why there are none."""
    return _find()[1]


def isa() -> str:
    """The instruction set in use, "none" where torch computes."""
    found = library()
    return "none" if found is None else found.isa


def _find() -> tuple[Library | None, str]:
    if _choice.found is None:
        mode = _choice.mode or os.environ.get(VARIABLE, "auto")
        _choice.found = (None, "off") if mode == "off" else _load(mode)
    return _choice.found


def _load(mode: str) -> tuple[Library | None, str]:
    try:
        found = Library(built())
    except (BuildError, OSError) as error:
        log.warning("no native kernels, computing with torch", reason=str(error))
        return None, str(error)
    if found.isa == "none":
        reason = "this processor has no AVX2"
        log.warning("no native kernels, computing with torch", reason=reason)
        return None, reason
    if mode != "avx512":
        found.use("avx2")
    elif found.isa != mode:
        log.warning("this processor has no AVX-512 with VNNI, the kernels for AVX2 compute")
    return found, found.isa
