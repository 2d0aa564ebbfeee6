"""How much memory there is, and saying plainly what does not fit into it."""

from __future__ import annotations

from pathlib import Path

from headrace.errors import ModelError

_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")


def available_bytes() -> int | None:
    """Memory that could be taken now without swapping; None where the system does not say."""
    limits = [limit for limit in (_machine_bytes(), _cgroup_bytes()) if limit is not None]
    return min(limits) if limits else None


def _machine_bytes() -> int | None:
    try:
        for line in _MEMINFO.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None


def _cgroup_bytes() -> int | None:
    """What a container's own limit leaves (cgroup v2); reclaimable page cache counts as free."""
    try:
        limit = (_CGROUP / "memory.max").read_text().strip()
        if limit == "max":
            return None
        used = int((_CGROUP / "memory.current").read_text())
        facts = (_CGROUP / "memory.stat").read_text().split()
        used -= int(facts[facts.index("inactive_file") + 1])
        return max(0, int(limit) - used)
    except (OSError, ValueError, IndexError):
        return None


def require(needed_bytes: int, what: str, advice: str) -> None:
    """Raises ModelError when `what` does not fit; `advice` says what would."""
    free = available_bytes()
    if free is not None and needed_bytes > free:
        raise ModelError(
            f"{what} needs {_mib(needed_bytes)} MiB of memory, {_mib(free)} MiB are available: "
            f"{advice}",
            code="out_of_memory",
        )


def _mib(size_bytes: int) -> str:
    return f"{size_bytes / 2**20:,.0f}"
