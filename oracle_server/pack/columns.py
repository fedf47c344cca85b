"""The data files of a pack: their columns, and what has to be true of the numbers in them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from oracle_server.errors import PackInvalid
from oracle_server.pack.manifest import Manifest, composed_latency
from oracle_server.sampling.grids import OPERATOR_AXES

SAMPLES_FILE: Final = "samples.parquet"
OPERATORS_FILE: Final = "operators.parquet"
MODEL_FILE: Final = "model.parquet"
RESIDUALS_FILE: Final = "residuals.parquet"

# File -> column -> numpy type. The order is the order in the file.
COLUMNS: Final[dict[str, dict[str, str]]] = {
    SAMPLES_FILE: {
        "table": "int8",
        "total_tokens": "int32",
        "concurrency": "int32",
        "context_tokens": "int64",
        "previous_prefill_tokens": "int32",
        "latency_ns": "int64",
    },
    OPERATORS_FILE: {
        "operator": "int16",
        "x0": "float64",
        "x1": "float64",
        "x2": "float64",
        "x3": "float64",
        "latency_ns": "float64",
        "knowledge": "int8",
    },
    MODEL_FILE: {"array": "int8", "row": "int32", "column": "int32", "value": "float64"},
    RESIDUALS_FILE: {"ratio": "float32"},
}
UNITS: Final[dict[str, dict[str, str]]] = {
    SAMPLES_FILE: {
        "table": "0 decode, 1 prefill or mixed",
        "total_tokens": "tokens",
        "concurrency": "requests",
        "context_tokens": "tokens, -1 unknown",
        "previous_prefill_tokens": "tokens, -1 unknown",
        "latency_ns": "nanoseconds",
    },
    OPERATORS_FILE: {
        "operator": "id in latency.composed.operators",
        "x0": "tokens, rows or requests",
        "x1": "tokens",
        "x2": "0",
        "x3": "0",
        "latency_ns": "nanoseconds per step",
        "knowledge": "Knowledge of step.proto",
    },
    MODEL_FILE: {
        "array": "number of a hybrid array",
        "row": "index",
        "column": "index",
        "value": "tokens, requests, actual / physics, logarithm or Support",
    },
    RESIDUALS_FILE: {"ratio": "actual / predicted"},
}
# Files of a kind: needed, allowed.
KIND_FILES: Final[dict[str, tuple[frozenset[str], frozenset[str]]]] = {
    "sampled": (frozenset({SAMPLES_FILE}), frozenset({SAMPLES_FILE})),
    "composed": (frozenset({OPERATORS_FILE}), frozenset({OPERATORS_FILE, RESIDUALS_FILE})),
    "hybrid": (frozenset({MODEL_FILE}), frozenset({MODEL_FILE, RESIDUALS_FILE})),
}
LATENCY_NS_LIMIT: Final = 600_000_000_000
RESIDUAL_ROWS_LIMIT: Final = 256
OPERATOR_ROWS_LIMIT: Final = 2_000_000
# The largest arrays of sampling.hybrid_tables, together.
MODEL_ROWS_LIMIT: Final = 250_000

Columns = Mapping[str, NDArray[Any]]


def check_columns(manifest: Manifest, files: Mapping[str, Columns]) -> tuple[str, ...]:
    """Check the numbers of all files of a pack; returns warnings, raises PackInvalid naming file, column and row.

    `files` maps file names to columns of the types in COLUMNS, without nulls.
    """
    needed, allowed = KIND_FILES[manifest.kind]
    for name in sorted(needed - set(files)):
        raise PackInvalid(f"a {manifest.kind} pack needs {name}", where="manifest.json: files")
    for name in sorted(set(files) - allowed):
        raise PackInvalid(f"a {manifest.kind} pack has no {name}", where="manifest.json: files")
    for name, columns in files.items():
        if not next(iter(columns.values())).size:
            raise PackInvalid("no rows", where=name)
    if manifest.kind == "sampled":
        return _check_samples(files[SAMPLES_FILE])
    if RESIDUALS_FILE in files:
        _check_residuals(files[RESIDUALS_FILE])
    if manifest.kind == "hybrid":
        _check_model(files[MODEL_FILE])
        return ()
    return _check_operators(manifest, files[OPERATORS_FILE])


def _check_samples(columns: Columns) -> tuple[str, ...]:
    _require(columns, SAMPLES_FILE, "table", (columns["table"] == 0) | (columns["table"] == 1), "0 or 1")
    for name in ("total_tokens", "concurrency"):
        _require(columns, SAMPLES_FILE, name, columns[name] >= 1, "at least 1")
    for name in ("context_tokens", "previous_prefill_tokens"):
        _require(columns, SAMPLES_FILE, name, columns[name] >= -1, "-1 (unknown) or more")
    latency = columns["latency_ns"]
    _require(
        columns,
        SAMPLES_FILE,
        "latency_ns",
        (latency > 0) & (latency <= LATENCY_NS_LIMIT),
        "above 0 and at most 600 seconds",
    )
    median = float(np.median(latency))
    warnings = []
    if not 50e3 <= median <= 60e9:
        warnings.append(f"{SAMPLES_FILE}: the median step is {median / 1e6:.6g} ms; is latency_ns in nanoseconds?")
    cell = (
        (columns["table"].astype(np.int64) << 62)
        ^ (columns["concurrency"].astype(np.int64) << 31)
        ^ columns["total_tokens"]
    )
    order = np.argsort(cell, kind="stable")
    cell, sorted_latency = cell[order], latency[order]
    first = np.flatnonzero(np.concatenate((np.ones(1, dtype=bool), cell[1:] != cell[:-1])))
    counts = np.diff(np.append(first, cell.size))
    constant = np.minimum.reduceat(sorted_latency, first) == np.maximum.reduceat(sorted_latency, first)
    suspicious = int(np.count_nonzero(constant & (counts >= 10)))
    if suspicious:
        warnings.append(f"{SAMPLES_FILE}: {suspicious} buckets of 10 or more samples hold one and the same latency")
    return tuple(warnings)


def _check_operators(manifest: Manifest, columns: Columns) -> tuple[str, ...]:
    composed = composed_latency(manifest)
    for name in ("x0", "x1", "x2", "x3"):
        _require(columns, OPERATORS_FILE, name, np.isfinite(columns[name]), "finite")
    latency = columns["latency_ns"]
    _require(
        columns,
        OPERATORS_FILE,
        "latency_ns",
        (latency >= 0) & (latency <= LATENCY_NS_LIMIT),
        "between 0 and 600 seconds",
    )
    _require(
        columns,
        OPERATORS_FILE,
        "knowledge",
        (columns["knowledge"] >= 1) & (columns["knowledge"] <= 5),
        "1 to 5 (Knowledge)",
    )
    warnings = []
    for number, operator in enumerate(composed.operators):
        expected = OPERATOR_AXES.get(operator.name)
        if expected is None:
            raise PackInvalid(
                f"unknown operator {operator.name!r}; known are {', '.join(OPERATOR_AXES)}",
                where=f"manifest.json: latency.composed.operators[{number}].name",
            )
        if operator.axes != expected:
            raise PackInvalid(
                f"the axes of {operator.name} are {list(operator.axes)}; they have to be {list(expected)}",
                where=f"manifest.json: latency.composed.operators[{number}].axes",
            )
        if operator.name == "dense_gemm":
            rows = columns["operator"] == operator.id
            values = latency[rows][np.argsort(columns["x0"][rows], kind="stable")]
            falls = int(np.count_nonzero(values[1:] < 0.9 * values[:-1]))
            if falls:
                warnings.append(f"{OPERATORS_FILE}: dense_gemm falls by more than 10 % at {falls} grid points")
            if values.size and not 50e3 <= float(values[-1]) <= 60e9:
                warnings.append(
                    f"{OPERATORS_FILE}: the largest dense_gemm is {float(values[-1]) / 1e6:.6g} ms; "
                    "is latency_ns in nanoseconds?"
                )
    return tuple(warnings)


def _check_model(columns: Columns) -> None:
    """Indices and finite values; what has to be true of each array, `hybrid_tables.build_model` says."""
    for name in ("row", "column"):
        _require(columns, MODEL_FILE, name, (columns[name] >= 0) & (columns[name] < 65536), "0 to 65535")
    _require(columns, MODEL_FILE, "value", np.isfinite(columns["value"]), "finite")


def _check_residuals(columns: Columns) -> None:
    ratio = columns["ratio"]
    if ratio.size > RESIDUAL_ROWS_LIMIT:
        raise PackInvalid(f"{ratio.size} ratios; a lease carries at most {RESIDUAL_ROWS_LIMIT}", where=RESIDUALS_FILE)
    _require(columns, RESIDUALS_FILE, "ratio", (ratio > 0) & (ratio <= 1000), "above 0 and at most 1000")


def _require(columns: Columns, file: str, column: str, fine: NDArray[np.bool_], allowed: str) -> None:
    """Comparisons with NaN are false, so NaN is refused wherever a range is asked for."""
    if not fine.all():
        row = int(np.argmin(fine))
        raise PackInvalid(
            f"{column} is {columns[column][row].item()}; allowed is {allowed}", where=f"{file}: {column}, row {row}"
        )
