"""TTFT, TPOT and E2E of a run, and how two runs of the same requests differ."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

METRICS: Final = ("ttft", "tpot", "e2e")
STATISTICS: Final = ("mean", "p50", "p90", "p99")


class Latencies(NamedTuple):
    """Milliseconds, one entry per request, float64; a request of one output token has no TPOT, which is NaN."""

    ttft: NDArray[np.float64]
    tpot: NDArray[np.float64]
    e2e: NDArray[np.float64]


def latencies(
    arrival_ns: Sequence[int], first_token_ns: Sequence[int], last_token_ns: Sequence[int], output_tokens: Sequence[int]
) -> Latencies:
    """TTFT = first token - arrival, E2E = last token - arrival, TPOT = (last - first) / (output tokens - 1).

    As `vllm bench serve` has them: a request of one output token is in TTFT and E2E and not in TPOT
    (vllm/benchmarks/serve.py, 0.33.0).
    """
    arrival, first, last = (np.asarray(times, dtype=np.int64) for times in (arrival_ns, first_token_ns, last_token_ns))
    gaps = np.asarray(output_tokens, dtype=np.float64) - 1
    tpot = np.full(len(gaps), np.nan)
    np.divide((last - first) / 1e6, gaps, out=tpot, where=gaps > 0)
    return Latencies((first - arrival) / 1e6, tpot, (last - arrival) / 1e6)


def known(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """The values of the requests that have one."""
    return values[~np.isnan(values)]


def summary(values: NDArray[np.float64]) -> dict[str, float | None]:
    """Mean and percentiles (linear between ranks) of the values that are known; None where none is."""
    values = known(values)
    if not values.size:
        return dict.fromkeys(STATISTICS)
    p50, p90, p99 = (float(value) for value in np.percentile(values, (50, 90, 99)))
    return {"mean": float(values.mean()), "p50": p50, "p90": p90, "p99": p99}


def error_percent(replayed: Latencies, real: Latencies) -> dict[str, dict[str, float | None]]:
    """Signed: (replayed / real - 1) in per cent of each statistic; None where there is no real one to divide by."""
    result = {}
    for name in METRICS:
        ours, theirs = summary(getattr(replayed, name)), summary(getattr(real, name))
        result[name] = {key: _error_percent(ours[key], theirs[key]) for key in STATISTICS}
    return result


def _error_percent(ours: float | None, theirs: float | None) -> float | None:
    return 100 * (ours / theirs - 1) if ours is not None and theirs else None


def per_request_mape(replayed: Latencies, real: Latencies) -> dict[str, float | None]:
    """Mean over requests of |replayed - real| / real in per cent.

    Requests whose real value is 0 or none are left out; None where nothing is left.
    """
    result: dict[str, float | None] = {}
    for name in METRICS:
        ours, theirs = getattr(replayed, name), getattr(real, name)
        compared = (theirs > 0) & ~np.isnan(ours)
        errors = np.abs(ours[compared] - theirs[compared]) / theirs[compared]
        result[name] = float(errors.mean() * 100) if errors.size else None
    return result
