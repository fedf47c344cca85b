"""Compiles every kernel before the server is ready: compiling later would stall the steps of all experiments."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from oracle_server.sampling.buckets import build_index
from oracle_server.sampling.composed import ComposedOptions, ComposedOracle
from oracle_server.sampling.grids import OPERATOR_AXES, build_arrays
from oracle_server.sampling.hybrid import HybridOptions, HybridOracle
from oracle_server.sampling.hybrid_tables import Term, build_model, long_form
from oracle_server.sampling.sampled import SampledOptions, SampledOracle


def warm_kernels() -> None:
    """Compile the kernels of all latency models, or load them from numba's cache, with the smallest tables."""
    samples: dict[str, NDArray[Any]] = {
        "table": np.array([0, 1], dtype=np.int8),
        "total_tokens": np.array([1, 1], dtype=np.int32),
        "concurrency": np.array([1, 1], dtype=np.int32),
        "context_tokens": np.array([-1, -1], dtype=np.int64),
        "previous_prefill_tokens": np.array([-1, -1], dtype=np.int32),
        "latency_ns": np.array([1, 1], dtype=np.int64),
    }
    for neighbors in ("joint", "nearest"):
        index = build_index(samples, tokens_width=1, concurrency_width=1, transition=False, neighbors=neighbors)
        SampledOracle(index, SampledOptions(neighbors=neighbors)).warm()

    points = [(number, *corner) for number, axes in enumerate(OPERATOR_AXES.values()) for corner in _corners(len(axes))]
    operators: dict[str, NDArray[Any]] = {
        "operator": np.array([point[0] for point in points], dtype=np.int16),
        "x0": np.array([point[1] for point in points], dtype=np.float64),
        "x1": np.array([point[2] for point in points], dtype=np.float64),
        "x2": np.array([point[3] for point in points], dtype=np.float64),
        "x3": np.array([point[4] for point in points], dtype=np.float64),
        "latency_ns": np.ones(len(points)),
        "knowledge": np.ones(len(points), dtype=np.int8),
    }
    arrays = build_arrays(operators, dict(enumerate(OPERATOR_AXES)))
    residuals = {"residuals": np.ones(1, dtype=np.float32)}
    ComposedOracle({**arrays, **residuals}, ComposedOptions()).warm()

    table = {
        "decode_requests": np.array([1, 2]),
        "decode_context": np.array([0, 1]),
        "decode_ratio": np.ones((2, 2)),
        "decode_support": np.ones((2, 2)),
        "decode_distance": np.zeros((2, 2)),
        "mixed_support": np.ones((1, 6)),
        "mixed_residual": np.ones(1),
    }
    model = build_model(long_form(table), [Term("step", 0.0, 1.0)])
    HybridOracle({**model, **residuals}, HybridOptions()).warm()


def _corners(axes: int) -> list[tuple[float, ...]]:
    """The corners of the unit cube, with the coordinates of operators.parquet."""
    return [(*corner, *(0.0,) * (4 - axes)) for corner in product((0.0, 1.0), repeat=axes)]
