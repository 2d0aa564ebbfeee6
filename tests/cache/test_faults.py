"""Some of the fault runs of `bench/cache_faults.py`: nothing wrong is served, and all come back."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
RUNS = 16
PATIENCE_S = 200


def test_nothing_wrong_is_served_whatever_happens() -> None:
    """Processes killed in the middle of copies, full disks, damaged bytes: right blocks or none."""
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    done = subprocess.run(
        [sys.executable, "-m", "bench", "cache_faults", "--runs", str(RUNS), "--seed", str(seed)],
        cwd=ROOT, env=os.environ, capture_output=True, text=True, timeout=PATIENCE_S, check=True,
    )  # fmt: skip
    result = json.loads(done.stdout)
    assert result["wrong"] == 0, result["wrong_names"]
    assert result["hits"] > 100
    assert result["ahead"] > 0, "places had ahead were used, and died with their holders"
    assert result["errors"] == result["service_deaths"] == result["service_tracebacks"] == 0
    assert result["disk"]["written"] > 0 and result["disk"]["job_failures"] == 0
