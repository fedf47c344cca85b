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
from numpy.typing import NDArray

from oracle_server.sampling.answer import (
    KNOWLEDGE_EXTRAPOLATED,
    KNOWLEDGE_INTERPOLATED,
    KNOWLEDGE_MEASURED,
    KNOWLEDGE_MODELLED,
    SUPPORT_EXACT,
    SUPPORT_EXTRAPOLATED,
    SUPPORT_INTERPOLATED,
)
from oracle_server.sampling.draws import DOMAIN_RESIDUAL, draw_u64, index_below_u64
from oracle_server.sampling.grids import AXIS0, AXIS0_SIZE, AXIS1, AXIS1_SIZE, PRESENT, VALUES
from oracle_server.sampling.jit import compiled
from oracle_server.sampling.shape import CONTEXT_TOKENS_LIMIT

# Rows of `layout`: the order of grids.OPERATOR_AXES. The first four do not depend on context.
_TOKEN_OPERATORS: Final = 4
_LOGITS: Final = 3
_GENERATION: Final = 4
_CONTEXT: Final = 5

# Where a coordinate lies on its axis.
_POINT: Final = 0
_INSIDE: Final = 1
_BELOW: Final = 2
_ABOVE: Final = 3

_Grid = NDArray[np.float64]
_Ints = NDArray[np.int64]
_Bytes = NDArray[np.int8]
# Context interval, maximum-context interval, intercept, two slopes, support, knowledge, distance.
_Piece = tuple[int, int, int, int, float, float, float, int, int, float]


