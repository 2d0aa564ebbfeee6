"""Blocks between a device's memory and the host's: through pinned memory where there is a GPU.

Invariant: when a call returns, the bytes have arrived; nothing refers to the caller's memory any
more. What leaves a GPU is copied on a stream of its own, behind everything that the engine has
queued so far, so that a step that runs meanwhile is not waited for by the next one. The caller
holds a lock: there is one buffer. Rejected: pinning the callers' memory, which is the cache
service's and changes with every entry.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


class Staging:
    """Room for one payload of `size_bytes` on its way from or to `device`."""

    def __init__(self, size_bytes: int, device: torch.device) -> None:
        self._device = device
        self.pinned = device.type == "cuda"
        if self.pinned:
            self._buffer = torch.empty(size_bytes, dtype=torch.uint8, pin_memory=True)
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def fetch(self, source: Tensor, target: NDArray[np.uint8]) -> None:
        """Writes `source`, whatever its strides, into `target`, as one run of bytes."""
        if not self.pinned:
            target[:] = _bytes_of(source).numpy()
            return
        self._stream.wait_stream(torch.cuda.default_stream(self._device))
        with torch.cuda.stream(self._stream):
            self._buffer.copy_(_bytes_of(source), non_blocking=True)
        self._stream.synchronize()
        target[:] = self._buffer.numpy()

    def bring(self, data: NDArray[np.uint8], target: Tensor) -> None:
        """Fills `target`, whatever its strides, with `data`."""
        if not self.pinned:
            target.copy_(torch.from_numpy(data.copy()).view(target.dtype).view(target.shape))
            return
        self._buffer.numpy()[:] = data
        run = self._buffer.to(self._device, non_blocking=True)
        target.copy_(run.view(target.dtype).view(target.shape))
        torch.cuda.current_stream(self._device).synchronize()  # the buffer is free again


def _bytes_of(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)
