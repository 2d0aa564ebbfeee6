"""Which KV blocks came and went since the fleet was last told, by model.

Invariant: news say what is true when they are taken, not what happened: whatever was touched is
looked up again, so a block that went from memory to disk, or came and went, is told once or not at
all. News are numbered by model from 1; where more was touched than news may hold, a number is left
out, so that readers notice and fetch the snapshot.
Rejected: a set of all that was told (100 MB a million entries). A block that is gone is told to the
readers of every model instead, as none of them minds.
"""

from __future__ import annotations

from collections.abc import Iterator

from headrace.frames import KV, EntryKey
from headrace.policy.hashing import MODEL_TAG_BYTES
from headrace.types import BLOCK_KEY_BYTES, BlockNews
from headrace_cache.disk_catalog import NAME_SHIFT
from headrace_cache.index import Tier
from headrace_cache.policy.eviction import NO_SLOT
from headrace_cache.tiers import Tiers

TOUCHED_MAX = 8_192
"""Blocks between two news."""
MODELS_MAX = 64
"""Models that are told of; one more is not."""
SLICE = 4_096
"""Slots looked at in one go for a snapshot: about a millisecond."""
SNAPSHOT_BLOCKS_MAX = 262_144
"""2 MiB; blocks past them are left out."""
_NO_MODEL = bytes(MODEL_TAG_BYTES)


class Feed:
    """What is to be told of one service's tiers."""

    def __init__(self, tiers: Tiers) -> None:
        self._tiers = tiers
        self._touched: dict[bytes, None] = {}
        self._too_many = False
        self.sequences: dict[bytes, int] = {}
        """The number of the last news, by model."""
        self.changed: set[bytes] = set()
        """Models whose blocks came or went since `changed` was last emptied."""
        tiers.store.moved = self._moved

    def _moved(self, slot: int) -> None:
        self.touched(self._tiers.store.index.key(slot))

    def touched(self, key: EntryKey) -> None:
        """`key` came to a tier or left one."""
        if key.kind == KV and not self._too_many:
            self._touched[key.hash] = None
            if len(self._touched) > TOUCHED_MAX:
                self._touched.clear()
                self._too_many = True

    def take(self, address: str, boot: str) -> list[tuple[bytes, BlockNews]]:
        """The news of each model that has any."""
        disk = self._tiers.disk
        if disk is not None:
            events = disk.drain_events()
            self._too_many |= events.lost > 0
            for _, key in events.changes:
                self.touched(key)
        if self._too_many:
            self._skip()
            return []
        stored, gone = self._sorted_out()
        removed = b"".join(gone)
        news = []
        for model in self.sequences:
            if model in stored or removed:
                self.sequences[model] += 1
                self.changed.add(model)
                came = b"".join(stored.get(model, ()))
                each = BlockNews(address, boot, self.sequences[model], came, removed)
                news.append((model, each))
        return news

    def _skip(self) -> None:
        self._too_many = False
        self._touched.clear()
        for model in self._all_models():
            self.sequences[model] = self.sequences.get(model, 0) + 1
            self.changed.add(model)

    def _sorted_out(self) -> tuple[dict[bytes, list[bytes]], list[bytes]]:
        """What was touched: keys that are here, by model, and those that are not."""
        stored: dict[bytes, list[bytes]] = {}
        gone: list[bytes] = []
        for block_hash in self._touched:
            model = self._model_of(EntryKey(KV, block_hash))
            if model is None:
                gone.append(key_of(block_hash))
            elif model in self.sequences or self._begin(model):
                stored.setdefault(model, []).append(key_of(block_hash))
        self._touched.clear()
        return stored, gone

    def _begin(self, model: bytes) -> bool:
        """Whether `model` is told of from now on: it has a name, and there is room."""
        if model == _NO_MODEL or len(self.sequences) >= MODELS_MAX:
            return False
        self.sequences[model] = 0
        return True

    def _model_of(self, key: EntryKey) -> bytes | None:
        """The tag of the model of an entry that is here; None if it is not."""
        index = self._tiers.store.index
        slot = index.find(key, Tier.RAM)
        if slot != NO_SLOT:
            return index.layout[slot].to_bytes(8)[:MODEL_TAG_BYTES]
        disk = self._tiers.disk
        return disk.catalog.model_of(key) if disk is not None else None

    def _all_models(self) -> set[bytes]:
        """Those told of already, and those that a look at the tiers finds. Takes some time."""
        index = self._tiers.store.index
        tags = {index.layout[slot] >> 32 for slot in index.entries(0, Tier.RAM)}
        disk = self._tiers.disk
        if disk is not None:
            tags |= disk.catalog.models()
        found = {tag.to_bytes(MODEL_TAG_BYTES) for tag in tags if tag}
        room = MODELS_MAX - len(self.sequences)
        return {*self.sequences, *sorted(found - self.sequences.keys())[:room]}

    def snapshot(self, model: bytes) -> Iterator[bytes]:
        """The keys of all of a model's blocks, in pieces, each of which takes about a millisecond.

        Blocks come and go between pieces; news with numbers from before the first on tell of them.
        """
        tag = int.from_bytes(model) << 32
        layouts = range(tag, tag + (1 << 32))
        index, left = self._tiers.store.index, SNAPSHOT_BLOCKS_MAX
        for first in range(0, index.slots, SLICE):
            hashes = index.hashes_of(KV, layouts, first, first + SLICE, Tier.RAM)[:left]
            left -= len(hashes)
            yield b"".join(map(key_of, hashes))
        disk = self._tiers.disk
        for segment in disk.catalog.segments() if disk is not None else ():
            assert disk is not None, "only a disk has segments"
            names = disk.catalog.names_in(segment, model)[:left]
            left -= len(names)
            yield b"".join((n << NAME_SHIFT).to_bytes(BLOCK_KEY_BYTES, "little") for n in names)

    def check_integrity(self) -> None:
        assert len(self._touched) <= TOUCHED_MAX and len(self.sequences) <= MODELS_MAX
        assert self.changed <= self.sequences.keys(), "what changed is told of"


def key_of(block_hash: bytes) -> bytes:
    """How a block is named here: by as many bits as the disk tier's catalog keeps of its hash."""
    return bytes((block_hash[0] & 0xF0,)) + block_hash[1:BLOCK_KEY_BYTES]
