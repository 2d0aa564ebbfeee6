"""What rank 0 tells the others, and what they say to it.

Invariant: a command says all that carrying it out needs; no rank knows more of a job. The first
byte of each message is its kind.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from enum import IntEnum

import msgpack
import numpy as np
import torch

from headrace.frames import Buffer
from headrace_worker.attention.choice import Wanted
from headrace_worker.parallel.vocabulary import Verdict

MESSAGE_BYTES_MAX = 2**31 - 1


class Kind(IntEnum):
    OPEN = 1
    """Make the KV pool: an Open follows."""
    STEP = 2
    """Compute a step: StepInputs follow."""
    ZERO = 3
    """Zero these blocks, for ranks whose pool rank 0 cannot reach."""
    END = 4
    """Leave."""


@dataclass(frozen=True, slots=True)
class Open:
    """The KV pool that a rank makes, and what reads it. `starts`: where in shared memory each
    rank's lies, if it does.

    A rank answers when it can compute steps.
    """

    wanted: Wanted
    starts: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Loaded:
    """A rank of `host` has its weights, which take `weight_bytes`; `fingerprint` is its model's.

    `free_bytes`: what they leave of its GPU; None on CPUs. `kernels`: the instruction set of the
    native kernels that compute it; "none" where torch does.
    """

    weight_bytes: int
    fingerprint: str
    host: str = ""
    free_bytes: int | None = None
    kernels: str = "none"


def pack(kind: Kind, body: object = None) -> bytes:
    """A command whose body msgpack can say."""
    packed: bytes = msgpack.packb(body)
    return bytes([kind]) + packed


def pack_step(step: bytes) -> bytes:
    return bytes([Kind.STEP]) + step


def pack_open(opening: Open) -> bytes:
    return pack(Kind.OPEN, asdict(opening))


def unpack_open(body: Buffer) -> Open:
    said = msgpack.unpackb(body)
    return Open(Wanted(**said["wanted"]), tuple(said["starts"]))


def unpack_blocks(body: Buffer) -> list[int]:
    blocks: list[int] = msgpack.unpackb(body)
    return blocks


def pack_blocks(blocks: Sequence[int]) -> bytes:
    return pack(Kind.ZERO, list(blocks))


def pack_loaded(loaded: Loaded) -> bytes:
    packed: bytes = msgpack.packb(asdict(loaded))
    return packed


def unpack_loaded(body: Buffer) -> Loaded:
    return Loaded(**msgpack.unpackb(body))


def pack_verdict(verdict: Verdict) -> bytes:
    """What the last stage says of a step."""
    whole = verdict.whole.numpy(force=True)
    packed: bytes = msgpack.packb(
        (verdict.tokens.tobytes(), whole.shape, np.ascontiguousarray(whole).tobytes())
    )
    return packed


def unpack_verdict(data: Buffer) -> Verdict:
    """Raises ValueError for what `pack_verdict` did not make."""
    tokens, shape, whole = msgpack.unpackb(data, max_bin_len=MESSAGE_BYTES_MAX)
    rows = np.frombuffer(bytearray(whole), np.float32).reshape(shape)
    return Verdict(np.frombuffer(tokens, np.int64), torch.from_numpy(rows))
