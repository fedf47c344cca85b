"""The pictures of a report, each a pure function of its data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from oracle_server.errors import FailedPrecondition
from oracle_server.sampling.answer import SUPPORT_EXACT, SUPPORT_EXTRAPOLATED, SUPPORT_INTERPOLATED
from profiler.report.judged import JudgedSteps, RegionError
from profiler.report.measurements import METRICS, Measurement
from profiler.report.plan_progress import PlanProgress

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Distinguishable without color vision: blue, orange, and a third by its shape too.
_REAL, _OURS, _MISSED, _GREY = "#202020", "#2a788e", "#d1332e", "#666666"
_SUPPORT: Final = (
    (SUPPORT_EXACT, "exact", "#2a788e", "o"),
    (SUPPORT_INTERPOLATED, "interpolated", "#e08214", "s"),
    (SUPPORT_EXTRAPOLATED, "extrapolated: a hole", "#d1332e", "x"),
)
_DPI: Final = 110
# A region of fewer steps does not widen the axis of errors.
_FEW_STEPS: Final = 10
_SECONDS_FROM_MS: Final = 10_000


def coverage_figure(judged: JudgedSteps) -> Figure:
    """Where the measured steps lie and how well the pack backs them."""
    figure, (decode, prefill) = _figure(1, 2, height=4.6)
    rows = judged.mixed
    points = [
        (decode, ~rows, "Decode steps", "mean context tokens", "decode requests", _decode_point),
        (
            prefill,
            rows,
            "Steps with prefill work",
            "context tokens before the chunks",
            "prefill tokens",
            _prefill_point,
        ),
    ]
    for axes, among, title, x_name, y_name, point in points:
        where = np.array([point(query) for query in judged.queries], dtype=np.float64).reshape(-1, 2)
        for support, label, color, marker in _SUPPORT:
            chosen = among & (judged.support == support)
            if chosen.any():
                name = f"{label} ({int(chosen.sum())})"
                axes.scatter(
                    where[chosen, 0],
                    where[chosen, 1],
                    s=16,
                    c=color,
                    marker=marker,
                    alpha=0.6,
                    label=name,
                    linewidths=1,
                )
        _powers_of_two(axes, where[among])
        axes.set(title=title, xlabel=x_name, ylabel=y_name)
        if among.any():
            axes.legend(fontsize=8, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=3)
        else:
            _empty(axes)
    return figure


def error_figure(errors: Sequence[RegionError]) -> Figure:
    """Bias and the middle 90 % of errors of each region."""
    figure, (axes,) = _figure(1, 1, height=1.3 + 0.27 * len(errors))
    places = np.arange(len(errors))[::-1]
    low, high = _error_window(errors)
    for place, error in zip(places, errors, strict=True):
        color = _MISSED if error.extrapolated > 50 else _OURS
        axes.plot((error.low, error.high), (place, place), color=_OURS, linewidth=3, alpha=0.35, solid_capstyle="butt")
        marker = "<" if error.bias < low else ">" if error.bias > high else "o"
        axes.plot(np.clip(error.bias, low, high), place, marker=marker, color=color, markersize=6, clip_on=False)
        steps = f"{error.steps} step{'' if error.steps == 1 else 's'}"
        axes.annotate(
            f"{steps}, bias {error.bias:+.1f} %, mean absolute {error.mape:.1f} %",
            (1.02, place),
            xycoords=("axes fraction", "data"),
            fontsize=8,
            color=_GREY,
            va="center",
            annotation_clip=False,
        )
    axes.set_xlim(low, high)
    axes.axvline(0, color=_REAL, linewidth=0.8)
    axes.set_yticks(places, [error.region for error in errors], fontsize=8)
    axes.set_xlabel("answer beside measured step, percent: bias of the summed time (dot), middle 90 % of steps (bar)")
    red = " (red: mostly extrapolated)" if any(error.extrapolated > 50 for error in errors) else ""
    axes.set_title(f"Error by region{red}")
    axes.grid(axis="x", color="#e5e5e5", linewidth=0.6)
    axes.set_axisbelow(True)
    return figure


def _error_window(errors: Sequence[RegionError]) -> tuple[float, float]:
    """Wide enough for every region with ten steps or more; what lies beyond is an arrow at the edge."""
    shown = [error for error in errors if error.steps >= _FEW_STEPS] or list(errors)
    low, high = min(min(error.low, error.bias) for error in shown), max(max(error.high, error.bias) for error in shown)
    margin = 0.05 * (high - low) + 0.5
    return min(low, 0.0) - margin, max(high, 0.0) + margin


def tail_figure(judged: JudgedSteps) -> Figure:
    """How often a step takes more than so many times what is expected of it: measured, and as the pack draws."""
    figure, panels = _figure(1, 2, height=4.2)
    rows = judged.mixed
    for axes, among, title in zip(panels, (~rows, rows), ("Decode steps", "Steps with prefill work"), strict=True):
        axes.set(title=title, xlabel="latency / expected latency", ylabel="share of steps above")
        if not among.any():
            _empty(axes)
            continue
        measured = judged.truth_ns[among] / judged.expected_ns[among]
        for values, label, color, style in (
            (measured, f"measured ({len(measured)} steps)", _REAL, "-"),
            (judged.drawn[among].ravel(), "drawn by the pack", _OURS, "--"),
        ):
            ordered = np.sort(values)
            share = 1 - np.arange(len(ordered)) / len(ordered)
            axes.step(ordered, share, where="post", color=color, linestyle=style, label=label, linewidth=1.4)
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(_formatter(lambda value: f"{100 * value:g} %"))
        axes.set_xlim(*_window(measured))
        axes.set_ylim(0.5 / len(measured), 1.3)
        axes.axvline(1, color="#bbbbbb", linewidth=0.8, zorder=0)
        axes.legend(fontsize=8, frameon=False)
    return figure


def plan_figure(plans: Sequence[PlanProgress]) -> Figure:
    """Regions known and measured over the minutes of a plan, its runs one behind the other."""
    figure, (axes,) = _figure(1, 1, height=4.2)
    begin = 0.0
    for number, plan in enumerate(plans):
        minutes = [begin + point[0] for point in plan.points]
        for place, label, color, style in ((1, "known to the target", _OURS, "-"), (2, "measured", _REAL, "--")):
            known = [point[place] for point in plan.points]
            name = label if number == 0 else None
            axes.step(minutes, known, where="post", color=color, linestyle=style, label=name, linewidth=1.5)
        begin = minutes[-1]
        if number < len(plans) - 1:
            axes.axvline(begin, color="#bbbbbb", linewidth=0.8)
    axes.axhline(plans[-1].regions, color=_GREY, linewidth=0.8, linestyle=":", label="in the plan")
    axes.set(title="Regions of the plan", xlabel="minutes of visits", ylabel="regions", ylim=(0, None), xlim=(0, None))
    # Beside the axes: curves may be anywhere within them.
    axes.legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def cdf_figure(real: Measurement, emulated: Measurement) -> Figure:
    """Cumulative distributions of what clients saw, laid over one another."""
    metrics = [metric for metric in METRICS if metric in real.values and metric in emulated.values]
    figure, panels = _figure(1, len(metrics), height=3.9)
    for axes, metric in zip(panels, metrics, strict=True):
        both = np.concatenate([real.values[metric], emulated.values[metric]])
        end = float(np.percentile(both, 99.5)) * 1.05 or 1.0
        unit, scale = ("seconds", 1e-3) if end >= _SECONDS_FROM_MS else ("milliseconds", 1.0)
        for measurement, label, color, style in ((real, "real", _REAL, "-"), (emulated, "emulated", _OURS, "--")):
            ordered = np.sort(measurement.values[metric]) * scale
            share = np.arange(1, len(ordered) + 1) / len(ordered)
            axes.step(ordered, share, where="post", color=color, linestyle=style, label=label, linewidth=1.5)
        axes.set(title=metric.upper(), xlabel=unit, xlim=(0, end * scale), ylim=(0, 1.02))
        axes.grid(color="#eeeeee", linewidth=0.6)
    panels[0].set_ylabel("share of requests (ITL: of gaps)")
    panels[0].legend(frameon=False, fontsize=9, loc="lower right")
    return figure


def _figure(rows: int, columns: int, *, height: float) -> tuple[Figure, list[Axes]]:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise FailedPrecondition("a report needs matplotlib: pip install 'step-oracle[profiler]'") from error
    figure = Figure(figsize=(12.5, height), dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    axes = [figure.add_subplot(rows, columns, number + 1) for number in range(rows * columns)]
    for one in axes:
        one.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _decode_point(query: Any) -> tuple[float, float]:
    requests = max(1, query.num_decode_requests)
    return query.decode_context_tokens / requests, query.num_decode_requests


def _prefill_point(query: Any) -> tuple[float, float]:
    return sum(query.chunk_context), sum(query.chunk_tokens)


def _powers_of_two(axes: Axes, points: NDArray[np.float64]) -> None:
    """Logarithmic axes around the points, labelled in powers of two; a 0 has its place left of the smallest count."""
    if not len(points):
        return
    for axis, values, set_scale, set_limits in (
        (axes.xaxis, points[:, 0], axes.set_xscale, axes.set_xlim),
        (axes.yaxis, points[:, 1], axes.set_yscale, axes.set_ylim),
    ):
        counts = values[values > 0]
        low, high = (float(counts.min()), float(counts.max())) if counts.size else (1.0, 1.0)
        first, last = int(np.floor(np.log2(low))), int(np.ceil(np.log2(high)))
        ticks = [2.0**power for power in range(first, last + 1, max(1, -(-(last - first) // 8)))]
        if (values == 0).any():
            set_scale("symlog", base=2, linthresh=ticks[0], linscale=0.5)
            set_limits(-0.3 * ticks[0], high * 1.3)
            ticks = [0.0, *ticks]
        else:
            set_scale("log", base=2)
            set_limits(low / 1.3, high * 1.3)
        axis.set_ticks(ticks)
        axis.set_major_formatter(_formatter(_count))
        axes.minorticks_off()


def _formatter(told: Callable[[float], str]) -> Any:
    from matplotlib.ticker import FuncFormatter

    return FuncFormatter(lambda value, _: told(value))


def _count(value: float) -> str:
    return f"{value / 1024:.0f}k" if value >= 1024 else f"{value:.0f}"


def _window(ratios: NDArray[np.float64]) -> tuple[float, float]:
    """All of the bulk, and of a long tail as much as leaves the bulk readable."""
    low, high = float(np.percentile(ratios, 0.1)), float(ratios.max())
    return min(0.9, low * 0.95), min(max(1.1, high * 1.03), max(2.0, 3 * float(np.percentile(ratios, 99))))


def _empty(axes: Axes) -> None:
    axes.text(0.5, 0.5, "no such step", transform=axes.transAxes, ha="center", color=_GREY)
    axes.set_xticks([])
    axes.set_yticks([])
