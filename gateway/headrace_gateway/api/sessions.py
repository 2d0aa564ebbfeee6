"""How a job's prompt is named for routing: its blocks, and what keeps related requests together.

Invariant: names are made with the tenant's salt, so that no tenant can aim at another one's
prefixes, nor at its workers. Each prompt is hashed once, however many choices continue it.
"""

from __future__ import annotations

import asyncio
import hashlib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

from headrace.policy.hashing import block_hashes, root_hash
from headrace.types import BLOCK_KEY_BYTES
from headrace_gateway.api.validation import bad_value

SESSION_HEADER = "x-headrace-session"
SESSION_CHARS_MAX = 512
AFFINITY_BLOCKS = 16
INLINE_TOKENS_MAX = 8_192
"""Longer prompts are hashed in a thread (about 1 ms per 8,000 tokens)."""


@dataclass(frozen=True, slots=True)
class PromptNames:
    """Job.blocks and Job.affinity of one prompt."""

    blocks: bytes
    affinity: bytes


def session_of(cache_key: str | None, header: str) -> str:
    """What keeps this request with others: the body's `prompt_cache_key`, else the header."""
    if len(header) > SESSION_CHARS_MAX:
        raise bad_value(SESSION_HEADER, f"at most {SESSION_CHARS_MAX} characters")
    return cache_key or header


async def name_prompts(
    fingerprint: str, salt: bytes, prompts: Sequence[array[int]], session: str
) -> list[PromptNames]:
    """The names of each of `prompts`; '' is no session."""
    root = root_hash(fingerprint, salt)
    if sum(map(len, prompts)) > INLINE_TOKENS_MAX:
        return await asyncio.to_thread(_name_all, root, prompts, session)
    return _name_all(root, prompts, session)


def _name_all(root: bytes, prompts: Sequence[array[int]], session: str) -> list[PromptNames]:
    return [_name(root, prompt, session) for prompt in prompts]


def _name(root: bytes, prompt: array[int], session: str) -> PromptNames:
    hashes = block_hashes(root, prompt)
    blocks = b"".join([each[:BLOCK_KEY_BYTES] for each in hashes])
    if session:
        key = session.encode("utf-8", "surrogateescape")
        return PromptNames(blocks, hashlib.sha256(root + b"\0session\0" + key).digest())
    if hashes:
        return PromptNames(blocks, hashes[min(len(hashes), AFFINITY_BLOCKS) - 1])
    return PromptNames(blocks, hashlib.sha256(root + prompt.tobytes()).digest())
