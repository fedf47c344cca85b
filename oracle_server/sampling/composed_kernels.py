"""Kernels of the composed latency model: look-ups on full grids, the piece of a decode-only step, a mixed step.

Arguments shared by all: `layout`, `grid`, `knowledge` of `grids.build_arrays`; `capture_sizes` ascending int64 (empty:
no padding); `options` float64[6] = skew_decode, skew_mixed, mixed_decode_factor, launch_floor_ns, host_ns_per_step,
host_ns_per_sequence; `residuals` float64[<= 256]. Times in ns, all else in tokens and requests. Outside a grid a cost
follows the line through the last two points, never falling, above it, and holds the first point's value below it.
"""

from __future__ import annotations

# Integers of a kernel are numba's int64 and array items are scalars: the annotations say what a caller passes and gets.
# mypy: disable-error-code="arg-type,assignment,no-any-return,return-value"
from typing import Final

import numpy as np

from oracle_server.sampling.answer import KNOWLEDGE_MEASURED, KNOWLEDGE_MODELLED, SUPPORT_EXACT
from oracle_server.sampling.draws import DOMAIN_RESIDUAL, draw_u64, index_below_u64
from oracle_server.sampling.grid_kernels import (
    ABOVE,
    BELOW,
    INSIDE,
    POINT,
    Bytes,
    Grid,
    Ints,
    at_least,
    box,
    column_value,
    corner_knowledge,
    distance_outside,
    line,
    locate,
    plane,
    support_at,
)
from oracle_server.sampling.grids import AXIS0, AXIS0_SIZE, AXIS1, AXIS1_SIZE, PRESENT
from oracle_server.sampling.jit import compiled
from oracle_server.sampling.shape import CONTEXT_TOKENS_LIMIT

# Rows of `layout`: the order of grids.OPERATOR_AXES. The first seven do not depend on context, the first five of them
# count tokens and the others rows.
_TOKEN_OPERATORS: Final = 7
_LOGITS: Final = 5
_GENERATION: Final = 7
_CONTEXT: Final = 8
_MIXED: Final = 9

# Context interval, maximum-context interval, intercept, two slopes, support, knowledge, distance.
_Piece = tuple[int, int, int, int, float, float, float, int, int, float]


@compiled
def decode_latency(
    layout: Ints,
    grid: Grid,
    knowledge: Bytes,
    capture_sizes: Ints,
    options: Grid,
    residuals: Grid,
    requests: int,
    context: int,
    longest: int,
    key: int,
    step_index: int,
    factor: float,
) -> tuple[float, int, float, int]:
    """Latency, support, distance and knowledge of a decode-only step, by the expression of step.proto's Lease."""
    piece = decode_piece(layout, grid, knowledge, capture_sizes, options, requests, context, longest, factor)
    ratio = residuals[index_below_u64(draw_u64(key, step_index, DOMAIN_RESIDUAL, 0), residuals.size)]
    base = (piece[4] + piece[5] * np.float64(context)) + piece[6] * np.float64(longest)
    return max(1.0, np.floor(base * ratio + 0.5)), piece[7], piece[9], piece[8]


@compiled
def decode_piece(
    layout: Ints,
    grid: Grid,
    knowledge: Bytes,
    capture_sizes: Ints,
    options: Grid,
    requests: int,
    context: int,
    longest: int,
    factor: float,
) -> _Piece:
    """The piece around one decode-only shape, and that shape's distance.

    The cost is linear in kv between two grid points, so linear in the sum of contexts (kv = sum / requests) between the
    integers requests * kv_i, and in the longest context between the kv_i. Where every other part is on a grid point,
    the grid points of kv are pieces of their own, one token wide: all points of a piece then share support and
    knowledge.
    """
    tokens = requests
    if capture_sizes.size > 0 and tokens <= capture_sizes[capture_sizes.size - 1]:
        tokens = capture_sizes[np.searchsorted(capture_sizes, tokens)]
    fixed, support, distance, known = _token_cost(layout, grid, knowledge, options, tokens, requests, requests)

    at_n, place_n = locate(grid, layout[_GENERATION, AXIS0], layout[_GENERATION, AXIS0_SIZE], 1, requests)
    support = max(support, support_at(place_n))
    distance = max(
        distance, distance_outside(grid, layout[_GENERATION, AXIS0], layout[_GENERATION, AXIS0_SIZE], requests)
    )
    single = support == SUPPORT_EXACT
    skew = options[0]

    offset = layout[_GENERATION, AXIS1]
    size = layout[_GENERATION, AXIS1_SIZE]
    at, place = locate(grid, offset, size, requests, context)
    at, place, begin, end = _interval(grid, offset, size, requests, at, place, single)
    intercept, slope = _kv_line(layout, grid, requests, at_n, place_n, at, place)
    support = max(support, support_at(place))
    known = max(known, _kv_knowledge(layout, knowledge, at_n, place_n, at, place))
    distance = max(distance, distance_outside(grid, offset, size, np.float64(context) / np.float64(requests)))

    max_begin = np.int64(0)
    max_end = np.int64(CONTEXT_TOKENS_LIMIT)
    max_intercept = 0.0
    max_slope = 0.0
    if skew > 0.0:
        at, place = locate(grid, offset, size, 1, longest)
        at, place, max_begin, max_end = _interval(grid, offset, size, 1, at, place, single)
        max_intercept, max_slope = _kv_line(layout, grid, requests, at_n, place_n, at, place)
        support = max(support, support_at(place))
        known = max(known, _kv_knowledge(layout, knowledge, at_n, place_n, at, place))
        distance = max(distance, distance_outside(grid, offset, size, np.float64(longest)))

    known = at_least(known, support)
    return (
        begin,
        end,
        max_begin,
        max_end,
        (fixed + ((1.0 - skew) * intercept + skew * max_intercept)) * factor,
        (1.0 - skew) * slope / np.float64(requests) * factor,
        skew * max_slope * factor,
        support,
        known,
        distance,
    )


