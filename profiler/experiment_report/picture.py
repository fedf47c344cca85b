"""The report as one picture: distributions of every arm, and the differences to the first with their intervals."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np

from oracle_server.errors import FailedPrecondition
from profiler.experiment_report.intervals import CONFIDENCE, METRICS
from profiler.experiment_report.report import ArmFigures, ExperimentReport

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito: distinguishable without color vision. More arms than colors go round.
_COLORS: Final = ("#202020", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00")
_LINES: Final = ("-", "--", "-.", ":")
_GREY: Final = "#666666"


def draw_report(report: ExperimentReport, path: Path) -> None:
    """Write a PNG."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise FailedPrecondition("--png needs matplotlib: pip install 'step-oracle[profiler]'") from error
    # The object interface keeps no global figure and needs no display.
    figure = Figure(figsize=(15, 5.8 + 0.24 * len(report.arms)), dpi=110)
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(1, 3, width_ratios=(1, 1, 1.25))
    _distributions(figure.add_subplot(grid[0]), report, "ttft", "TTFT, ms")
    _distributions(figure.add_subplot(grid[1]), report, "tpot", "TPOT, ms")
    last = figure.add_subplot(grid[2])
    if len(report.arms) > 1:
        _differences(last, report)
    else:
        last.text(0.5, 0.5, "one arm: nothing to compare", ha="center", va="center", color=_GREY)
        last.set_axis_off()
    # Of the line that says what the first arm is; the others stand below it.
    below = 0.03 + 0.045 * (len(report.arms) - 1)
    figure.subplots_adjust(left=0.05, right=0.985, top=0.86, bottom=below + 0.16, wspace=0.34)
    figure.text(0.05, 0.94, _title(report), fontsize=14, weight="bold", parse_math=False)
    figure.text(0.05, 0.895, _subtitle(report), fontsize=9, color=_GREY, parse_math=False)
    for number, each in enumerate(report.arms):
        place = below - 0.045 * number
        figure.text(0.05, place, "━━", color=_color(number), fontsize=9)
        figure.text(0.072, place, _line(each), fontsize=9, color="#303030", parse_math=False)
    figure.savefig(path, format="png")


def _distributions(axes: Axes, report: ExperimentReport, of: str, name: str) -> None:
    for number, each in enumerate(report.arms):
        values = np.sort(np.concatenate([getattr(run.whole(), of) for run in each.arm.runs]))
        if values.size:
            shares = np.arange(1, values.size + 1) / values.size
            axes.step(values, shares, where="post", color=_color(number), linestyle=_LINES[number % 4], linewidth=1.6)
    axes.set(xlabel=name, ylabel="share of requests", ylim=(0, 1))
    axes.grid(color="#e6e6e6", linewidth=0.6)
    # A long tail would leave no room for the rest.
    every = np.concatenate([getattr(run.whole(), of) for each in report.arms for run in each.arm.runs])
    if every.size:
        axes.set_xlim(left=0, right=float(np.percentile(every, 99.5)) * 1.05)


def _differences(axes: Axes, report: ExperimentReport) -> None:
    others = list(enumerate(report.arms))[1:]
    places = np.arange(len(METRICS))[::-1]
    axes.axvline(0, color=_COLORS[0], linewidth=1)
    for order, (number, each) in enumerate(others):
        shift = 0.5 * ((len(others) - 1) / 2 - order) / max(1, len(others))
        for place, metric in zip(places, METRICS, strict=True):
            found = each.differences[metric]
            if not np.isfinite(found.value):
                continue
            if np.isfinite(found.low):
                axes.plot((found.low, found.high), (place + shift,) * 2, color=_color(number), linewidth=2.2)
            axes.plot(found.value, place + shift, "o", color=_color(number), markersize=5)
            if len(others) == 1:
                label = f"{found.value:+.1f}"
                axes.annotate(label, (found.value, place), (0, 6), textcoords="offset points", ha="center", fontsize=8)
    axes.set_yticks(places, [metric.name.replace(" per", "\nper") for metric in METRICS], fontsize=9)
    axes.set_ylim(-0.6, len(METRICS) - 0.4)
    axes.set_xlabel(f"difference to {report.arms[0].arm.name}, %", parse_math=False)
    axes.grid(axis="x", color="#e6e6e6", linewidth=0.6)
    axes.margins(x=0.12)


def _title(report: ExperimentReport) -> str:
    return f"{report.fleet.experiment.rpartition('/')[2]}: {len(report.arms)} arms by {report.by}"


def _subtitle(report: ExperimentReport) -> str:
    return (
        f"{report.fleet.experiment}, generation {report.fleet.generation}   |   intervals: {100 * CONFIDENCE:.0f} %, "
        f"bootstrap of {report.resampled}"
    )


def _line(each: ArmFigures) -> str:
    arm = each.arm
    share = "no steps" if not arm.steps else f"{arm.steps:,} steps, {100 * arm.extrapolated_share:.2f} % extrapolated"
    requests = sum(len(run.ttft) for run in arm.runs)
    return f"{arm.name}: {len(arm.engines)} engines, {requests:,} requests, {share}"


def _color(number: int) -> str:
    return _COLORS[number % len(_COLORS)]
