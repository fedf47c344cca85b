"""Reads full grids: a line, a plane, a box of four axes. Compiled; the data are those of `grids.build_arrays`.

Outside a grid a cost follows the line through the last two points, never falling, above it, and holds the first point's
value below it. Coordinates are whole numbers or quotients `x / scale` of them, so that a place on an axis is found
without rounding.
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
    SUPPORT_EXACT,
    SUPPORT_EXTRAPOLATED,
    SUPPORT_INTERPOLATED,
)
from oracle_server.sampling.grids import (
    AXIS0,
    AXIS0_SIZE,
    AXIS1,
    AXIS1_SIZE,
    AXIS2,
    AXIS2_SIZE,
    AXIS3,
    AXIS3_SIZE,
    VALUES,
)
from oracle_server.sampling.jit import compiled

# Where a coordinate lies on its axis.
POINT: Final = 0
INSIDE: Final = 1
BELOW: Final = 2
ABOVE: Final = 3

Grid = NDArray[np.float64]
Ints = NDArray[np.int64]
Bytes = NDArray[np.int8]


@compiled
def line(layout: Ints, grid: Grid, knowledge: Bytes, slot: int, x: int) -> tuple[float, int, float, int]:
    """An operator over one axis."""
    offset = layout[slot, AXIS0]
    size = layout[slot, AXIS0_SIZE]
    values = layout[slot, VALUES]
    at, place = locate(grid, offset, size, 1, x)
    support = support_at(place)
    known = corner_knowledge(layout, knowledge, slot, at, place, 0, POINT)
    cost = between(grid, offset, values, 1, at, place, np.float64(x))
    return cost, support, distance_outside(grid, offset, size, np.float64(x)), at_least(known, support)


@compiled
def plane(layout: Ints, grid: Grid, knowledge: Bytes, slot: int, x: int, y: int) -> tuple[float, int, float, int]:
    """An operator over two axes: linear in y on the values that are linear in x."""
    at_x, place_x = locate(grid, layout[slot, AXIS0], layout[slot, AXIS0_SIZE], 1, x)
    offset = layout[slot, AXIS1]
    size = layout[slot, AXIS1_SIZE]
    at, place = locate(grid, offset, size, 1, y)
    support = max(support_at(place_x), support_at(place))
    distance = max(
        distance_outside(grid, layout[slot, AXIS0], layout[slot, AXIS0_SIZE], np.float64(x)),
        distance_outside(grid, offset, size, np.float64(y)),
    )
    low = column_value(layout, grid, slot, at_x, place_x, np.float64(x), at)
    if place == INSIDE:
        high = column_value(layout, grid, slot, at_x, place_x, np.float64(x), at + 1)
        cost = low + (high - low) * ((np.float64(y) - grid[offset + at]) / (grid[offset + at + 1] - grid[offset + at]))
    elif place == ABOVE:
        before = column_value(layout, grid, slot, at_x, place_x, np.float64(x), at - 1)
        slope = max(0.0, (low - before) / (grid[offset + at] - grid[offset + at - 1]))
        cost = low + slope * (np.float64(y) - grid[offset + at])
    else:
        cost = low
    known = corner_knowledge(layout, knowledge, slot, at_x, place_x, at, place)
    return cost, support, distance, at_least(known, support)


@compiled
def box(
    layout: Ints, grid: Grid, knowledge: Bytes, slot: int, x0: int, x1: int, x2: int, scale: int, total: int
) -> tuple[float, int, float, int]:
    """An operator over four axes at (x0, x1, x2, total / scale): linear in each in turn, the first one innermost."""
    kv = np.float64(total) / np.float64(scale)
    at0, other0, share0, place0 = _ends(grid, layout[slot, AXIS0], layout[slot, AXIS0_SIZE], 1, x0, np.float64(x0))
    at1, other1, share1, place1 = _ends(grid, layout[slot, AXIS1], layout[slot, AXIS1_SIZE], 1, x1, np.float64(x1))
    at2, other2, share2, place2 = _ends(grid, layout[slot, AXIS2], layout[slot, AXIS2_SIZE], 1, x2, np.float64(x2))
    at3, other3, share3, place3 = _ends(grid, layout[slot, AXIS3], layout[slot, AXIS3_SIZE], scale, total, kv)

    stride2 = layout[slot, AXIS3_SIZE]
    stride1 = layout[slot, AXIS2_SIZE] * stride2
    stride0 = layout[slot, AXIS1_SIZE] * stride1
    low0 = layout[slot, VALUES] + stride0 * at0
    high0 = layout[slot, VALUES] + stride0 * other0
    cost = 0.0
    known = np.int64(KNOWLEDGE_MEASURED)
    for i3 in range(1 if other3 == at3 else 2):
        outer = 0.0
        for i2 in range(1 if other2 == at2 else 2):
            offset = (other3 if i3 else at3) + stride2 * (other2 if i2 else at2)
            low = _blend(grid[low0 + offset + stride1 * at1], grid[high0 + offset + stride1 * at1], share0, place0)
            high = _blend(
                grid[low0 + offset + stride1 * other1], grid[high0 + offset + stride1 * other1], share0, place0
            )
            value = _blend(low, high, share1, place1)
            outer = value if i2 == 0 else _blend(outer, value, share2, place2)
            known = max(
                known,
                np.int64(knowledge[low0 + offset + stride1 * at1]),
                np.int64(knowledge[high0 + offset + stride1 * at1]),
                np.int64(knowledge[low0 + offset + stride1 * other1]),
                np.int64(knowledge[high0 + offset + stride1 * other1]),
            )
        cost = outer if i3 == 0 else _blend(cost, outer, share3, place3)

    support = max(support_at(place0), support_at(place1), support_at(place2), support_at(place3))
    distance = max(
        distance_outside(grid, layout[slot, AXIS0], layout[slot, AXIS0_SIZE], np.float64(x0)),
        distance_outside(grid, layout[slot, AXIS1], layout[slot, AXIS1_SIZE], np.float64(x1)),
        distance_outside(grid, layout[slot, AXIS2], layout[slot, AXIS2_SIZE], np.float64(x2)),
        distance_outside(grid, layout[slot, AXIS3], layout[slot, AXIS3_SIZE], kv),
    )
    return cost, support, distance, at_least(known, support)


@compiled
def _ends(grid: Grid, offset: int, size: int, scale: int, total: int, x: float) -> tuple[int, int, float, int]:
    """The grid point at or before x, the other one its line goes through, the share of their difference, the place."""
    at, place = locate(grid, offset, size, scale, total)
    if place == INSIDE:
        return at, at + 1, (x - grid[offset + at]) / (grid[offset + at + 1] - grid[offset + at]), place
    if place == ABOVE:
        return at, at - 1, (x - grid[offset + at]) / (grid[offset + at] - grid[offset + at - 1]), place
    return at, at, 0.0, place


@compiled
def _blend(at: float, other: float, share: float, place: int) -> float:
    """The value on the line through the values at the two points of `_ends`."""
    if place == ABOVE:
        return at + max(0.0, at - other) * share
    return at + (other - at) * share


@compiled
def column_value(layout: Ints, grid: Grid, slot: int, at_x: int, place_x: int, x: float, column: int) -> float:
    """Value at x on axis 0 and grid point `column` on axis 1."""
    stride = layout[slot, AXIS1_SIZE]
    return between(grid, layout[slot, AXIS0], layout[slot, VALUES] + column, stride, at_x, place_x, x)


@compiled
def between(grid: Grid, offset: int, values: int, stride: int, at: int, place: int, x: float) -> float:
    """The value at x between, on or beyond the grid points of the axis at `offset`."""
    value = grid[values + stride * at]
    if place == INSIDE:
        share = (x - grid[offset + at]) / (grid[offset + at + 1] - grid[offset + at])
        return value + (grid[values + stride * (at + 1)] - value) * share
    if place == ABOVE:
        slope = (value - grid[values + stride * (at - 1)]) / (grid[offset + at] - grid[offset + at - 1])
        return value + max(0.0, slope) * (x - grid[offset + at])
    return value


@compiled
def locate(grid: Grid, offset: int, size: int, scale: int, x: int) -> tuple[int, int]:
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
        return np.int64(0), BELOW
    at = low - 1
    if np.int64(grid[offset + at]) * scale == x:
        return at, POINT
    return at, ABOVE if at == size - 1 else INSIDE


@compiled
def corner_knowledge(
    layout: Ints, knowledge: Bytes, slot: int, at_x: int, place_x: int, at_y: int, place_y: int
) -> int:
    """The weakest knowledge among the grid points a value is made from."""
    stride = layout[slot, AXIS1_SIZE]
    first_x = at_x - 1 if place_x == ABOVE else at_x
    last_x = at_x + 1 if place_x == INSIDE else at_x
    first_y = at_y - 1 if place_y == ABOVE else at_y
    last_y = at_y + 1 if place_y == INSIDE else at_y
    known = np.int64(KNOWLEDGE_MEASURED)
    for x in range(first_x, last_x + 1):
        for y in range(first_y, last_y + 1):
            known = max(known, np.int64(knowledge[layout[slot, VALUES] + stride * x + y]))
    return known


@compiled
def support_at(place: int) -> int:
    if place == POINT:
        return SUPPORT_EXACT
    if place == INSIDE:
        return SUPPORT_INTERPOLATED
    return SUPPORT_EXTRAPOLATED


@compiled
def at_least(known: int, support: int) -> int:
    """Knowledge of a value is never better than where it lies: between measurements, or beyond them."""
    if support == SUPPORT_EXTRAPOLATED:
        return max(known, KNOWLEDGE_EXTRAPOLATED)
    if support == SUPPORT_INTERPOLATED:
        return max(known, KNOWLEDGE_INTERPOLATED)
    return known


@compiled
def distance_outside(grid: Grid, offset: int, size: int, x: float) -> float:
    """How far x lies outside an axis, relative to the end it passed; 0 inside."""
    first = grid[offset]
    last = grid[offset + size - 1]
    if x > last:
        return (x - last) / last
    if x < first:
        return (first - x) / first
    return 0.0
