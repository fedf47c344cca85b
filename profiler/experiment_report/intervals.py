"""Statistics of an arm and differences of two, with intervals from a cluster bootstrap.

Requests of one engine wait for each other, so they are no independent draws: what is resampled are clusters. These are
engines where every arm has at least LEAST_ENGINES of them, else stretches of consecutive requests of each engine.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from profiler.experiment_report.runs import Cluster, EngineRun

CONFIDENCE: Final = 0.95
RESAMPLES: Final = 4000
LEAST_ENGINES: Final = 5
# Stretches per engine: long enough that what happens in one hardly reaches the next, many enough to resample.
MOST_BLOCKS: Final = 20
LEAST_PER_BLOCK: Final = 5


@dataclass(frozen=True)
class Metric:
    """One figure of an arm; `percentile` None: the mean. `tokens` is the rate of output tokens of one engine."""

    name: str
    of: str
    percentile: float | None = None

    @property
    def unit(self) -> str:
        return "tokens/s" if self.of == "tokens" else "ms"


METRICS: Final = (
    Metric("TTFT mean", "ttft"),
    Metric("TTFT p50", "ttft", 50),
    Metric("TTFT p99", "ttft", 99),
    Metric("TPOT mean", "tpot"),
    Metric("TPOT p50", "tpot", 50),
    Metric("TPOT p99", "tpot", 99),
    Metric("E2E mean", "e2e"),
    Metric("output tokens/s per engine", "tokens"),
)


@dataclass(frozen=True)
class Estimate:
    """A figure and its 95 % interval; NaN where there is nothing to resample."""

    value: float
    low: float
    high: float


def clusters_of(arms: Sequence[Sequence[EngineRun]]) -> tuple[list[list[Cluster]], str]:
    """(The clusters of each arm, what they are)."""
    if min(len(runs) for runs in arms) >= LEAST_ENGINES:
        return [[run.whole() for run in runs] for runs in arms], "engines"
    stretches = [
        [block for run in runs for block in run.blocks(min(MOST_BLOCKS, max(1, len(run.ttft) // LEAST_PER_BLOCK)))]
        for runs in arms
    ]
    return stretches, "stretches of consecutive requests"


def estimate(clusters: Sequence[Cluster], metric: Metric, *, resamples: int = RESAMPLES, seed: int = 0) -> Estimate:
    """A figure of one arm."""
    value_of = _statistic(clusters, metric)
    return _bootstrap((len(clusters),), value_of, resamples, seed)


def difference(
    baseline: Sequence[Cluster],
    other: Sequence[Cluster],
    metric: Metric,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Estimate:
    """By how many percent a figure of the other arm is above that of the baseline."""
    before, after = _statistic(baseline, metric), _statistic(other, metric)

    def relative(first: NDArray[np.int64], second: NDArray[np.int64]) -> float:
        return 100 * (after(second) / before(first) - 1)

    return _bootstrap((len(baseline), len(other)), relative, resamples, seed)


def _statistic(clusters: Sequence[Cluster], metric: Metric) -> Callable[[NDArray[np.int64]], float]:
    """The figure as a function of which clusters are taken."""
    if metric.of == "tokens":
        pairs = np.array([(cluster.tokens, cluster.seconds) for cluster in clusters], dtype=np.float64)
    elif metric.percentile is None:
        values = [getattr(cluster, metric.of) for cluster in clusters]
        pairs = np.array([(each.sum(), each.size) for each in values], dtype=np.float64)
    else:
        arrays, percentile = [getattr(cluster, metric.of) for cluster in clusters], metric.percentile

        def quantile(taken: NDArray[np.int64]) -> float:
            pooled = np.concatenate([arrays[i] for i in taken])
            return float(np.percentile(pooled, percentile)) if pooled.size else math.nan

        return quantile

    def ratio(taken: NDArray[np.int64]) -> float:
        over, under = pairs[taken].sum(axis=0)
        return float(over / under) if under else math.nan

    return ratio


def _bootstrap(sizes: tuple[int, ...], value_of: Callable[..., float], resamples: int, seed: int) -> Estimate:
    from scipy import stats

    everything = [np.arange(size) for size in sizes]
    value = value_of(*everything)
    least = min(sizes)
    if least < 2 or not math.isfinite(value):
        return Estimate(value, math.nan, math.nan)

    def finite(*taken: Any) -> float:
        # A resample without any request that has the figure says nothing about it.
        drawn = value_of(*taken)
        return drawn if math.isfinite(drawn) else value

    found = stats.bootstrap(
        everything,
        finite,
        vectorized=False,
        method="percentile",
        n_resamples=resamples,
        confidence_level=_expanded(least),
        random_state=np.random.default_rng(seed),
    ).confidence_interval
    return Estimate(value, float(found.low), float(found.high))


def _expanded(size: int) -> float:
    """The level at which a percentile interval of `size` clusters is as wide as one of Student's t.

    Hesterberg, What Teachers Should Know About the Bootstrap (The American Statistician 69, 2015), section 5.3, the
    expanded percentile interval: resampling n clusters makes the spread smaller by sqrt((n - 1) / n), and with few of
    them its quantiles are those of a normal distribution where t has heavier tails.
    """
    from scipy import stats

    quantile = stats.t.ppf((1 + CONFIDENCE) / 2, size - 1) * math.sqrt(size / (size - 1))
    return float(2 * stats.norm.cdf(quantile) - 1)
