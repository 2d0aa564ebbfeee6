"""Some seconds of `bench/cache_soak.py`: a real service at its watermark keeps its promises."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
SECONDS = 5
PATIENCE_S = 120


def test_promises_hold_at_the_watermark() -> None:
    """Three tenants that want more than they may have: quotas, minimums, pins, memory, files."""
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    command = ["cache_soak", "--seconds", str(SECONDS), "--seed", str(seed)]
    done = subprocess.run(
        [sys.executable, "-m", "bench", *command],
        cwd=ROOT, env=os.environ, capture_output=True, text=True, timeout=PATIENCE_S, check=True,
    )  # fmt: skip
    print(done.stderr)
    result = json.loads(done.stdout)
    worst = result["worst"]
    assert result["wrong"] == result["errors"] == result["tracebacks"] == 0, result["wrong_names"]
    assert result["hits"] > 0 and result["evictions"] > 0, "it was at its watermark"
    assert worst["quota_over_bytes"] <= worst["one_block_bytes"]
    assert worst["minimum_under_bytes"] <= worst["one_block_bytes"]
    assert worst["pinned_missing"] == worst["pinned_wrong"] == 0
    for name in ("used", "rss", "memory_growth", "arena", "disk"):
        most = worst["budget_bytes" if name == "used" else f"{name}_bytes_max"]
        assert worst[f"{name}_bytes"] <= most, name
    assert result["held_at_the_end"] == 0, "what clients held is given back"
