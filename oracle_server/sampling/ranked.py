"""The kernels of ranked neighbours, over the tree of `levels.build_levels`."""

from __future__ import annotations

# Integers of a kernel are numba's int64 and array items are scalars: the annotations say what a caller passes and gets.
# mypy: disable-error-code="assignment,no-any-return"
import math

import numpy as np
from numpy.typing import NDArray

from oracle_server.sampling.answer import SUPPORT_EXACT, SUPPORT_EXTRAPOLATED, SUPPORT_INTERPOLATED
from oracle_server.sampling.draws import DOMAIN_NEIGHBOR, DOMAIN_RESIDUAL, draw_u64, index_below_u64, unit_u64
from oracle_server.sampling.jit import compiled
from oracle_server.sampling.levels import BEGIN, END, HIGH, LOW


@compiled
def draw_ranked(
    level_at: NDArray[np.float64],
    level_node: NDArray[np.int64],
    level_ns: NDArray[np.int64],
    tokens: int,
    concurrency: int,
    context: int,
    mixes: bool,
    key: int,
    step_index: int,
) -> tuple[int, int, float]:
    """Latency (ns), support and distance of one query, given as bucket centers (context 0 where it is no axis).

    From the root down, an axis at a time, so that a later axis never outvotes an earlier one: the level at the query's
    value; between two levels either of them, the upper with probability (value - lower) / (upper - lower), so that the
    mean of the draws is the linear interpolation of the levels' means (`mixes`; else the nearer, ties the lower); and
    outside them the outermost. Then one of the level's samples uniformly. Distance is the root of the summed squares
    of |level - value| / larger of both; support is extrapolated where a value lies outside all that the level above
    it holds, exact where every level is the query's value and nothing else.
    """
    node = 0
    squares = 0.0
    is_exact = True
    is_outside = False
    for axis in range(3):
        value = tokens if axis == 0 else (concurrency if axis == 1 else context)
        begin = level_node[node, BEGIN]
        end = level_node[node, END]
        is_outside |= value < level_node[begin, LOW] or value > level_node[end - 1, HIGH]
        x = np.float64(value)
        node = begin + np.searchsorted(level_at[begin:end], x)
        if node == end:
            node = end - 1
        elif node > begin and level_at[node] != x:
            lower = level_at[node - 1]
            upper = level_at[node]
            if mixes:
                weight = unit_u64(draw_u64(key, step_index, DOMAIN_NEIGHBOR, axis))
                takes_lower = weight * (upper - lower) >= x - lower
            else:
                takes_lower = x - lower <= upper - x
            if takes_lower:
                node -= 1
        is_exact &= level_node[node, LOW] == value and level_node[node, HIGH] == value
        if level_at[node] != x:
            gap = abs(level_at[node] - x) / max(level_at[node], x)
            squares += gap * gap
    begin = level_node[node, BEGIN]
    residual = draw_u64(key, step_index, DOMAIN_RESIDUAL, 0)
    latency = level_ns[begin + index_below_u64(residual, level_node[node, END] - begin)]
    support = SUPPORT_EXACT if is_exact else (SUPPORT_EXTRAPOLATED if is_outside else SUPPORT_INTERPOLATED)
    return latency, support, math.sqrt(squares)


@compiled
def find_level(
    level_at: NDArray[np.float64], level_node: NDArray[np.int64], tokens: int, concurrency: int, context: int
) -> int:
    """The last level of a query that `draw_ranked` calls exact: nothing but its samples is drawn from; -1 of any
    other."""
    node = 0
    for axis in range(3):
        value = tokens if axis == 0 else (concurrency if axis == 1 else context)
        begin = level_node[node, BEGIN]
        end = level_node[node, END]
        node = begin + np.searchsorted(level_at[begin:end], np.float64(value))
        if node == end or level_node[node, LOW] != value or level_node[node, HIGH] != value:
            return -1
    return node


@compiled
def draw_ranked_many(
    level_at: NDArray[np.float64],
    level_node: NDArray[np.int64],
    level_ns: NDArray[np.int64],
    tokens: NDArray[np.int64],
    concurrency: NDArray[np.int64],
    context: NDArray[np.int64],
    mixes: bool,
    key: int,
    step_index: NDArray[np.int64],
    drawn_ns: NDArray[np.int64],
    support: NDArray[np.int64],
    distance: NDArray[np.float64],
) -> None:
    """`draw_ranked` of each item, written into the last three arrays."""
    for i in range(tokens.size):
        drawn_ns[i], support[i], distance[i] = draw_ranked(
            level_at, level_node, level_ns, tokens[i], concurrency[i], context[i], mixes, key, step_index[i]
        )
