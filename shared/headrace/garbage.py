"""Python's garbage collector in a process that serves.

Invariant: what stands when it begins to serve is never gone through again, so collections look at
what requests and steps make, and seldom. With Python's defaults a full one takes some 50 ms in a
gateway, and every stream waits for it; in a worker it would go through all of torch.
"""

from __future__ import annotations

import gc

GC_YOUNG, GC_MIDDLE, GC_OLD = 20_000, 20, 20
"""New objects, and collections of younger ones, between two collections."""


def settle_memory() -> None:
    """What stands now stays."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(GC_YOUNG, GC_MIDDLE, GC_OLD)
