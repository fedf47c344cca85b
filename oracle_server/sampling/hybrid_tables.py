"""The hybrid model's data: physics terms, the table of decode-only ratios, the support of mixed steps; numpy alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from oracle_server.errors import PackInvalid

# What a term multiplies -> unit of its coefficient. The order gives the number a kernel knows it by.
TERM_UNITS: Final[dict[str, str]] = {
    "step": "ns",
    "mixed_step": "ns",
    "total_tokens": "ns per token",
    "decode_requests": "ns per request",
    "decode_context_tokens": "ns per token",
    "max_decode_context_tokens": "ns per token",
    "prefill_chunks": "ns per chunk",
    "prefill_tokens": "ns per token",
    "prefill_history_tokens": "ns per token",
    "prefill_attention_pairs": "ns per pair",
}
TERM_NUMBERS: Final = {name: number for number, name in enumerate(TERM_UNITS)}
# A kink is for what a roofline bends: never for context of decode requests, in which a lease has to be linear.
KINKED_TERMS: Final = frozenset({"total_tokens", "prefill_tokens", "prefill_attention_pairs"})
# Terms every decode-only step has more than nothing of: one of them has to cost something.
_ALWAYS: Final = frozenset({"step", "total_tokens", "decode_requests"})

# Numbers of model.parquet's column `array` -> name, number of columns.
ARRAYS: Final[dict[str, int]] = {
    "decode_requests": 1,
    "decode_context": 1,
    "decode_ratio": 0,
    "decode_support": 0,
    "decode_distance": 0,
    "mixed_support": 6,
    "mixed_residual": 1,
}
ARRAY_NAMES: Final = tuple(ARRAYS)
# As many as the decode table has contexts.
_AS_CONTEXTS: Final = 0

# Numbers of a mixed step that decide how near a measured one is; logarithms, so that distance is relative.
MIXED_FEATURES: Final = (
    "ln(prefill tokens)",
    "ln(prefill chunks)",
    "ln(prefill attention pairs) / 2",
    "ln(1 + decode requests)",
    "ln(1 + mean decode context tokens)",
)

SUPPORT_ROWS_LIMIT: Final = 512
TABLE_EDGES_LIMIT: Final = 256
TERMS_LIMIT: Final = 32
RATIO_LIMIT: Final = 10.0
RESIDUAL_LIMIT: Final = 1000.0
MIXED_RESIDUAL_ROWS_LIMIT: Final = 256
EDGE_LIMIT: Final = 2**31

_FILE: Final = "model.parquet"
_TERMS: Final = "manifest.json: latency.hybrid.terms"


class Term(NamedTuple):
    """One physics term: coefficient_ns * max(0, feature - above)."""

    name: str
    above: float
    coefficient_ns: float


def check_terms(terms: Sequence[Term]) -> None:
    """Raise PackInvalid unless the terms are known, named once, kinked where they may be, and never free."""
    if len(terms) > TERMS_LIMIT:
        raise PackInvalid(f"{len(terms)} terms; at most {TERMS_LIMIT} are allowed", where=_TERMS)
    for number, term in enumerate(terms):
        if term.name not in TERM_UNITS:
            raise PackInvalid(
                f"unknown term {term.name[:80]!r}; known are {', '.join(TERM_UNITS)}", where=f"{_TERMS}[{number}].name"
            )
        if term.above and term.name not in KINKED_TERMS:
            raise PackInvalid(
                f"{term.name} has no kinks; they belong to {', '.join(sorted(KINKED_TERMS))}",
                where=f"{_TERMS}[{number}].above",
            )
    if len({(term.name, term.above) for term in terms}) != len(terms):
        raise PackInvalid("a term with one kink is given twice", where=_TERMS)
    if not any(term.coefficient_ns > 0 and term.name in _ALWAYS and not term.above for term in terms):
        raise PackInvalid(
            f"a step would cost nothing: one of {', '.join(sorted(_ALWAYS))} has to be above 0", where=_TERMS
        )


def build_model(columns: Mapping[str, NDArray[Any]], terms: Sequence[Term]) -> dict[str, NDArray[Any]]:
    """Arrange model.parquet for the kernels.

    `columns` are array, row, column (integers) and value. The result, N x K the decode table:
        decode_requests  int64[N]      first number of decode requests of a row of cells; ascending from 1
        decode_context   int64[K]      first mean context tokens of a column of cells; ascending from 0
        decode_ratio     float64[N, K] truth / physics at that corner
        decode_support   int64[N, K]   Support of step.proto in the cell that begins there; the last ones are open
        decode_distance  float64[N, K] distance from that cell to the nearest measured decode-only step
        mixed_support    float64[S, 6] MIXED_FEATURES and truth / physics of measured mixed steps
        mixed_residual   float64[R]    residual pool of mixed steps
        term_feature, term_above, term_ns  of the terms, in their order
    Raises PackInvalid for an unknown or absent array, one with gaps or a number out of range.
    """
    check_terms(terms)
    unknown = np.setdiff1d(np.unique(columns["array"]), np.arange(len(ARRAYS)))
    if unknown.size:
        raise PackInvalid(f"array {int(unknown[0])}; known are 0 to {len(ARRAYS) - 1}", where=f"{_FILE}: array")
    arrays = {name: _dense(columns, number, name) for number, name in enumerate(ARRAYS)}
    contexts = arrays["decode_context"].shape[0]
    for name, width in ARRAYS.items():
        expected = (arrays["decode_requests"].shape[0], contexts) if width == _AS_CONTEXTS else None
        shape = arrays[name].shape
        if (expected is not None and shape != expected) or (expected is None and shape[1] != width):
            raise PackInvalid(
                f"{name} is {shape[0]} x {shape[1]}; it has to be "
                + (f"{expected[0]} x {expected[1]}" if expected else f"{width} wide"),
                where=f"{_FILE}: {name}",
            )
    requests = _edges(arrays["decode_requests"], "decode_requests", 1)
    context = _edges(arrays["decode_context"], "decode_context", 0)
    _range(arrays["decode_ratio"], "decode_ratio", 1.0 / RATIO_LIMIT, RATIO_LIMIT)
    support = arrays["decode_support"]
    if not np.all((support == 1) | (support == 2) | (support == 3)):
        raise PackInvalid("a support is 1, 2 or 3 (Support of step.proto)", where=f"{_FILE}: decode_support")
    _range(arrays["decode_distance"], "decode_distance", 0.0, 1e6)
    mixed = arrays["mixed_support"]
    _rows_limit(mixed, "mixed_support", SUPPORT_ROWS_LIMIT)
    _range(mixed[:, :5], "mixed_support", 0.0, 100.0)
    _range(mixed[:, 5:], "mixed_support", 1.0 / RATIO_LIMIT, RATIO_LIMIT)
    residual = arrays["mixed_residual"]
    _rows_limit(residual, "mixed_residual", MIXED_RESIDUAL_ROWS_LIMIT)
    _range(residual, "mixed_residual", 1.0 / RESIDUAL_LIMIT, RESIDUAL_LIMIT)
    return {
        "decode_requests": requests,
        "decode_context": context,
        "decode_ratio": arrays["decode_ratio"],
        "decode_support": support.astype(np.int64),
        "decode_distance": arrays["decode_distance"],
        "mixed_support": mixed,
        "mixed_residual": residual[:, 0].copy(),
        "term_feature": np.array([TERM_NUMBERS[term.name] for term in terms], dtype=np.int64),
        "term_above": np.array([term.above for term in terms], dtype=np.float64),
        "term_ns": np.array([term.coefficient_ns for term in terms], dtype=np.float64),
    }


def long_form(arrays: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """Columns of model.parquet from the arrays ARRAYS names (one-dimensional ones as one column)."""
    parts: list[tuple[NDArray[Any], NDArray[Any], NDArray[Any], NDArray[Any]]] = []
    for number, name in enumerate(ARRAYS):
        array = np.asarray(arrays[name], dtype=np.float64)
        array = array.reshape(array.shape[0], -1)
        row, column = (index.ravel() for index in np.indices(array.shape))
        parts.append((np.full(row.size, number), row, column, array.ravel()))
    joined = [np.concatenate(part) for part in zip(*parts, strict=True)]
    return {
        "array": joined[0].astype(np.int8),
        "row": joined[1].astype(np.int32),
        "column": joined[2].astype(np.int32),
        "value": joined[3],
    }


def _dense(columns: Mapping[str, NDArray[Any]], number: int, name: str) -> NDArray[np.float64]:
    """One array, every element given exactly once."""
    chosen = columns["array"] == number
    row = columns["row"][chosen].astype(np.int64)
    column = columns["column"][chosen].astype(np.int64)
    where = f"{_FILE}: {name}"
    if not row.size:
        raise PackInvalid(f"no array {name!r}: a hybrid pack needs it", where=where)
    width = int(column.max()) + 1
    height = int(row.max()) + 1
    flat = np.sort(row * width + column)
    if flat.size != width * height or not np.array_equal(flat, np.arange(flat.size)):
        raise PackInvalid(f"{row.size} elements do not fill {height} x {width}, each once", where=where)
    dense = np.zeros((height, width))
    dense[row, column] = columns["value"][chosen]
    return dense


def _edges(array: NDArray[np.float64], name: str, first: int) -> NDArray[np.int64]:
    edges = array[:, 0]
    if not (
        edges.size >= 2
        and edges[0] == first
        and np.all(edges == np.floor(edges))
        and np.all(np.diff(edges) > 0)
        and edges[-1] <= EDGE_LIMIT
    ):
        raise PackInvalid(
            f"edges are two or more ascending whole numbers from {first} to 2^31", where=f"{_FILE}: {name}"
        )
    _rows_limit(array, name, TABLE_EDGES_LIMIT)
    return edges.astype(np.int64)


def _rows_limit(array: NDArray[np.float64], name: str, limit: int) -> None:
    if array.shape[0] > limit:
        raise PackInvalid(f"{array.shape[0]} rows; at most {limit} are allowed", where=f"{_FILE}: {name}")


def _range(array: NDArray[np.float64], name: str, low: float, high: float) -> None:
    """Comparisons with NaN are false, so NaN is refused too."""
    fine = (array >= low) & (array <= high)
    if not fine.all():
        row, column = (int(index[0]) for index in np.nonzero(~fine))
        raise PackInvalid(
            f"element ({row}, {column}) is {array[row, column]}; allowed is {low:g} to {high:g}",
            where=f"{_FILE}: {name}",
        )
