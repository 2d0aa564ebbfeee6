"""A model's fingerprint: equal fingerprints mean that KV blocks can be exchanged.

Invariant: it covers everything that KV bytes depend on: configuration, dtype, how weights are
quantized, layout and dtype of the KV pool, and the weights. Weight files are identified by size,
their first and last MiB and their tensor index, not by a hash over gigabytes that would be read at
every start; and never by path, so that workers on different machines agree.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

import torch

from headrace_worker.kv.pool import LAYOUT_VERSION, KvDtype
from headrace_worker.model.config import ModelConfig

_SAMPLE_BYTES = 1 << 20


def fingerprint(
    config: ModelConfig,
    dtype: torch.dtype,
    quantization: str,
    files: Iterable[Path],
    index: Iterable[str],
) -> str:
    """Hexadecimal SHA-256. `index` lists the tensors: a line each with name, type and shape."""
    digest = hashlib.sha256()
    digest.update(f"{config!r}\n{dtype}\n{quantization}\n{LAYOUT_VERSION}\n".encode())
    for line in index:
        digest.update(line.encode() + b"\n")
    for path in sorted(files, key=lambda file: file.name):
        digest.update(_identity(path))
    return digest.hexdigest()


def block_fingerprint(model: str, kv_dtype: KvDtype) -> str:
    """The fingerprint of a model whose KV pool is of `kv_dtype`; `model` is the model's own."""
    if kv_dtype == "auto":
        return model
    return hashlib.sha256(f"{model}\n{kv_dtype}\n".encode()).hexdigest()


def _identity(path: Path) -> bytes:
    size = path.stat().st_size
    digest = hashlib.sha256(size.to_bytes(8, "little"))
    with path.open("rb") as file:
        digest.update(file.read(_SAMPLE_BYTES))
        file.seek(max(0, size - _SAMPLE_BYTES))
        digest.update(file.read(_SAMPLE_BYTES))
    return digest.digest()
