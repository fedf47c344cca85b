"""TTFT, TPOT and E2E of a run, and how two runs of the same requests differ."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

METRICS: Final = ("ttft", "tpot", "e2e")
STATISTICS: Final = ("mean", "p50", "p90", "p99")


class Latencies(NamedTuple):
    """Milliseconds, one entry per request, float64."""

    ttft: NDArray[np.float64]
    tpot: NDArray[np.float64]
    e2e: NDArray[np.float64]


def latencies(
    arrival_ns: Sequence[int], first_token_ns: Sequence[int], last_token_ns: Sequence[int], output_tokens: Sequence[int]
) -> Latencies:
    """TTFT = first token - arrival, E2E = last token - arrival, TPOT = (last - first) / (output tokens - 1).

    A request of one output token has a TPOT of 0 over a divisor of 1.
    """
    arrival, first, last = (np.asarray(times, dtype=np.int64) for times in (arrival_ns, first_token_ns, last_token_ns))
    gaps = np.maximum(np.asarray(output_tokens, dtype=np.int64) - 1, 1)
    ttft, tpot, e2e = (first - arrival) / 1e6, (last - first) / gaps / 1e6, (last - arrival) / 1e6
    return Latencies(ttft.astype(np.float64), tpot.astype(np.float64), e2e.astype(np.float64))


def summary(values: NDArray[np.float64]) -> dict[str, float]:
    """Mean and percentiles (linear between ranks)."""
    p50, p90, p99 = (float(value) for value in np.percentile(values, (50, 90, 99)))
    return {"mean": float(values.mean()), "p50": p50, "p90": p90, "p99": p99}


def error_percent(replayed: Latencies, real: Latencies) -> dict[str, dict[str, float]]:
    """Signed: (replayed / real - 1) in per cent of each statistic."""
    result = {}
    for name in METRICS:
        ours, theirs = summary(getattr(replayed, name)), summary(getattr(real, name))
        result[name] = {key: 100 * (ours[key] / theirs[key] - 1) for key in STATISTICS}
    return result


def per_request_mape(replayed: Latencies, real: Latencies) -> dict[str, float]:
    """Mean over requests of |replayed - real| / real in per cent; requests whose real value is 0 are left out."""
    result = {}
    for name in METRICS:
        ours, theirs = getattr(replayed, name), getattr(real, name)
        known = theirs > 0
        result[name] = float(np.mean(np.abs(ours[known] - theirs[known]) / theirs[known]) * 100)
    return result
