"""How long the kernel lets a thread run before others have their turn.

A thread that asks for short turns runs soon after it is woken, also where every core is busy with
threads of the usual ones (Linux 6.12 and later: "EEVDF" with a slice of one's own). What answers
others asks for them; what computes for long does not, and loses next to nothing by it.
Invariant: where the kernel or the processor knows no such thing, nothing changes.
Rejected: niceness below zero and real-time classes, which need privileges; pinning threads to
cores, which leaves some of them idle.
"""

from __future__ import annotations

import ctypes
import os
import platform
import struct

SHORT_NS = 100_000
"""The shortest that the kernel grants."""

USUAL_NS = 0
"""The kernel's own choice, some milliseconds."""

_ATTRIBUTES = struct.Struct("<IIQiIQQQ")
"""sched_attr: size, policy (0: the usual one), flags, niceness, priority, and three times in ns, of
which the first is the slice."""

_CALLS = {"x86_64": (314, 315), "aarch64": (274, 275)}
"""Numbers of sched_setattr and sched_getattr, which Python's library does not have."""


def ask(slice_ns: int) -> bool:
    """Ask for turns of that length for the calling thread, and those it starts; whether it has
    them now."""
    calls = _CALLS.get(platform.machine())
    if calls is None or os.name != "posix":
        return False
    call = ctypes.CDLL(None, use_errno=True).syscall
    setting, getting = calls
    niceness = os.getpriority(os.PRIO_PROCESS, 0)
    asked = _ATTRIBUTES.pack(_ATTRIBUTES.size, 0, 0, niceness, 0, slice_ns, 0, 0)
    if call(setting, 0, ctypes.create_string_buffer(asked, _ATTRIBUTES.size), 0):
        return False
    found = ctypes.create_string_buffer(_ATTRIBUTES.size)
    if call(getting, 0, found, _ATTRIBUTES.size, 0):
        return False
    # an older kernel takes the call and keeps to its own slice
    return bool(_ATTRIBUTES.unpack(found.raw)[5] == slice_ns) or slice_ns == USUAL_NS
