"""The data of ranked neighbours: samples in a tree of levels, tokens first, then concurrency, then context tokens."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from oracle_server.errors import PackInvalid

LEVEL_FIELDS: Final = ("level_at", "level_node", "level_ns")
# Columns of level_node.
BEGIN: Final = 0
END: Final = 1
LOW: Final = 2
HIGH: Final = 3

# Values of an axis are pooled while the largest is at most so many times the smallest. Context moves a step least, and
# what a decode step after prefill work waits for is that work: its own shape says little.
SPAN: Final = (1.25, 1.25, 2.0)
SPAN_AFTER_PREFILL: Final = (2.0, 2.0, 2.0)


def build_levels(
    samples: Mapping[str, NDArray[Any]],
    chosen: NDArray[np.bool_],
    *,
    tokens_width: int,
    concurrency_width: int,
    context_width: int,
    min_samples: int,
    spans: tuple[float, float, float] = SPAN,
) -> dict[str, NDArray[Any]]:
    """The tree over the `chosen` rows of samples.parquet; widths are those of buckets, context_width 0: no third axis.

    An axis is cut into levels over ascending bucket centers: a center that holds `min_samples` is a level of its own;
    others are pooled with those above until they hold so many, or until the largest is `spans` times the smallest
    (tokens, concurrency, context). With min_samples 1 every center is a level.

        level_at[N]         mean of the samples' centers
        level_node[N, 4]    first child, end of its children, lowest and highest center
        level_ns[M]         latencies (ns), in the order of the file within the last level
    Node 0 is the root, its children the levels in tokens, theirs in concurrency, theirs in context; the children of the
    last are samples. Children stand together, ascending.
    """
    rows = np.flatnonzero(chosen).astype(np.int32)
    if context_width and (unknown := samples["context_tokens"][rows] < 0).any():
        raise PackInvalid(
            "a sample without context tokens, but latency.sampled.context_bucket_width makes them a key",
            where=f"samples.parquet: context_tokens, row {rows[np.argmax(unknown)]}",
        )
    axes = (("total_tokens", tokens_width), ("concurrency", concurrency_width), ("context_tokens", context_width))
    # Rows in the order of the levels so far and the level of each; both 32 bit, as a pack may have 20 M rows.
    order = rows
    parent = np.zeros(rows.size, dtype=np.int32)
    at: list[float] = [0.0]
    # First row, lowest and highest center of each node; children follow from the next axis.
    depths: list[list[tuple[int, int, int]]] = [[(0, 0, 0)]]
    for (column, width), span in zip(axes, spans, strict=True):
        values = bucket_center(samples[column][order].astype(np.int64), width) if width else np.zeros_like(parent)
        sort = np.lexsort((values, parent))
        order, parent, sorted_values = order[sort], parent[sort], values[sort]
        del values, sort
        first = np.flatnonzero(np.r_[True, (parent[1:] != parent[:-1]) | (sorted_values[1:] != sorted_values[:-1])])
        counts = np.diff(np.r_[first, parent.size])
        nodes, means = _cut(
            first.tolist(), parent[first].tolist(), sorted_values[first].tolist(), counts.tolist(), min_samples, span
        )
        depths.append(nodes)
        at += means
        # The level of each row; ascending, as the levels are.
        sizes = np.diff([*(begin for begin, _, _ in nodes), parent.size])
        parent = np.repeat(np.arange(len(nodes), dtype=np.int32), sizes)
    # Rows of one level in the order of the file.
    order = order[np.lexsort((order, parent))]
    return {
        "level_at": np.array(at, dtype=np.float64),
        "level_node": _nodes(depths, rows.size),
        "level_ns": samples["latency_ns"][order].astype(np.int64),
    }


def _cut(
    first: list[int], parents: list[int], values: list[int], counts: list[int], min_samples: int, span: float
) -> tuple[list[tuple[int, int, int]], list[float]]:
    """Levels over (parent, center) pairs in ascending order: (first row, lowest, highest) and mean of each."""
    nodes: list[tuple[int, int, int]] = []
    means: list[float] = []
    held = total = lowest = 0
    current = -1
    is_full = True
    for row, parent, value, count in zip(first, parents, values, counts, strict=True):
        if is_full or parent != current or count >= min_samples or value > lowest * span:
            nodes.append((row, value, value))
            means.append(0.0)
            current, lowest, held, total = parent, value, 0, 0
        held += count
        total += count * value
        nodes[-1] = (nodes[-1][0], lowest, value)
        means[-1] = total / held
        is_full = held >= min_samples
    return nodes, means


def _nodes(depths: list[list[tuple[int, int, int]]], rows: int) -> NDArray[np.int64]:
    result = []
    offset = 0
    for number, nodes in enumerate(depths):
        offset += len(nodes)
        begins = np.array([*(begin for begin, _, _ in nodes), rows], dtype=np.int64)
        if number + 1 < len(depths):
            below = np.array([begin for begin, _, _ in depths[number + 1]], dtype=np.int64)
            begins = offset + np.searchsorted(below, begins)
        bounds = pairwise(begins.tolist())
        result += [(begin, end, low, high) for (begin, end), (_, low, high) in zip(bounds, nodes, strict=True)]
    return np.array(result, dtype=np.int64)


def bucket_center(value: NDArray[np.int64], width: int) -> NDArray[np.int64]:
    """Center of the bucket that holds `value`: LLM-Emu's floor(x / w) * w + floor(w / 2). A center is its own
    center."""
    return value // width * width + width // 2
