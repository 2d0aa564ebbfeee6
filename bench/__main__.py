"""`python -m bench NAME [flags]`: run one benchmark; without a name, list them."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path


def main() -> None:
    names = sorted(
        path.stem for path in Path(__file__).parent.glob("*.py") if not path.stem.startswith("_")
    )
    if len(sys.argv) < 2 or sys.argv[1] not in names:
        print("benchmarks: " + ", ".join(names) + "\nusage: make bench ARGS='NAME [flags]'")
        raise SystemExit(0 if len(sys.argv) < 2 else 2)
    name = sys.argv.pop(1)
    runpy.run_module(f"bench.{name}", run_name="__main__")


if __name__ == "__main__":
    main()
