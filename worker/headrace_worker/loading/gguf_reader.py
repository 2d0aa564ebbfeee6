"""The GGUF container: metadata and tensors of a mapped file.

Invariant: nothing in the file is believed. Every length is checked against the bytes that are left
before anything is read or built from it, so that time and memory are bounded by the file's size and
each defect is a ModelError. Rejected: `gguf.GGUFReader`, which trusts counts (a flipped bit lets it
run for hours) and makes three numpy arrays of each vocabulary entry (seconds for 250,000).
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from numpy.typing import NDArray

from headrace.errors import ModelError

VERSIONS = (2, 3)
"""Version 1 had 32-bit lengths and is long gone."""
DIMENSIONS_MAX = 4
ALIGNMENT_MAX = 1 << 16
ENTRIES_MAX = 1 << 22
"""Of a metadata array: the largest vocabularies have a million merges."""
TEXT_BYTES_MAX = 1 << 26
TENSORS_MAX = PAIRS_MAX = 1 << 20
_DEFAULT_ALIGNMENT = 32
_STRING, _ARRAY = 8, 9
_SCALARS = {
    0: "<B",
    1: "<b",
    2: "<H",
    3: "<h",
    4: "<I",
    5: "<i",
    6: "<f",
    7: "<?",
    10: "<Q",
    11: "<q",
    12: "<d",
}
"""Layout by the number of a value's type."""
_KEY_BYTES_MIN = 8 + 4 + 1
_TENSOR_BYTES_MIN = 8 + 4 + 8 + 4 + 8


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """One tensor. `shape` has the fastest dimension last, as torch has it."""

    name: str
    kind: GGMLQuantizationType
    shape: tuple[int, ...]
    data: NDArray[np.uint8]
    """Its bytes as they stand in the file, [size_bytes], read-only."""

    def rows(self, start: int, count: int) -> NDArray[np.uint8]:
        """The bytes of `count` entries of the first dimension, [..., bytes of a row]."""
        if count == self.shape[0]:
            return self.data.reshape(*self.shape[:-1], -1)
        size = len(self.data) // self.shape[0]
        part = self.data[start * size : (start + count) * size]
        return part.reshape(count, *self.shape[1:-1], -1)


class GgufFile:
    """An opened file: `metadata` by key, `tensors` by name in the file's order."""

    def __init__(self, path: Path) -> None:
        try:
            with path.open("rb") as file:
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:  # ValueError: an empty file
            raise ModelError(f"{path.name} is not a readable GGUF file: {error}") from error
        try:
            cursor = _Cursor(mapped)
            tensors, pairs = _header(cursor)
            self.metadata = _pairs(cursor, pairs)
            infos = [_info(cursor) for _ in range(tensors)]
            start = _data_start(cursor, self.metadata)
            self.tensors = _tensors(mapped, infos, start)
        except ModelError as error:
            message = f"{path.name} is not a readable GGUF file: {error}"
            raise ModelError(message, code=error.code) from error


