"""Real beside emulated: errors, and the noise of the real engine they have to be seen against."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from deploy.closed_loop.workloads import Workload

# Name, key in the result of `vllm bench serve`, what it has to be within (percent; None: told only).
METRICS: Sequence[tuple[str, str, float | None]] = (
    *(
        (f"{label} {statistic}", f"{statistic.lower()}_{key}_ms", bound if statistic == "mean" else None)
        for label, key, bound in (
            ("TTFT", "ttft", 4.0),
            ("TPOT", "tpot", 2.5),
            ("ITL", "itl", 2.5),
            ("E2E", "e2el", 2.5),
        )
        for statistic in ("mean", "P50", "P90", "P99")
    ),
    ("output tokens/s", "output_throughput", 1.5),
)
# LLM-Emu's per_rate_deltas.csv, column by column; the workload's name and the plan's minutes come behind them.
DELTAS = {
    "ttft_mean_pct": "mean_ttft_ms",
    "tpot_mean_pct": "mean_tpot_ms",
    "itl_mean_pct": "mean_itl_ms",
    "e2e_mean_pct": "mean_e2el_ms",
    "tps_pct": "output_throughput",
}
COLUMNS = 170


@dataclass(frozen=True)
class Figure:
    """One metric of one workload: both sides' runs by repeat, milliseconds or tokens per second."""

    metric: str
    key: str
    real: tuple[float, ...]
    emulated: tuple[float, ...]
    bound_percent: float | None

    @property
    def real_mean(self) -> float:
        return sum(self.real) / len(self.real)

    @property
    def error_percent(self) -> float:
        """Mean of the emulated runs against the mean of the real ones."""
        return 100 * (sum(self.emulated) / len(self.emulated) / self.real_mean - 1)

    @property
    def noise_percent(self) -> float:
        """Largest distance of a real run from the mean of the real ones."""
        return max(abs(100 * (value / self.real_mean - 1)) for value in self.real)

    @property
    def interval_percent(self) -> tuple[float, float] | None:
        """95 % interval of the error: Student's, of the logarithms of emulated over real runs of one repeat, both
        of the same minutes.

        None of fewer than two repeats or of one whose runs are not two, of repeats that do not differ, and where one
        has no logarithm.
        """
        from scipy.stats import ttest_1samp

        if min(*self.real, *self.emulated) <= 0 or len(self.real) != len(self.emulated):
            return None
        ratios = np.log(self.emulated) - np.log(self.real)
        if len(set(ratios.tolist())) < 2:
            return None
        found = ttest_1samp(ratios, 0.0).confidence_interval(0.95)
        return 100 * (math.exp(found.low) - 1), 100 * (math.exp(found.high) - 1)

    @property
    def is_within(self) -> bool:
        return self.bound_percent is None or abs(self.error_percent) <= self.bound_percent

    @property
    def is_decided(self) -> bool:
        """False: it is beyond its bound, and the runs differ by so much that it need not be."""
        if self.is_within or self.bound_percent is None or (interval := self.interval_percent) is None:
            return True
        return interval[0] > self.bound_percent or interval[1] < -self.bound_percent


@dataclass(frozen=True)
class Comparison:
    """All figures of one workload, emulated from the pack of a plan of so many minutes."""

    workload: Workload
    requests: int
    figures: tuple[Figure, ...]
    plan_minutes: float

    def figure(self, key: str) -> Figure:
        return next(figure for figure in self.figures if figure.key == key)


def compare(
    workload: Workload, real: Sequence[Mapping[str, Any]], emulated: Sequence[Mapping[str, Any]], plan_minutes: float
) -> Comparison:
    """From results of `vllm bench serve`, one per run."""
    figures = tuple(
        Figure(name, key, tuple(float(run[key]) for run in real), tuple(float(run[key]) for run in emulated), bound)
        for name, key, bound in METRICS
    )
    return Comparison(workload, int(real[0]["completed"]), figures, plan_minutes)


def print_comparisons(comparisons: Sequence[Comparison]) -> None:
    """A row per metric, three columns per workload: real, its noise, error of the emulated runs."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    table.add_column("ms" if comparisons else "")
    for comparison in comparisons:
        table.add_column(f"{comparison.workload.name}\nreal", justify="right", no_wrap=True)
        table.add_column("\n± real %", justify="right", no_wrap=True)
        table.add_column("\nemulated %", justify="right", no_wrap=True)
    for place, (name, _, _) in enumerate(METRICS):
        row = [name]
        for comparison in comparisons:
            figure = comparison.figures[place]
            mark = "" if figure.is_within else " *" if figure.is_decided else " ?"
            row += [f"{figure.real_mean:.2f}", f"{figure.noise_percent:.1f}", f"{figure.error_percent:+.1f}{mark}"]
        table.add_row(*row)
    Console(width=COLUMNS, markup=False, highlight=False).print(table)
    print("± real: the real run farthest from the mean of the real runs; emulated: mean against that mean; *: beyond")
    print(
        "the bound of a mean (TTFT 4 %, TPOT, ITL and E2E 2.5 %, throughput 1.5 %); ?: beyond it, but the runs differ"
    )
    print("by so much among themselves that the 95 % interval of the error reaches into the bound")


def verdict(comparisons: Sequence[Comparison], of: str = "") -> list[str]:
    """How many means are farther away than they have to be, and a sentence for each; `of`: which plan, of several."""
    beyond = [
        (comparison, figure) for comparison in comparisons for figure in comparison.figures if not figure.is_within
    ]
    undecided = sum(not figure.is_decided for _, figure in beyond)
    told = f"{len(beyond)} of {5 * len(comparisons)} means are beyond their bound{of}"
    if undecided:
        told += f", {undecided} of them undecided: these runs differ by more among themselves"
    return [told + (":" if beyond else ""), *(f"  {_told(*each)}" for each in beyond)]


def _told(comparison: Comparison, figure: Figure) -> str:
    interval = figure.interval_percent
    between = f", {interval[0]:+.1f} to {interval[1]:+.1f}" if interval else ""
    undecided = "" if figure.is_decided else "; undecided"
    return (
        f"{comparison.workload.name}: {figure.metric} {figure.error_percent:+.1f} %{between} "
        f"(bound {figure.bound_percent:g} %, real runs ±{figure.noise_percent:.1f} %){undecided}"
    )


def write_deltas(path: Path, comparisons: Iterable[Comparison]) -> None:
    """The means' errors as LLM-Emu's per_rate_deltas.csv has them; a closed loop has the rate inf."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["rate", *DELTAS, "workload", "plan_minutes"])
        for comparison in comparisons:
            rate = comparison.workload.rate
            errors = [f"{comparison.figure(key).error_percent:.2f}" for key in DELTAS.values()]
            told = "inf" if math.isinf(rate) else f"{rate:.3g}"
            writer.writerow([told, *errors, comparison.workload.name, f"{comparison.plan_minutes:g}"])


def as_json(comparisons: Iterable[Comparison]) -> list[dict[str, Any]]:
    """Every run of every metric, and what is worked out of them."""
    return [
        {
            "workload": {**asdict(comparison.workload), "rate": f"{comparison.workload.rate:.4g}"},
            "plan_minutes": comparison.plan_minutes,
            "requests": comparison.requests,
            "figures": [
                {
                    **asdict(figure),
                    "real_mean": figure.real_mean,
                    "error_percent": figure.error_percent,
                    "noise_percent": figure.noise_percent,
                    "interval_percent": figure.interval_percent,
                }
                for figure in comparison.figures
            ],
        }
        for comparison in comparisons
    ]