@compiled
def mixed_latency(
    layout: Ints,
    grid: Grid,
    knowledge: Bytes,
    capture_sizes: Ints,
    options: Grid,
    residuals: Grid,
    chunks: Ints,
    requests: int,
    decode_tokens: int,
    context: int,
    longest: int,
    key: int,
    step_index: int,
    factor: float,
) -> tuple[float, int, float, int]:
    """Latency, support, distance and knowledge of any step with prefill chunks or draft tokens.

    `chunks` int64[C, 2] has tokens and history of each chunk, the one with most work first. How parts share a device is
    a rule and not a measurement: more than one chunk, a chunk with decodes unless `mixed_attention` measured them
    together, or draft tokens make the answer `modelled`.
    """
    num_chunks = chunks.shape[0]
    tokens = decode_tokens
    for i in range(num_chunks):
        tokens += chunks[i, 0]
    if num_chunks == 0 and capture_sizes.size > 0 and tokens <= capture_sizes[capture_sizes.size - 1]:
        tokens = capture_sizes[np.searchsorted(capture_sizes, tokens)]
    base, support, distance, known = _token_cost(
        layout, grid, knowledge, options, tokens, decode_tokens + num_chunks, requests + num_chunks
    )
    together = layout[_MIXED, PRESENT] == 1 and num_chunks > 0 and requests > 0
    if together:
        cost, part_support, part_distance, part_known = _mixed_attention(
            layout, grid, knowledge, options[1], chunks[0, 0], chunks[0, 1], requests, context, longest
        )
        base += cost
        support = max(support, part_support)
        distance = max(distance, part_distance)
        known = max(known, part_known)
    for i in range(1 if together else 0, num_chunks):
        cost, part_support, part_distance, part_known = plane(
            layout, grid, knowledge, _CONTEXT, chunks[i, 0], chunks[i, 1]
        )
        base += cost if i == 0 else max(cost - options[3], 0.0)
        support = max(support, part_support)
        distance = max(distance, part_distance)
        known = max(known, part_known)
    if requests > 0 and not together:
        skew = options[0] if num_chunks == 0 else options[1]
        weight = 1.0 if num_chunks == 0 else options[2]
        kv = np.float64(context) / np.float64(requests)
        mean_cost, part_support, part_distance, part_known = _decode_attention(
            layout, grid, knowledge, requests, requests, context, kv
        )
        base += weight * mean_cost
        support = max(support, part_support)
        distance = max(distance, part_distance)
        known = max(known, part_known)
        if skew > 0.0:
            max_cost, part_support, part_distance, part_known = _decode_attention(
                layout, grid, knowledge, requests, 1, longest, np.float64(longest)
            )
            base += skew * (max_cost - mean_cost)
            support = max(support, part_support)
            distance = max(distance, part_distance)
            known = max(known, part_known)
    if num_chunks > 1 or (num_chunks > 0 and requests > 0 and not together) or decode_tokens > requests:
        known = max(known, KNOWLEDGE_MODELLED)
    ratio = residuals[index_below_u64(draw_u64(key, step_index, DOMAIN_RESIDUAL, 0), residuals.size)]
    return max(1.0, np.floor(base * factor * ratio + 0.5)), support, distance, at_least(known, support)