class _Cursor:
    """Reads forward through the file's head."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data = data
        self._size = len(data)
        self.at = 0

    @property
    def left(self) -> int:
        return self._size - self.at

    def take(self, count: int, what: str) -> bytes:
        if count > self.left:
            raise ModelError(f"{what} of {count} bytes at byte {self.at}, {self.left} are left")
        self.at += count
        return self._data[self.at - count : self.at]

    def number(self, layout: str, what: str) -> Any:
        return struct.unpack(layout, self.take(struct.calcsize(layout), what))[0]

    def count(self, bytes_min: int, most: int, what: str) -> int:
        """How many `what` of at least `bytes_min` bytes each follow."""
        count: int = self.number("<Q", f"the number of {what}")
        if count * bytes_min > self.left:
            raise ModelError(f"{count} {what} cannot stand in the {self.left} bytes that are left")
        if count > most:
            raise ModelError(f"{count} {what} are more than the {most} that are read")
        return count

    def text(self, what: str) -> str:
        return self.texts(1, what)[0]

    def texts(self, count: int, what: str) -> list[str]:
        """`count` texts, each with its length before it. A tight loop: there are half a million."""
        data, size, at = self._data, self._size, self.at
        length_of, found = struct.Struct("<Q").unpack_from, []
        for _ in range(count):
            start = at + 8
            length: int = length_of(data, at)[0] if start <= size else size
            at = start + length
            if at > size or length > TEXT_BYTES_MAX:
                raise ModelError(f"{what} at byte {start} goes beyond the end, or any sense")
            try:
                found.append(data[start:at].decode())
            except UnicodeDecodeError as error:
                raise ModelError(f"{what} at byte {start} is not UTF-8: {error}") from None
        self.at = at
        return found


def _header(cursor: _Cursor) -> tuple[int, int]:
    """How many tensors and how many metadata pairs the file says it has."""
    if cursor.left < 4 or cursor.take(4, "the magic") != b"GGUF":
        raise ModelError("it does not begin with GGUF")
    version: int = cursor.number("<I", "the version")
    if version not in VERSIONS:
        turned = int.from_bytes(version.to_bytes(4, "big"), "little") in VERSIONS
        hint = " (a big-endian file)" if turned else ""
        raise ModelError(f"it has version {version}{hint}; supported: 2 and 3, little-endian")
    tensors = cursor.count(_TENSOR_BYTES_MIN, TENSORS_MAX, "tensors")
    return tensors, cursor.count(_KEY_BYTES_MIN, PAIRS_MAX, "metadata pairs")


def _pairs(cursor: _Cursor, count: int) -> dict[str, Any]:
    metadata: dict[str, Any] = {}
    for _ in range(count):
        key = cursor.text("a metadata key")
        if key in metadata:
            raise ModelError(f"metadata key {key!r} stands twice")
        metadata[key] = _value(cursor, cursor.number("<I", f"the type of {key!r}"), key)
    return metadata


def _value(cursor: _Cursor, kind: int, key: str) -> Any:
    if kind == _STRING:
        return cursor.text(f"the value of {key!r}")
    if kind == _ARRAY:
        return _array(cursor, key)
    if kind not in _SCALARS:
        raise ModelError(f"{key!r} has a value of unknown type {kind}")
    return cursor.number(_SCALARS[kind], f"the value of {key!r}")


def _array(cursor: _Cursor, key: str) -> list[Any]:
    kind = cursor.number("<I", f"the element type of {key!r}")
    if kind == _STRING:
        count = cursor.count(8, ENTRIES_MAX, f"texts of {key!r}")
        return cursor.texts(count, f"a text of {key!r}")
    if kind not in _SCALARS:
        raise ModelError(f"{key!r} is an array of type {kind}, which is not supported")
    layout = np.dtype(_SCALARS[kind])
    count = cursor.count(layout.itemsize, ENTRIES_MAX, f"elements of {key!r}")
    data = cursor.take(count * layout.itemsize, f"the elements of {key!r}")
    values: list[Any] = np.frombuffer(data, layout).tolist()
    return values


@dataclass(frozen=True, slots=True)
class _Info:
    name: str
    kind: GGMLQuantizationType
    shape: tuple[int, ...]
    offset: int
    size: int


def _info(cursor: _Cursor) -> _Info:
    name = cursor.text("a tensor name")
    count: int = cursor.number("<I", f"the dimensions of {name!r}")
    if not 1 <= count <= DIMENSIONS_MAX:
        raise ModelError(f"tensor {name!r} has {count} dimensions")
    shape = tuple(cursor.number("<Q", f"the shape of {name!r}") for _ in range(count))[::-1]
    number: int = cursor.number("<I", f"the type of {name!r}")
    try:
        kind = GGMLQuantizationType(number)
    except ValueError:
        raise ModelError(f"tensor {name!r} has unknown type {number}", code="tensor_type") from None
    values_of_block, bytes_of_block = GGML_QUANT_SIZES[kind]
    if 0 in shape or shape[-1] % values_of_block:
        raise ModelError(f"tensor {name!r} has shape {list(shape)}, impossible for {kind.name}")
    values = 1
    for size in shape:
        values *= size
    offset = cursor.number("<Q", f"the offset of {name!r}")
    return _Info(name, kind, shape, offset, values // values_of_block * bytes_of_block)


def _data_start(cursor: _Cursor, metadata: dict[str, Any]) -> int:
    alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
    usual = isinstance(alignment, int) and 8 <= alignment <= ALIGNMENT_MAX
    if not usual or alignment & (alignment - 1):
        raise ModelError(f"general.alignment is {alignment!r}, not a usual power of two")
    return cursor.at + -cursor.at % int(alignment)


def _tensors(data: mmap.mmap, infos: list[_Info], start: int) -> dict[str, GgufTensor]:
    view = np.frombuffer(data, np.uint8)
    tensors: dict[str, GgufTensor] = {}
    for info in infos:
        first, end = start + info.offset, start + info.offset + info.size
        if end > len(view):
            raise ModelError(
                f"tensor {info.name!r} ends at byte {end}, the file at {len(view)}: it is cut off"
            )
        if info.name in tensors:
            raise ModelError(f"tensor {info.name!r} stands twice")
        tensors[info.name] = GgufTensor(info.name, info.kind, info.shape, view[first:end])
    return tensors
