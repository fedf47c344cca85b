"""Splits the decode samples of an LLM-Emu pack by what the step before them held.

LLM-Emu files an engine-loop iteration under the batch just scheduled. With asynchronous scheduling the iteration waits
for the batch before, so the first decode step after a prefill is filed with the rest of that prefill. Such samples
stand apart from the others of their cell (at output length 16 every 15th sample), and that is the rule: a sample above
TAIL_FACTOR times its reference is from a step after prefill work, others are not. The reference is the median

1. of the samples with its tokens, concurrency and context, if there are ENOUGH,
2. else of those with its tokens and concurrency, if there are ENOUGH,
3. else of the cells nearest in tokens, whole cells, ties by fewer tokens, until there are ENOUGH.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

# Above what deep contexts do to a bucket (1.13 to 1.45 x), below the smallest remainder in published packs (1.6 x).
TAIL_FACTOR = 1.5
ENOUGH = 8


def tails_of(columns: Mapping[str, NDArray[Any]]) -> NDArray[np.bool_]:
    """Of decode samples, given as columns of samples.parquet: which are from a step after prefill work."""
    latency = columns["latency_ns"]
    tokens = columns["total_tokens"].astype(np.int64)
    cells = _groups(tokens, columns["concurrency"])
    buckets = _groups(cells, columns["context_tokens"])
    reference = np.zeros(latency.size, dtype=np.float64)
    for cell in range(int(cells.max(initial=-1)) + 1):
        rows = np.flatnonzero(cells == cell)
        reference[rows] = np.median(latency[rows] if rows.size >= ENOUGH else latency[_near(tokens, cells, rows)])
        for bucket in np.unique(buckets[rows]):
            inside = rows[buckets[rows] == bucket]
            if inside.size >= ENOUGH:
                reference[inside] = np.median(latency[inside])
    return latency > TAIL_FACTOR * reference


def continues_prefill(columns: Mapping[str, NDArray[Any]], concurrency_bucket_width: int) -> NDArray[np.bool_]:
    """Which decode samples hold more tokens than their bucket can have requests.

    LLM-Emu files a step without a new request as decode, also where it goes on with a chunked prefill. Holds for packs
    captured without speculative decoding, which LLM-Emu does not know.
    """
    width = concurrency_bucket_width
    most: NDArray[np.int64] = columns["concurrency"].astype(np.int64) // width * width + width - 1
    return columns["total_tokens"] > most


def _groups(first: NDArray[Any], second: NDArray[Any]) -> NDArray[np.int64]:
    """A number per row that is the same where both values are; ascending by first, then second."""
    pairs = np.stack((first.astype(np.int64), second.astype(np.int64)))
    return np.unique(pairs, axis=1, return_inverse=True)[1].reshape(-1).astype(np.int64)


def _near(tokens: NDArray[np.int64], cells: NDArray[np.int64], rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """Rows of the cell of `rows` and of those nearest in tokens, until there are ENOUGH or no more."""
    first = np.unique(cells, return_index=True)[1]
    order = np.lexsort((np.arange(first.size), np.abs(tokens[first] - tokens[rows[0]])))
    own = cells[rows[0]]
    found = [rows]
    held = rows.size
    for cell in order:
        if held >= ENOUGH:
            break
        if cell != own:
            found.append(np.flatnonzero(cells == cell))
            held += found[-1].size
    return np.concatenate(found)
