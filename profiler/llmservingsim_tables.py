"""The operator tables of an LLMServingSim bundle (casys-kaist/LLMServingSim): CSV files to full grids.

Times are microseconds of one layer on one rank, measured by its vLLM layer profiler; grids come out in nanoseconds per
step, all layers summed. A table that cannot be composed is refused with the line at fault: a hole that is filled
silently is a latency nobody measured.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np

from oracle_server.errors import InvalidArgument
from oracle_server.sampling.answer import KNOWLEDGE_MEASURED
from oracle_server.sampling.grids import OPERATOR_AXES
from profiler.llmservingsim_csv import coordinate_of, rows_of, time_us_of
from profiler.operators import Operator

# Layers of dense.csv -> how often each decoder layer runs them; the two at the ends of the model run once a step.
_GEMM = {"qkv_proj": 1, "o_proj": 1}
_ELEMENTWISE = {"layernorm": 2, "rotary_emb": 1}
# Layers without experts have these too.
_DENSE_GEMM = ("gate_up_proj", "down_proj")
_DENSE_ELEMENTWISE = ("act_fn",)
_ONCE = ("embedding", "final_layernorm")
# Normalizes queries and keys; only some models have it.
_QK_NORM = "qk_norm"
_PER_SEQUENCE = {"lm_head": "logits", "sampler": "sampler"}

_SKEW_COLUMNS = ("regime", "t_mean_us", "t_max_us", "t_skew_us")
_ATTENTION_COLUMNS = ("prefill_chunk", "kv_prefill", "n_decode", "kv_decode")
_AXIS = re.compile(r"(?:(0),)?(\d+)-(\d+)x(\d+(?:\.\d+)?)")

# chunk, history, decode requests, context of each.
_Point = tuple[int, int, int, int]


@dataclass(frozen=True)
class DeclaredGrid:
    """The attention grid as meta.yaml declares it; empty axes: it does not."""

    chunks: tuple[int, ...] = ()
    decode_requests: tuple[int, ...] = ()
    contexts: tuple[int, ...] = ()


@dataclass(frozen=True)
class Skew:
    """Least-squares share of (cost at the longest context - cost at the mean context) that uneven contexts add."""

    coefficient: float
    # Of the fit; 0 where nothing was fitted.
    standard_error: float
    rows: int


def parse_axis(text: str) -> tuple[int, ...]:
    """The points of an axis as meta.yaml writes it: "0, 16-2048 x2" is 0 and 16, 32, ... 2048."""
    found = _AXIS.fullmatch(text.replace(" ", ""))
    if found is None:
        raise InvalidArgument(f"meta.yaml: the axis {text!r} is not of the form `0, 16-2048 x2`", field="meta.yaml")
    zero, first, last, factor = found[1], int(found[2]), int(found[3]), float(found[4])
    if first < 1 or last < first or factor <= 1.0:
        raise InvalidArgument(f"meta.yaml: the axis {text!r} does not ascend", field="meta.yaml")
    points = [0] if zero else []
    value = float(first)
    while value < last:
        points.append(round(value))
        value *= factor
    return (*points, last)


def dense_operators(
    path: Path, num_layers: int, *, num_moe_layers: int = 0, has_qk_norm: bool | None = None, most_tokens: int = 0
) -> list[Operator]:
    """dense_gemm and dense_elementwise from dense.csv; `most_tokens` is what the table has to reach (0: any).

    `num_moe_layers` of the layers have experts in place of a dense feed-forward part. `has_qk_norm` None: as the table
    has it.
    """
    layers = _layers(path, "tokens")
    num_dense = num_layers - num_moe_layers
    gemm = {name: num_layers * count for name, count in _GEMM.items()}
    elementwise = {name: num_layers * count for name, count in _ELEMENTWISE.items()} | dict.fromkeys(_ONCE, 1)
    if num_dense:
        gemm |= dict.fromkeys(_DENSE_GEMM, num_dense)
        elementwise |= dict.fromkeys(_DENSE_ELEMENTWISE, num_dense)
    needed = [*gemm, *elementwise, *([_QK_NORM] if has_qk_norm else [])]
    _check_layers(path, layers, needed, optional=[] if has_qk_norm is False else [_QK_NORM])
    axis = _common_axis(path, layers, "tokens", most_tokens)

    def summed(counts: Mapping[str, int]) -> list[float]:
        return [math.fsum(1e3 * count * layers[name][x] for name, count in counts.items()) for x in axis]

    if _QK_NORM in layers:
        elementwise[_QK_NORM] = num_layers
    return [
        _measured("dense_gemm", "dense", (axis,), summed(gemm)),
        _measured("dense_elementwise", "dense", (axis,), summed(elementwise)),
    ]


def sequence_operators(path: Path, *, most_sequences: int = 0) -> list[Operator]:
    """logits and sampler from per_sequence.csv."""
    layers = _layers(path, "sequences")
    _check_layers(path, layers, _PER_SEQUENCE, optional=())
    axis = _common_axis(path, layers, "sequences", most_sequences)
    return [
        _measured(name, "sequences", (axis,), [1e3 * layers[layer][x] for x in axis])
        for layer, name in _PER_SEQUENCE.items()
    ]


def attention_operators(
    path: Path, num_layers: int, declared: DeclaredGrid, *, most_sequences: int = 0
) -> list[Operator]:
    """generation_attention, context_attention and mixed_attention; the last only where meta.yaml or the table has it.

    A table may hold points of several profiling passes. The declared grid has to be there in full; a further coordinate
    is taken where it is measured against every point of the other axes.
    """
    table = _attention(path)
    axes = [sorted({point[axis] for point in table}) for axis in range(4)]
    chunks = [x for x in declared.chunks or axes[0] if x]
    histories = sorted({0, *(declared.contexts or axes[1])})
    requests = [x for x in declared.decode_requests or axes[2] if x]
    contexts = [x for x in declared.contexts or axes[3] if x]
    scale = 1e3 * num_layers

    def operator(name: str, grid: Sequence[Sequence[int]], fixed: Mapping[int, int]) -> Operator:
        full = _full_grid(path, table, axes, grid, fixed)
        values = [scale * table[_point(point, fixed)] for point in product(*full)]
        return _measured(name, "attention", tuple(full), values)

    operators = [
        operator("generation_attention", (requests, contexts), {0: 0, 1: 0}),
        operator("context_attention", (chunks, histories), {2: 0, 3: 0}),
    ]
    beside = max((point[2] for point in table if point[0]), default=0)
    if beside or declared.decode_requests:
        # A chunk beside as many decode requests as the batch has places is one request too many.
        fitting = [n for n in requests if n < most_sequences or (not most_sequences and n <= beside)]
        operators.append(operator("mixed_attention", (chunks, histories, fitting, contexts), {}))
    return operators


def skew_coefficients(path: Path) -> tuple[Skew, Skew]:
    """Skew of decode-only and of mixed steps: least squares through the origin over skew.csv.

    Each row times one batch three ways: all requests at the mean context, all at the longest, and as they are. Rows
    weigh 1 / t_mean^2, so that each counts by its relative size. Times here are of another unit than attention.csv's
    (about three times as long: sums over the iterations), so nothing but their ratios is used.
    """
    sums = {"pure": [0.0, 0.0, 0.0, 0.0], "mixed": [0.0, 0.0, 0.0, 0.0]}
    for line, row in rows_of(path, _SKEW_COLUMNS):
        where = f"{path.name}, line {line}"
        regime = row["regime"]
        if regime not in sums:
            raise InvalidArgument(f"{where}: the regime {regime!r} is neither pure nor mixed", field=path.name)
        mean, longest, skewed = (time_us_of(where, name, row[name]) for name in _SKEW_COLUMNS[1:])
        spread, added = (longest - mean) / mean, (skewed - mean) / mean
        if spread > 0.0:
            for index, value in enumerate((added * spread, spread * spread, added * added, 1.0)):
                sums[regime][index] += value
    return _skew(path, "pure", sums["pure"]), _skew(path, "mixed", sums["mixed"])


def _skew(path: Path, regime: str, sums: Sequence[float]) -> Skew:
    cross, square, total, rows = sums
    if rows < 2:
        raise InvalidArgument(
            f"{path.name} has {rows:.0f} usable {regime} rows; at least 2 are needed", field=path.name
        )
    coefficient = cross / square
    if not 0.0 <= coefficient <= 1.0:
        raise InvalidArgument(
            f"{path.name}: uneven contexts of {regime} batches cost {coefficient:.3f} of the way from the mean to the "
            "longest context; a share between 0 and 1 is possible",
            field=path.name,
        )
    variance = max(total - coefficient * cross, 0.0) / (rows - 1)
    return Skew(coefficient, math.sqrt(variance / square), int(rows))


def _measured(name: str, group: str, points: tuple[Sequence[int], ...], values: Sequence[float]) -> Operator:
    shape = tuple(len(axis) for axis in points)
    return Operator(
        name,
        OPERATOR_AXES[name],
        group,
        tuple(tuple(axis) for axis in points),
        np.array(values, dtype=np.float64).reshape(shape),
        np.full(shape, KNOWLEDGE_MEASURED, dtype=np.int8),
    )


def _full_grid(
    path: Path,
    table: Mapping[_Point, float],
    present: Sequence[Sequence[int]],
    declared: Sequence[Sequence[int]],
    fixed: Mapping[int, int],
) -> list[list[int]]:
    """The declared axes, each with the further coordinates that leave the grid full."""
    for point in product(*declared):
        if _point(point, fixed) not in table:
            raise InvalidArgument(
                f"{path.name} has no row for {_text(_point(point, fixed))}: the grid has a gap", field=path.name
            )
    full = [list(axis) for axis in declared]
    free = [axis for axis in range(4) if axis not in fixed]
    for number, axis in enumerate(free):
        for extra in present[axis]:
            if extra in full[number] or (extra == 0 and 0 not in declared[number]):
                continue
            slab = [*full[:number], [extra], *full[number + 1 :]]
            if all(_point(point, fixed) in table for point in product(*slab)):
                full[number] = sorted([*full[number], extra])
    return full


def _point(free: Sequence[int], fixed: Mapping[int, int]) -> _Point:
    rest = iter(free)
    chunk, history, requests, context = (fixed[axis] if axis in fixed else next(rest) for axis in range(4))
    return chunk, history, requests, context


def _text(point: _Point) -> str:
    return ", ".join(f"{name}={value}" for name, value in zip(_ATTENTION_COLUMNS, point, strict=True))


def _attention(path: Path) -> dict[_Point, float]:
    table: dict[_Point, float] = {}
    lines: dict[_Point, int] = {}
    for line, row in rows_of(path, (*_ATTENTION_COLUMNS, "time_us")):
        where = f"{path.name}, line {line}"
        chunk, history, requests, context = (coordinate_of(where, name, row[name]) for name in _ATTENTION_COLUMNS)
        point = chunk, history, requests, context
        if (history and not chunk) or (context and not requests) or not (chunk or requests):
            raise InvalidArgument(f"{where}: {_text(point)} is no batch", field=path.name)
        if point in table:
            raise InvalidArgument(
                f"{where}: {_text(point)} is given twice, first in line {lines[point]}", field=path.name
            )
        table[point] = time_us_of(where, "time_us", row["time_us"])
        lines[point] = line
    return table


def _layers(path: Path, coordinate: str) -> dict[str, dict[int, float]]:
    """Layer -> coordinate -> microseconds."""
    layers: dict[str, dict[int, float]] = {}
    lines: dict[tuple[str, int], int] = {}
    for line, row in rows_of(path, ("layer", coordinate, "time_us")):
        where = f"{path.name}, line {line}"
        name, x = row["layer"], coordinate_of(where, coordinate, row[coordinate])
        if x < 1:
            raise InvalidArgument(f"{where}: {coordinate} is {x}; at least 1 is needed", field=path.name)
        if (name, x) in lines:
            raise InvalidArgument(
                f"{where}: {name} at {x} {coordinate} is given twice, first in line {lines[name, x]}", field=path.name
            )
        lines[name, x] = line
        layers.setdefault(name, {})[x] = time_us_of(where, "time_us", row["time_us"])
    return layers


def _check_layers(
    path: Path, layers: Mapping[str, object], needed: Sequence[str] | Mapping[str, str], *, optional: Sequence[str]
) -> None:
    for name in needed:
        if name not in layers:
            raise InvalidArgument(
                f"{path.name} has no rows for the layer {name!r}; a step cannot be composed without it",
                field=path.name,
            )
    for name in layers:
        if name not in needed and name not in optional:
            raise InvalidArgument(
                f"{path.name}: how often a step runs the layer {name!r} is not known; known are "
                f"{', '.join([*needed, *optional])}",
                field=path.name,
            )


def _common_axis(path: Path, layers: Mapping[str, Mapping[int, float]], coordinate: str, most: int) -> tuple[int, ...]:
    """The points every layer was measured at."""
    points = sorted(set().union(*layers.values()))
    for name, values in layers.items():
        for x in points:
            if x not in values:
                other = next(other for other in layers if x in layers[other])
                raise InvalidArgument(
                    f"{path.name} has no row for {name} at {x} {coordinate}, where {other} has one: the grid has a gap",
                    field=path.name,
                )
    if most and points[-1] < most:
        raise InvalidArgument(
            f"{path.name} ends at {points[-1]} {coordinate}; meta.yaml says it was profiled up to {most}, so rows are "
            "missing",
            field=path.name,
        )
    return tuple(points)
