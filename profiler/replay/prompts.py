"""Token ids of prompts whose text nobody has: equal where the workload says they are equal, else all different."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from profiler.replay.job import Request

# Tokens of one block id in Mooncake's traces.
BLOCK_TOKENS = 512
_UNIQUE = np.uint64(1 << 63)


def prompt_token_ids(request: Request, ordinal: int, vocab_size: int) -> list[int]:
    """The prompt of a request; `ordinal` is its place in the workload and tells made-up prompts apart."""
    if request.prompt_token_ids:
        return list(request.prompt_token_ids)
    if request.blocks:
        keys = np.asarray(request.blocks, dtype=np.uint64)
    else:
        count = -(-request.prompt_tokens // BLOCK_TOKENS)
        keys = _UNIQUE | (np.uint64(ordinal) << np.uint64(24)) | np.arange(count, dtype=np.uint64)
    tokens: list[int] = _tokens(keys, vocab_size)[: request.prompt_tokens].tolist()
    return tokens


def _tokens(keys: NDArray[np.uint64], vocab_size: int) -> NDArray[np.int64]:
    """BLOCK_TOKENS token ids for each key, flat, below `vocab_size`."""
    positions = np.arange(BLOCK_TOKENS, dtype=np.uint64)
    mixed = _mix(_mix(keys)[:, None] ^ positions[None, :])
    return (mixed % np.uint64(vocab_size)).astype(np.int64).ravel()


def _mix(z: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """splitmix64; unsigned arrays wrap around without a warning."""
    z = z + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
