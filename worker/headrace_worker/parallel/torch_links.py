"""Links of ranks that share no memory, on several hosts or GPUs: torch.distributed, as torchrun
sets it up, or `launch` in its place.

Invariant: the same order as on one host. Followers take commands off their way in a thread of their
own, as gloo's broadcast ends only when its receivers have called it, and rank 0 must not wait for a
stage that computes. Beats go through the store that the ranks met in; a rank that is gone is also
noticed by whoever is waiting for it, as its connections break.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import queue
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Mapping
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor
from torch.distributed import TCPStore  # type: ignore[attr-defined]  # exported without a word
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from headrace.errors import ModelError
from headrace.supervisor import die_with_parent
from headrace_worker.device import CPU, collectives_for, rank_device
from headrace_worker.parallel.collective import Group, TorchGroup
from headrace_worker.parallel.links import PATIENCE_S, Alone, LinkError
from headrace_worker.parallel.shape import Shape

FRAME_BYTES = 4096
"""A command of up to so many bytes, less its head, is one broadcast; more is two."""
_HEAD_BYTES = 8
COMMANDS_MAX = 64
"""Commands that a follower has taken off its way and not carried out."""
_PR_SET_PDEATHSIG = 1
_STORES: list[object] = []
"""Where ranks that this process started meet: it ends with its owner, so it is kept."""
IDLE = timedelta(days=365)
"""How long a rank waits for a command or an answer, if all live: for ever."""


def started_by_torchrun() -> bool:
    """Whether this process is one of several that torchrun started."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ


def ranks_here() -> int:
    """How many of torchrun's processes run on this host."""
    return max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def join(shape: Shape, device: str) -> TorchLinks:
    """This process's links; `device`: the setting. Raises ModelError."""
    return TorchLinks(shape, rank_device(device, int(os.environ["LOCAL_RANK"]), ranks_here()))


def launch(shape: Shape, env: Mapping[str, str]) -> list[subprocess.Popen[bytes]]:
    """Does what torchrun would on one host: makes this process rank 0, and starts the others.

    `env`: their settings. Belongs into the main thread. They never outlive this process.
    """
    # it listens before anybody is told where: a port that was only free a moment ago may be taken
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    _STORES.append(store)
    world = str(shape.ranks)
    common = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "WORLD_SIZE": world,
        "LOCAL_WORLD_SIZE": world,
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # there is one, as torchrun says it
        "TORCHELASTIC_RESTART_COUNT": "0",
    }
    os.environ.update(common, RANK="0", LOCAL_RANK="0")
    return [
        subprocess.Popen(
            [sys.executable, "-m", "headrace_worker"],
            env={**os.environ, **env, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdin=subprocess.DEVNULL,
            preexec_fn=die_with_parent(),
        )
        for rank in range(1, shape.ranks)
    ]


def end_with_starter() -> None:
    """If torchrun dies without a word, rank 0 drains, and so all end; another rank ends at once."""
    if sys.platform.startswith("linux"):
        number = signal.SIGTERM if os.environ["RANK"] == "0" else signal.SIGKILL
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number, 0, 0, 0)