@compiled
def decode_latency(
    layout: _Ints,
    grid: _Grid,
    knowledge: _Bytes,
    capture_sizes: _Ints,
    options: _Grid,
    residuals: _Grid,
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
    layout: _Ints,
    grid: _Grid,
    knowledge: _Bytes,
    capture_sizes: _Ints,
    options: _Grid,
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

    at_n, place_n = _locate(grid, layout[_GENERATION, AXIS0], layout[_GENERATION, AXIS0_SIZE], 1, requests)
    support = max(support, _support(place_n))
    distance = max(distance, _distance(grid, layout[_GENERATION, AXIS0], layout[_GENERATION, AXIS0_SIZE], requests))
    single = support == SUPPORT_EXACT
    skew = options[0]

    offset = layout[_GENERATION, AXIS1]
    size = layout[_GENERATION, AXIS1_SIZE]
    at, place = _locate(grid, offset, size, requests, context)
    at, place, begin, end = _interval(grid, offset, size, requests, at, place, single)
    intercept, slope = _kv_line(layout, grid, requests, at_n, place_n, at, place)
    support = max(support, _support(place))
    known = max(known, _kv_knowledge(layout, knowledge, at_n, place_n, at, place))
    distance = max(distance, _distance(grid, offset, size, np.float64(context) / np.float64(requests)))

    max_begin = np.int64(0)
    max_end = np.int64(CONTEXT_TOKENS_LIMIT)
    max_intercept = 0.0
    max_slope = 0.0
    if skew > 0.0:
        at, place = _locate(grid, offset, size, 1, longest)
        at, place, max_begin, max_end = _interval(grid, offset, size, 1, at, place, single)
        max_intercept, max_slope = _kv_line(layout, grid, requests, at_n, place_n, at, place)
        support = max(support, _support(place))
        known = max(known, _kv_knowledge(layout, knowledge, at_n, place_n, at, place))
        distance = max(distance, _distance(grid, offset, size, np.float64(longest)))

    known = _at_least(known, support)
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
    layout: _Ints,
    grid: _Grid,
    knowledge: _Bytes,
    capture_sizes: _Ints,
    options: _Grid,
    residuals: _Grid,
    chunks: _Ints,
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
    a rule and not a measurement: more than one chunk, a chunk with decodes, or draft tokens make the answer `modelled`.
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
    for i in range(num_chunks):
        cost, part_support, part_distance, part_known = _plane(
            layout, grid, knowledge, _CONTEXT, chunks[i, 0], chunks[i, 1]
        )
        base += cost if i == 0 else max(cost - options[3], 0.0)
        support = max(support, part_support)
        distance = max(distance, part_distance)
        known = max(known, part_known)
    if requests > 0:
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
    if num_chunks > 1 or (num_chunks > 0 and requests > 0) or decode_tokens > requests:
        known = max(known, KNOWLEDGE_MODELLED)
    ratio = residuals[index_below_u64(draw_u64(key, step_index, DOMAIN_RESIDUAL, 0), residuals.size)]
    return max(1.0, np.floor(base * factor * ratio + 0.5)), support, distance, _at_least(known, support)


@compiled
def _token_cost(
    layout: _Ints, grid: _Grid, knowledge: _Bytes, options: _Grid, tokens: int, rows: int, sequences: int
) -> tuple[float, int, float, int]:
    """What does not depend on context: dense operators, logits, host."""
    cost = 0.0
    support = SUPPORT_EXACT
    distance = 0.0
    known = KNOWLEDGE_MEASURED
    for slot in range(_TOKEN_OPERATORS):
        if layout[slot, PRESENT] == 1:
            part, part_support, part_distance, part_known = _line(
                layout, grid, knowledge, slot, rows if slot == _LOGITS else tokens
            )
            cost += part
            support = max(support, part_support)
            distance = max(distance, part_distance)
            known = max(known, part_known)
    return cost + (options[4] + options[5] * np.float64(sequences)), support, distance, known


@compiled
def _line(layout: _Ints, grid: _Grid, knowledge: _Bytes, slot: int, x: int) -> tuple[float, int, float, int]:
    """An operator over one axis."""
    offset = layout[slot, AXIS0]
    size = layout[slot, AXIS0_SIZE]
    values = layout[slot, VALUES]
    at, place = _locate(grid, offset, size, 1, x)
    support = _support(place)
    known = _corner_knowledge(layout, knowledge, slot, at, place, 0, _POINT)
    cost = _between(grid, offset, values, 1, at, place, np.float64(x))
    return cost, support, _distance(grid, offset, size, np.float64(x)), _at_least(known, support)


@compiled
def _plane(layout: _Ints, grid: _Grid, knowledge: _Bytes, slot: int, x: int, y: int) -> tuple[float, int, float, int]:
    """An operator over two axes: linear in y on the values that are linear in x."""
    at_x, place_x = _locate(grid, layout[slot, AXIS0], layout[slot, AXIS0_SIZE], 1, x)
    offset = layout[slot, AXIS1]
    size = layout[slot, AXIS1_SIZE]
    at, place = _locate(grid, offset, size, 1, y)
    support = max(_support(place_x), _support(place))
    distance = max(
        _distance(grid, layout[slot, AXIS0], layout[slot, AXIS0_SIZE], np.float64(x)),
        _distance(grid, offset, size, np.float64(y)),
    )
    low = _column(layout, grid, slot, at_x, place_x, np.float64(x), at)
    if place == _INSIDE:
        high = _column(layout, grid, slot, at_x, place_x, np.float64(x), at + 1)
        cost = low + (high - low) * ((np.float64(y) - grid[offset + at]) / (grid[offset + at + 1] - grid[offset + at]))
    elif place == _ABOVE:
        before = _column(layout, grid, slot, at_x, place_x, np.float64(x), at - 1)
        slope = max(0.0, (low - before) / (grid[offset + at] - grid[offset + at - 1]))
        cost = low + slope * (np.float64(y) - grid[offset + at])
    else:
        cost = low
    known = _corner_knowledge(layout, knowledge, slot, at_x, place_x, at, place)
    return cost, support, distance, _at_least(known, support)


@compiled
def _decode_attention(
    layout: _Ints, grid: _Grid, knowledge: _Bytes, requests: int, scale: int, total: int, kv: float
) -> tuple[float, int, float, int]:
    """g(requests, kv), kv = total / scale, by the same lines as a decode-only piece."""
    at_n, place_n = _locate(grid, layout[_GENERATION, AXIS0], layout[_GENERATION, AXIS0_SIZE], 1, requests)
    offset = layout[_GENERATION, AXIS1]
    size = layout[_GENERATION, AXIS1_SIZE]
    at, place = _locate(grid, offset, size, scale, total)
    intercept, slope = _kv_line(layout, grid, requests, at_n, place_n, at, place)
    support = max(_support(place_n), _support(place))
    distance = max(
        _distance(grid, layout[_GENERATION, AXIS0], layout[_GENERATION, AXIS0_SIZE], np.float64(requests)),
        _distance(grid, offset, size, kv),
    )
    known = _kv_knowledge(layout, knowledge, at_n, place_n, at, place)
    return intercept + slope * kv, support, distance, _at_least(known, support)


@compiled
def _kv_line(
    layout: _Ints, grid: _Grid, requests: int, at_n: int, place_n: int, at: int, place: int
) -> tuple[float, float]:
    """Intercept and slope of g(requests, kv) over kv in the cell that starts at grid point `at`."""
    offset = layout[_GENERATION, AXIS1]
    low = _column(layout, grid, _GENERATION, at_n, place_n, np.float64(requests), at)
    if place == _BELOW:
        return low, 0.0
    if place == _ABOVE or at == layout[_GENERATION, AXIS1_SIZE] - 1:
        before = _column(layout, grid, _GENERATION, at_n, place_n, np.float64(requests), at - 1)
        slope = (low - before) / (grid[offset + at] - grid[offset + at - 1])
        if place == _ABOVE:
            slope = max(0.0, slope)
    else:
        high = _column(layout, grid, _GENERATION, at_n, place_n, np.float64(requests), at + 1)
        slope = (high - low) / (grid[offset + at + 1] - grid[offset + at])
    return low - slope * grid[offset + at], slope


@compiled
def _column(layout: _Ints, grid: _Grid, slot: int, at_x: int, place_x: int, x: float, column: int) -> float:
    """Value at x on axis 0 and grid point `column` on axis 1."""
    stride = layout[slot, AXIS1_SIZE]
    return _between(grid, layout[slot, AXIS0], layout[slot, VALUES] + column, stride, at_x, place_x, x)


@compiled
def _between(grid: _Grid, offset: int, values: int, stride: int, at: int, place: int, x: float) -> float:
    """The value at x between, on or beyond the grid points of the axis at `offset`."""
    value = grid[values + stride * at]
    if place == _INSIDE:
        share = (x - grid[offset + at]) / (grid[offset + at + 1] - grid[offset + at])
        return value + (grid[values + stride * (at + 1)] - value) * share
    if place == _ABOVE:
        slope = (value - grid[values + stride * (at - 1)]) / (grid[offset + at] - grid[offset + at - 1])
        return value + max(0.0, slope) * (x - grid[offset + at])
    return value


@compiled
def _locate(grid: _Grid, offset: int, size: int, scale: int, x: int) -> tuple[int, int]:
    """Last grid point with scale * point <= x (the first one where there is none) and where x lies."""
    low = np.int64(0)
    high = np.int64(size)
    while low < high:
        middle = (low + high) // 2
        if np.int64(grid[offset + middle]) * scale <= x:
            low = middle + 1
        else:
            high = middle
    if low == 0:
        return np.int64(0), _BELOW
    at = low - 1
    if np.int64(grid[offset + at]) * scale == x:
        return at, _POINT
    return at, _ABOVE if at == size - 1 else _INSIDE


@compiled
def _interval(
    grid: _Grid, offset: int, size: int, scale: int, at: int, place: int, single: bool
) -> tuple[int, int, int, int]:
    """Cell, place and half-open interval of a piece around a located coordinate.

    `single`: grid points are pieces of their own. Otherwise a grid point belongs to the cell on its right, the last one
    to the last cell.
    """
    if place == _BELOW:
        return at, place, np.int64(0), np.int64(grid[offset]) * scale
    if place == _ABOVE:
        return at, place, np.int64(grid[offset + at]) * scale + 1, np.int64(CONTEXT_TOKENS_LIMIT)
    if single:
        begin = np.int64(grid[offset + at]) * scale
        if place == _POINT:
            return at, place, begin, begin + 1
        return at, place, begin + 1, np.int64(grid[offset + at + 1]) * scale
    if at == size - 1:
        at -= 1
    end = np.int64(grid[offset + at + 1]) * scale
    if at == size - 2:
        end += 1
    return at, _INSIDE, np.int64(grid[offset + at]) * scale, end


@compiled
def _kv_knowledge(layout: _Ints, knowledge: _Bytes, at_n: int, place_n: int, at: int, place: int) -> int:
    return _corner_knowledge(layout, knowledge, _GENERATION, at_n, place_n, at, place)


@compiled
def _corner_knowledge(
    layout: _Ints, knowledge: _Bytes, slot: int, at_x: int, place_x: int, at_y: int, place_y: int
) -> int:
    """The weakest knowledge among the grid points a value is made from."""
    stride = layout[slot, AXIS1_SIZE]
    first_x = at_x - 1 if place_x == _ABOVE else at_x
    last_x = at_x + 1 if place_x == _INSIDE else at_x
    first_y = at_y - 1 if place_y == _ABOVE else at_y
    last_y = at_y + 1 if place_y == _INSIDE else at_y
    known = np.int64(KNOWLEDGE_MEASURED)
    for x in range(first_x, last_x + 1):
        for y in range(first_y, last_y + 1):
            known = max(known, np.int64(knowledge[layout[slot, VALUES] + stride * x + y]))
    return known


@compiled
def _support(place: int) -> int:
    if place == _POINT:
        return SUPPORT_EXACT
    if place == _INSIDE:
        return SUPPORT_INTERPOLATED
    return SUPPORT_EXTRAPOLATED


@compiled
def _at_least(known: int, support: int) -> int:
    """Knowledge of a value is never better than where it lies: between measurements, or beyond them."""
    if support == SUPPORT_EXTRAPOLATED:
        return max(known, KNOWLEDGE_EXTRAPOLATED)
    if support == SUPPORT_INTERPOLATED:
        return max(known, KNOWLEDGE_INTERPOLATED)
    return known


@compiled
def _distance(grid: _Grid, offset: int, size: int, x: float) -> float:
    """How far x lies outside an axis, relative to the end it passed; 0 inside."""
    first = grid[offset]
    last = grid[offset + size - 1]
    if x > last:
        return (x - last) / last
    if x < first:
        return (first - x) / first
    return 0.0
