"""The composed model's data: each operator a full grid over its axes, all in three flat arrays."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from oracle_server.errors import PackInvalid

# Operator -> axes. The order gives the row of `layout`. Axes count tokens, rows of the logits matrix, or requests.
OPERATOR_AXES: Final[dict[str, tuple[str, ...]]] = {
    "dense_gemm": ("total_tokens",),
    "dense_elementwise": ("total_tokens",),
    "all_reduce": ("total_tokens",),
    "moe": ("total_tokens",),
    "expert_exchange": ("total_tokens",),
    "logits": ("logits_rows",),
    "sampler": ("logits_rows",),
    "generation_attention": ("decode_requests", "mean_context_tokens"),
    "context_attention": ("chunk_tokens", "history_tokens"),
    "mixed_attention": ("chunk_tokens", "history_tokens", "decode_requests", "mean_context_tokens"),
}
# Absent ones cost nothing: a model on one device has no all-reduce, a dense one no experts, and elementwise work may be
# part of the GEMM table.
# Without mixed_attention a chunk beside decode requests is composed of the two operators that know one of them.
OPTIONAL_OPERATORS: Final = frozenset(
    {"dense_elementwise", "all_reduce", "moe", "expert_exchange", "sampler", "mixed_attention"}
)

# Columns of a row of `layout`.
PRESENT: Final = 0
AXIS0: Final = 1
AXIS0_SIZE: Final = 2
AXIS1: Final = 3
AXIS1_SIZE: Final = 4
AXIS2: Final = 5
AXIS2_SIZE: Final = 6
AXIS3: Final = 7
AXIS3_SIZE: Final = 8
VALUES: Final = 9
LAYOUT_COLUMNS: Final = 10

# A grid point times the largest number of requests stays below 2^63.
AXIS_LIMIT: Final = 2**31

_FILE: Final = "operators.parquet"


def build_arrays(operators: Mapping[str, NDArray[Any]], names: Mapping[int, str]) -> dict[str, NDArray[Any]]:
    """Arrange operators.parquet for the kernels.

    `operators` are its columns, `names` maps the number in column `operator` to a name of OPERATOR_AXES. The result:
        layout     int64[10, 10] one row per operator in the order of OPERATOR_AXES: present, offset and size of axes 0
                                to 3 (size 1 where there is none), offset of the values
        grid       float64[G]   axes (ascending whole numbers) and values (ns, first axis slowest) of all operators
        knowledge  int8[G]      Knowledge of step.proto, at the positions of the values
    Raises PackInvalid for an unknown or absent operator, a grid that is not full, a point given twice, an axis that is
    not of whole numbers in [0, 2^31] or has fewer than two points, or a GEMM that costs nothing.
    """
    for number, name in names.items():
        if name not in OPERATOR_AXES:
            raise PackInvalid(
                f"unknown operator {name!r} (number {number}); known are {', '.join(OPERATOR_AXES)}",
                where="manifest.json: latency.composed.operators",
            )
    if len(set(names.values())) != len(names):
        raise PackInvalid("an operator is named twice", where="manifest.json: latency.composed.operators")
    number_of = {name: number for number, name in names.items()}
    column = operators["operator"]
    unknown = np.setdiff1d(np.unique(column), np.array(list(names), dtype=np.int64))
    if unknown.size:
        raise PackInvalid(
            f"operator number {int(unknown[0])} is not in the manifest's latency.composed.operators",
            where=f"{_FILE}: operator",
        )
    layout = np.zeros((len(OPERATOR_AXES), LAYOUT_COLUMNS), dtype=np.int64)
    parts: list[NDArray[np.float64]] = []
    knowledge: list[NDArray[np.int8]] = []
    offset = 0
    for slot, (name, axis_names) in enumerate(OPERATOR_AXES.items()):
        if name not in number_of:
            if name in OPTIONAL_OPERATORS:
                continue
            raise PackInvalid(
                f"no operator {name!r}: a composed pack needs it", where="manifest.json: latency.composed.operators"
            )
        rows = column == number_of[name]
        axes, values, known = _full_grid(name, axis_names, {key: data[rows] for key, data in operators.items()})
        layout[slot, PRESENT] = 1
        layout[slot, AXIS0_SIZE:VALUES:2] = 1
        for number, axis in enumerate(axes):
            layout[slot, AXIS0 + 2 * number] = offset + sum(before.size for before in axes[:number])
            layout[slot, AXIS0_SIZE + 2 * number] = axis.size
        layout[slot, VALUES] = offset + sum(axis.size for axis in axes)
        parts += [*axes, values]
        knowledge += [np.zeros(sum(axis.size for axis in axes), dtype=np.int8), known]
        offset += sum(axis.size for axis in axes) + values.size
    return {"layout": layout, "grid": np.concatenate(parts), "knowledge": np.concatenate(knowledge)}


def _full_grid(
    name: str, axis_names: tuple[str, ...], rows: Mapping[str, NDArray[Any]]
) -> tuple[list[NDArray[np.float64]], NDArray[np.float64], NDArray[np.int8]]:
    """Axes, values and knowledge of one operator, the first axis slowest."""
    axes: list[NDArray[np.float64]] = []
    flat = np.zeros(rows["latency_ns"].size, dtype=np.int64)
    points = 1
    for number, axis_name in enumerate(axis_names):
        where = f"{_FILE}: {name}, x{number} ({axis_name})"
        coordinate = rows[f"x{number}"]
        axis, position = np.unique(coordinate, return_inverse=True)
        if not (axis.size and np.all((axis >= 0) & (axis <= AXIS_LIMIT) & (axis == np.floor(axis)))):
            raise PackInvalid("grid points have to be whole numbers between 0 and 2^31", where=where)
        if axis.size < 2:
            raise PackInvalid("an axis needs at least two points to say how the cost grows", where=where)
        axes.append(axis.astype(np.float64))
        flat = flat * axis.size + position
        points *= axis.size
    for number in range(len(axis_names), 4):
        if np.any(rows[f"x{number}"] != 0):
            raise PackInvalid(
                f"{name} has {len(axis_names)} axes; x{number} has to be 0", where=f"{_FILE}: {name}, x{number}"
            )
    order = np.argsort(flat, kind="stable")
    found = flat[order]
    if np.any(found[1:] == found[:-1]):
        at = int(order[1:][found[1:] == found[:-1]][0])
        raise PackInvalid(f"the point {_point(axis_names, rows, at)} is given twice", where=f"{_FILE}: {name}")
    if found.size != points:
        missing = int(np.flatnonzero(np.append(found, -1)[: found.size + 1] != np.arange(found.size + 1))[0])
        indices = np.unravel_index(missing, [axis.size for axis in axes])
        point = ", ".join(f"{n}={axis[i]:g}" for n, axis, i in zip(axis_names, axes, indices, strict=True))
        raise PackInvalid(
            f"the grid is not full: {points} points, {found.size} given, the first missing is {point}",
            where=f"{_FILE}: {name}",
        )
    values = rows["latency_ns"][order].astype(np.float64)
    if name == "dense_gemm" and not np.all(values > 0):
        at = int(order[np.flatnonzero(values <= 0)[0]])
        raise PackInvalid(
            f"the point {_point(axis_names, rows, at)} costs nothing", where=f"{_FILE}: {name}, latency_ns"
        )
    return axes, values, rows["knowledge"][order].astype(np.int8)


def _point(axis_names: tuple[str, ...], rows: Mapping[str, NDArray[Any]], at: int) -> str:
    return ", ".join(f"{name}={rows[f'x{number}'][at]:g}" for number, name in enumerate(axis_names))