class TorchLinks:
    """One rank's ways over gloo; between GPUs activations and sums go over NCCL.

    All ranks build one at the same time.
    """

    def __init__(self, shape: Shape, device: torch.device = CPU) -> None:
        """`device`: where the rank computes, which decides what its sums go over.

        Raises ModelError where torchrun started another number of processes."""
        store, self.rank, world = next(iter(rendezvous("env://")))
        if world != shape.ranks:
            raise ModelError(
                f"torchrun started {world} processes; {shape.tensor} tensor ranks in each of "
                f"{shape.pipeline} stages are {shape.ranks}"
            )
        self.shape, self.device = shape, device
        dist.init_process_group(
            "gloo", store=PrefixStore("headrace", store), rank=self.rank, world_size=world
        )
        if device.type == "cuda":
            torch.cuda.set_device(device)  # NCCL takes the thread's
        everybody, backend = list(range(world)), collectives_for(device)
        self._orders = dist.new_group(everybody, timeout=IDLE, backend="gloo")
        self._answers = dist.new_group(everybody, timeout=IDLE, backend="gloo")
        patience = timedelta(seconds=PATIENCE_S)
        self._lanes = dist.new_group(everybody, timeout=patience, backend=backend)
        self.group: Group = Alone()
        for stage in range(shape.pipeline):
            ranks = list(shape.stage_ranks(stage))
            host = made = dist.new_group(ranks, timeout=patience, backend="gloo")
            if backend != "gloo":
                made = dist.new_group(ranks, timeout=patience, backend=backend)
            if self.rank in ranks and shape.tensor > 1:
                self.group = TorchGroup(made, host)
        self._beats = PrefixStore("beats", store.clone())
        self._sent: deque[tuple[dist.Work | None, Tensor]] = deque()
        self._commands: queue.Queue[NDArray[np.uint8] | Exception] = queue.Queue(COMMANDS_MAX)
        if self.rank:
            threading.Thread(target=self._listen, name="rank orders", daemon=True).start()

    def command(self, data: bytes) -> None:
        frame = np.zeros(FRAME_BYTES, np.uint8)
        frame[:_HEAD_BYTES] = np.frombuffer(len(data).to_bytes(_HEAD_BYTES, "little"), np.uint8)
        raw = np.frombuffer(data, np.uint8)
        first = raw[: FRAME_BYTES - _HEAD_BYTES]
        frame[_HEAD_BYTES : _HEAD_BYTES + len(first)] = first
        self._broadcast(torch.from_numpy(frame))
        if len(first) < len(raw):
            self._broadcast(torch.from_numpy(raw[len(first) :].copy()))

    def _broadcast(self, x: Tensor) -> None:
        dist.broadcast(x, src=0, group=self._orders)

    def _listen(self) -> None:
        try:
            while True:
                frame = torch.empty(FRAME_BYTES, dtype=torch.uint8)
                self._broadcast(frame)
                raw = frame.numpy()
                size = int.from_bytes(raw[:_HEAD_BYTES].tobytes(), "little")
                first = raw[_HEAD_BYTES : _HEAD_BYTES + size]
                if len(first) < size:
                    rest = torch.empty(size - len(first), dtype=torch.uint8)
                    self._broadcast(rest)
                    first = np.concatenate((first, rest.numpy()))
                self._commands.put(first)
        except Exception as error:  # whatever it is, the main thread has to know
            self._commands.put(error)

    def next_command(self) -> NDArray[np.uint8]:
        found = self._commands.get()
        if isinstance(found, Exception):
            raise LinkError(f"rank 0 is gone: {found}") from found
        return found

    def pass_on(self, x: Tensor) -> None:
        x = x.contiguous()
        while len(self._sent) >= self.shape.pipeline:
            work, _ = self._sent.popleft()
            if work is not None:
                work.wait()
        work = dist.isend(x, self.rank + self.shape.tensor, group=self._lanes)
        self._sent.append((work, x))

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        x = torch.empty(shape, dtype=dtype, device=self.device)
        dist.recv(x, self.rank - self.shape.tensor, group=self._lanes)
        return x

    def answer(self, data: bytes) -> None:
        dist.send(torch.tensor([len(data)]), 0, group=self._answers)
        if data:
            raw = torch.from_numpy(np.frombuffer(data, np.uint8).copy())
            dist.send(raw, 0, group=self._answers)

    def next_answer(self, rank: int, limit_s: float) -> NDArray[np.uint8] | None:  # noqa: ARG002
        """Waits as long as `rank` lives: beats, or its connection, tell when it does not."""
        size = torch.empty(1, dtype=torch.int64)
        dist.recv(size, rank, group=self._answers)
        raw = torch.empty(int(size[0]), dtype=torch.uint8)
        if len(raw):
            dist.recv(raw, rank, group=self._answers)
        return raw.numpy()

    def beat(self) -> None:
        with contextlib.suppress(Exception):  # the store is gone: the connections tell
            self._beats.add(str(self.rank), 1)

    def beats(self) -> list[int]:
        try:
            return [self._beats.add(str(rank), 0) for rank in range(self.shape.ranks)]
        except Exception:  # the host of the store is gone, and with it everything
            return [0] * self.shape.ranks
