"""Several ranks in one process, a thread each, over the memory that real ones share."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

import numpy as np
import torch

from headrace_worker.parallel.collective import SharedGroup

T = TypeVar("T")


def together(size: int, work: Callable[[SharedGroup], T], slot_bytes: int = 1 << 16) -> list[T]:
    """What `work` gives on each of `size` ranks, by rank. Raises what the first of them raised."""
    memory = np.zeros(SharedGroup.bytes_needed(size, slot_bytes), np.uint8)
    found: list[T | BaseException] = [RuntimeError("never ran")] * size

    def run(rank: int) -> None:
        try:
            with torch.inference_mode():
                found[rank] = work(SharedGroup(memory, rank, size, patience_s=30))
        except BaseException as error:
            found[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    results: list[T] = []
    for result in found:
        if isinstance(result, BaseException):
            raise result
        results.append(result)
    return results
