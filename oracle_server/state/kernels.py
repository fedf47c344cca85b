"""Compiles every kernel before the server is ready: compiling later would stall the steps of all experiments."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from oracle_server.sampling.buckets import build_index
from oracle_server.sampling.composed import ComposedOptions, ComposedOracle
from oracle_server.sampling.grids import OPERATOR_AXES, build_arrays
from oracle_server.sampling.sampled import SampledOptions, SampledOracle


def warm_kernels() -> None:
    """Compile the kernels of both latency models, or load them from numba's cache, with the smallest tables."""
    samples: dict[str, NDArray[Any]] = {
        "table": np.array([0, 1], dtype=np.int8),
        "total_tokens": np.array([1, 1], dtype=np.int32),
        "concurrency": np.array([1, 1], dtype=np.int32),
        "context_tokens": np.array([-1, -1], dtype=np.int64),
        "previous_prefill_tokens": np.array([-1, -1], dtype=np.int32),
        "latency_ns": np.array([1, 1], dtype=np.int64),
    }
    index = build_index(samples, tokens_width=1, concurrency_width=1, transition=False)
    SampledOracle(index, SampledOptions()).warm()

    points = [(number, x0, x1) for number, axes in enumerate(OPERATOR_AXES.values()) for x0, x1 in _corners(len(axes))]
    operators: dict[str, NDArray[Any]] = {
        "operator": np.array([point[0] for point in points], dtype=np.int16),
        "x0": np.array([point[1] for point in points], dtype=np.float64),
        "x1": np.array([point[2] for point in points], dtype=np.float64),
        "x2": np.zeros(len(points)),
        "x3": np.zeros(len(points)),
        "latency_ns": np.ones(len(points)),
        "knowledge": np.ones(len(points), dtype=np.int8),
    }
    arrays = build_arrays(operators, dict(enumerate(OPERATOR_AXES)))
    residuals = {"residuals": np.ones(1, dtype=np.float32)}
    ComposedOracle({**arrays, **residuals}, ComposedOptions()).warm()


def _corners(axes: int) -> list[tuple[float, float]]:
    ends = (0.0, 1.0)
    return list(product(ends, ends)) if axes == 2 else [(x, 0.0) for x in ends]
