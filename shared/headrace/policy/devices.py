"""Devices that models run on, as their vendors' data sheets have them, and fleets written `8x80G`.

Invariant: a limit that is told comes from a number that is told as well. Figures are dense, not
those with structured sparsity; links count one direction. A memory size alone names the device
that is meant most often, and the plan says which one it took.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from headrace.errors import SettingsError

GIB = 2**30
DEVICES_MAX = 4_096
_GROUP = re.compile(
    r"(?:(?P<hosts>\d+)x)?(?P<count>\d+)x(?:(?P<name>[a-z][a-z0-9]*)(?:-(?P<size>\d+)g)?"
    r"|(?P<bare>\d+)g)"
)


@dataclass(frozen=True, slots=True)
class Device:
    """One device. 0 stands for a figure that is not known, whose limits are then not told.

    `memory_bytes` all of it; `bandwidth` bytes a second from its memory, `flops` bfloat16 a second,
    `link` bytes a second to another device of its host, one direction. `kind`: "gpu" or "cpu".
    """

    name: str
    kind: str
    memory_bytes: int
    bandwidth: float = 0.0
    flops: float = 0.0
    link: float = 0.0


def _gpu(name: str, gib: int, gbs: float, tflops: float, link_gbs: float) -> Device:
    return Device(name, "gpu", gib * GIB, gbs * 1e9, tflops * 1e12, link_gbs * 1e9)


DEVICES: dict[str, Device] = {
    device.name: device
    for device in (
        _gpu("a100", 80, 2_039, 312, 300),
        _gpu("a100-40", 40, 1_555, 312, 300),
        _gpu("h100", 80, 3_350, 989, 450),
        _gpu("h200", 141, 4_800, 989, 450),
        _gpu("b200", 180, 7_700, 2_250, 900),
        _gpu("a10", 24, 600, 125, 32),
        _gpu("l4", 24, 300, 121, 32),
        _gpu("l40s", 48, 864, 362, 32),
        _gpu("rtx4090", 24, 1_008, 165, 32),
    )
}
"""By name; "-40" where a name alone stands for another memory size."""

_MEANT = {24: "l4", 40: "a100-40", 48: "l40s", 80: "h100", 141: "h200", 180: "b200"}
"""What a memory size alone, in GiB, is taken for."""


@dataclass(frozen=True, slots=True)
class Fleet:
    """`hosts` times `per_host` equal devices. `assumed`: what of the device nobody said."""

    device: Device
    hosts: int
    per_host: int
    assumed: str = ""

    @property
    def count(self) -> int:
        return self.hosts * self.per_host


def parse_gpus(text: str) -> Fleet:
    """From `8x80G`, `8xh100`, `8xa100-40G`, or with hosts `2x8xh100`. Raises SettingsError."""
    match = _match(text, "8x80G, 8xh100, 8xa100-40G or 2x8xh100")
    assumed = ""
    if match["bare"]:
        gib = int(match["bare"])
        if gib in _MEANT:
            device = DEVICES[_MEANT[gib]]
            assumed = f"{gib}G is taken for {device.name}: name another like 8xa100-80G"
        else:
            device = Device(f"{gib}G", "gpu", gib * GIB)
            assumed = f"no known device has {gib}G: name one, or give --bandwidth-gbs and --tflops"
    else:
        device = _named(match["name"], match["size"])
    return _fleet(match, device, assumed)


def _named(name: str, size: str | None) -> Device:
    exact = DEVICES.get(f"{name}-{size}")
    if exact is not None:
        return exact
    device = DEVICES.get(name)
    if device is None:
        raise SettingsError(f"device {name!r} is not one of {', '.join(DEVICES)}")
    return replace(device, memory_bytes=int(size) * GIB) if size else device


def parse_cpu(text: str) -> Fleet:
    """From `2x24G`: so many machines with so much memory each. Raises SettingsError."""
    match = _match(text, "2x24G")
    if not match["bare"] or match["hosts"]:
        raise SettingsError(f"{text!r} does not describe machines: write it like 2x24G")
    gib = int(match["bare"])
    assumed = "a CPU's speed is in no table: give --bandwidth-gbs and --tflops for limits"
    device = Device(f"{gib}G machine", "cpu", gib * GIB)
    return Fleet(device, _count(match), 1, assumed)


def _match(text: str, example: str) -> re.Match[str]:
    match = _GROUP.fullmatch(text.strip().lower().removesuffix("b"))
    if match is None:
        raise SettingsError(f"{text!r} does not describe devices: write it like {example}")
    return match


def _count(match: re.Match[str]) -> int:
    hosts, count = int(match["hosts"] or 1), int(match["count"])
    memory = match["bare"] or match["size"] or "1"
    if not 0 < hosts * count <= DEVICES_MAX or int(memory) < 1:
        raise SettingsError(f"{match[0]!r}: from 1 to {DEVICES_MAX} devices, each with memory")
    return count


def _fleet(match: re.Match[str], device: Device, assumed: str) -> Fleet:
    return Fleet(device, int(match["hosts"] or 1), _count(match), assumed)


def with_speeds(
    fleet: Fleet, *, bandwidth_gbs: float = 0, tflops: float = 0, link_gbs: float = 0
) -> Fleet:
    """The fleet with figures that somebody gave; 0 leaves the table's."""
    device = replace(
        fleet.device,
        bandwidth=bandwidth_gbs * 1e9 or fleet.device.bandwidth,
        flops=tflops * 1e12 or fleet.device.flops,
        link=link_gbs * 1e9 or fleet.device.link,
    )
    given = bandwidth_gbs and tflops
    return replace(fleet, device=device, assumed="" if given else fleet.assumed)
