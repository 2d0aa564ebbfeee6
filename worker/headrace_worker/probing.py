"""Finding out what this torch and this processor can do, without a pool of threads.

Invariant: importing the worker starts no thread of OpenMP. Its threads belong to whoever asks
first; a probe at import would make a pool for the importing thread, and one that the engine's
thread makes beside it is one too many for the cores: then none of them spins, each wakes the
others through the kernel, and a step of two threads takes as long as one of a single thread
(prefill of 128 tokens on two cores: 336 ms without such a pool, 500 with it).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def one_thread() -> Iterator[None]:
    """What torch computes in here runs in the calling thread alone."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
