"""Statistics of an arm and differences of two, with intervals from a cluster bootstrap.

Requests of one engine wait for each other, so they are no independent draws: what is resampled are clusters. These are
engines where every arm has at least LEAST_ENGINES of them, else stretches of consecutive requests of each engine.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from profiler.experiment_report.runs import Cluster, EngineRun, Floats

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

    def relative(first: NDArray[np.int64], second: NDArray[np.int64]) -> Floats:
        percent: Floats = 100 * (after(second) / before(first) - 1)
        return percent

    return _bootstrap((len(baseline), len(other)), relative, resamples, seed)


def _statistic(clusters: Sequence[Cluster], metric: Metric) -> Callable[[NDArray[np.int64]], Floats]:
    """The figure (...) as a function of which clusters are taken (..., clusters); NaN where none of them has it."""
    if metric.of == "tokens":
        pairs = np.array([(cluster.tokens, cluster.seconds) for cluster in clusters], dtype=np.float64)
    elif metric.percentile is None:
        values = [getattr(cluster, metric.of) for cluster in clusters]
        pairs = np.array([(each.sum(), each.size) for each in values], dtype=np.float64)
    else:
        return _percentile([getattr(cluster, metric.of) for cluster in clusters], metric.percentile)

    def ratio(taken: NDArray[np.int64]) -> Floats:
        over, under = np.moveaxis(pairs[taken].sum(axis=-2), -1, 0)
        found: Floats = np.divide(over, under, out=np.full_like(over, np.nan), where=under > 0)
        return found

    return ratio


def _percentile(clusters: Sequence[Floats], percentile: float) -> Callable[[NDArray[np.int64]], Floats]:
    """numpy's percentile of the pooled values of the clusters taken, without pooling and sorting them each time.

    All values are sorted once; a cluster taken k times makes each of its values count k times. Values are looked up by
    their rank in two steps, the stretch of the sorted values and the place in it, so that a resample costs the square
    root of their number.
    """
    pooled = np.concatenate(clusters)
    order = np.argsort(pooled, kind="stable")
    stretch = max(1, math.isqrt(pooled.size))
    stretches = -(-pooled.size // stretch)
    # What fills the last stretch is of a cluster that is never taken.
    cluster_of = np.full((stretches, stretch), len(clusters))
    cluster_of.flat[: pooled.size] = np.repeat(np.arange(len(clusters)), [each.size for each in clusters])[order]
    ascending = pooled[order]
    # (clusters, stretches): how many values of a cluster are in a stretch.
    held = np.array([np.bincount(each, minlength=len(clusters) + 1) for each in cluster_of], dtype=np.float64).T

    def quantiles(taken: NDArray[np.int64]) -> Floats:
        rows = np.arange(len(taken))
        flat = taken + (len(clusters) + 1) * rows[:, None]
        times = np.bincount(flat.ravel(), minlength=len(taken) * (len(clusters) + 1)).reshape(len(taken), -1)
        reach = np.cumsum(times @ held, axis=1).astype(np.int64)
        total = reach[:, -1]

        def at(rank: NDArray[np.int64]) -> Floats:
            where = np.minimum((reach <= rank[:, None]).sum(axis=1), stretches - 1)
            before = np.where(where > 0, reach[rows, where - 1], 0)
            inside = before[:, None] + np.cumsum(times[rows[:, None], cluster_of[where]], axis=1)
            place = where * stretch + (inside <= rank[:, None]).sum(axis=1)
            found: Floats = ascending[np.minimum(place, ascending.size - 1)]
            return found

        last = np.maximum(total - 1, 0)
        rank = last * (percentile / 100)
        below = np.floor(rank).astype(np.int64)
        low, high = at(below), at(np.minimum(below + 1, last))
        return np.where(total > 0, low + (high - low) * (rank - below), np.nan)

    def of(taken: NDArray[np.int64]) -> Floats:
        if not pooled.size:
            return np.full(taken.shape[:-1], np.nan)
        return quantiles(taken.reshape(-1, taken.shape[-1])).reshape(taken.shape[:-1])

    return of


def _bootstrap(sizes: tuple[int, ...], values_of: Callable[..., Floats], resamples: int, seed: int) -> Estimate:
    from scipy import stats

    everything = [np.arange(size) for size in sizes]
    value = float(values_of(*everything))
    least = min(sizes)
    if least < 2 or not math.isfinite(value):
        return Estimate(value, math.nan, math.nan)

    def finite(*taken: NDArray[np.int64], axis: int) -> Floats:  # noqa: ARG001
        # A resample without any request that has the figure says nothing about it.
        drawn = values_of(*taken)
        return np.where(np.isfinite(drawn), drawn, value)

    found = stats.bootstrap(
        everything,
        finite,
        vectorized=True,
        axis=-1,
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