@compiled
def _token_cost(
    layout: Ints, grid: Grid, knowledge: Bytes, options: Grid, tokens: int, rows: int, sequences: int
) -> tuple[float, int, float, int]:
    """What does not depend on context: dense operators, experts, communication, logits, sampler, host."""
    cost = 0.0
    support = SUPPORT_EXACT
    distance = 0.0
    known = KNOWLEDGE_MEASURED
    for slot in range(_TOKEN_OPERATORS):
        if layout[slot, PRESENT] == 1:
            part, part_support, part_distance, part_known = line(
                layout, grid, knowledge, slot, rows if slot >= _LOGITS else tokens
            )
            cost += part
            support = max(support, part_support)
            distance = max(distance, part_distance)
            known = max(known, part_known)
    return cost + (options[4] + options[5] * np.float64(sequences)), support, distance, known


@compiled
def _mixed_attention(
    layout: Ints,
    grid: Grid,
    knowledge: Bytes,
    skew: float,
    chunk: int,
    history: int,
    requests: int,
    context: int,
    longest: int,
) -> tuple[float, int, float, int]:
    """A chunk beside decode requests, measured together; uneven contexts never make it cheaper."""
    cost, support, distance, known = box(layout, grid, knowledge, _MIXED, chunk, history, requests, requests, context)
    if skew > 0.0:
        max_cost, max_support, max_distance, max_known = box(
            layout, grid, knowledge, _MIXED, chunk, history, requests, 1, longest
        )
        cost += skew * max(max_cost - cost, 0.0)
        support = max(support, max_support)
        distance = max(distance, max_distance)
        known = max(known, max_known)
    return cost, support, distance, known


@compiled
def _decode_attention(
    layout: Ints, grid: Grid, knowledge: Bytes, requests: int, scale: int, total: int, kv: float
) -> tuple[float, int, float, int]:
    """g(requests, kv), kv = total / scale, by the same lines as a decode-only piece."""
    at_n, place_n = locate(grid, layout[_GENERATION, AXIS0], layout[_GENERATION, AXIS0_SIZE], 1, requests)
    offset = layout[_GENERATION, AXIS1]
    size = layout[_GENERATION, AXIS1_SIZE]
    at, place = locate(grid, offset, size, scale, total)
    intercept, slope = _kv_line(layout, grid, requests, at_n, place_n, at, place)
    support = max(support_at(place_n), support_at(place))
    distance = max(
        distance_outside(grid, layout[_GENERATION, AXIS0], layout[_GENERATION, AXIS0_SIZE], np.float64(requests)),
        distance_outside(grid, offset, size, kv),
    )
    known = _kv_knowledge(layout, knowledge, at_n, place_n, at, place)
    return intercept + slope * kv, support, distance, at_least(known, support)


@compiled
def _kv_line(
    layout: Ints, grid: Grid, requests: int, at_n: int, place_n: int, at: int, place: int
) -> tuple[float, float]:
    """Intercept and slope of g(requests, kv) over kv in the cell that starts at grid point `at`."""
    offset = layout[_GENERATION, AXIS1]
    low = column_value(layout, grid, _GENERATION, at_n, place_n, np.float64(requests), at)
    if place == BELOW:
        return low, 0.0
    if place == ABOVE or at == layout[_GENERATION, AXIS1_SIZE] - 1:
        before = column_value(layout, grid, _GENERATION, at_n, place_n, np.float64(requests), at - 1)
        slope = (low - before) / (grid[offset + at] - grid[offset + at - 1])
        if place == ABOVE:
            slope = max(0.0, slope)
    else:
        high = column_value(layout, grid, _GENERATION, at_n, place_n, np.float64(requests), at + 1)
        slope = (high - low) / (grid[offset + at + 1] - grid[offset + at])
    return low - slope * grid[offset + at], slope


@compiled
def _interval(
    grid: Grid, offset: int, size: int, scale: int, at: int, place: int, single: bool
) -> tuple[int, int, int, int]:
    """Cell, place and half-open interval of a piece around a located coordinate.

    `single`: grid points are pieces of their own. Otherwise a grid point belongs to the cell on its right, the last one
    to the last cell.
    """
    if place == BELOW:
        return at, place, np.int64(0), np.int64(grid[offset]) * scale
    if place == ABOVE:
        return at, place, np.int64(grid[offset + at]) * scale + 1, np.int64(CONTEXT_TOKENS_LIMIT)
    if single:
        begin = np.int64(grid[offset + at]) * scale
        if place == POINT:
            return at, place, begin, begin + 1
        return at, place, begin + 1, np.int64(grid[offset + at + 1]) * scale
    if at == size - 1:
        at -= 1
    end = np.int64(grid[offset + at + 1]) * scale
    if at == size - 2:
        end += 1
    return at, INSIDE, np.int64(grid[offset + at]) * scale, end


@compiled
def _kv_knowledge(layout: Ints, knowledge: Bytes, at_n: int, place_n: int, at: int, place: int) -> int:
    return corner_knowledge(layout, knowledge, _GENERATION, at_n, place_n, at, place)
