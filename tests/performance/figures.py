"""The figures as one picture."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

Figures = dict[str, Any]
_OURS, _OTHERS = "#1f6f8b", "#b0b0b0"
_OUR_KERNELS = ("sampled", "composed", "hybrid", "the kernel of sampled alone")
_WITHOUT, _WITH = "#c8553d", "#1f6f8b"


def draw(figures: Figures, path: Path) -> None:
    """One panel per section that was measured and has one; no picture where there is none."""
    panels = [panel for panel in _PANELS if panel[0] in figures]
    if not panels:
        return
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(7.6 * columns, 4.4 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False)
    for at, axis in enumerate(axes.flat):
        if at < len(panels):
            section, paint = panels[at]
            paint(axis, figures[section])
        else:
            axis.set_visible(False)
    machine = figures["machine"]
    figure.suptitle(
        f"{machine['cpu']}, {machine['cores']} cores, load {machine['load_average_before']:.1f} before; "
        f"bars: median, lines: range of the rounds{', short run' if figures['quick'] else ''}",
        fontsize=9,
    )
    figure.savefig(path, dpi=110)


def _cpu_per_step(axis: Axes, figures: Figures) -> None:
    _bars(axis, figures["batch"]["us_per_step"], lambda name: name.startswith("our streams"), "{:,.1f}")
    axis.set_xlabel("us of server CPU per step, SCHED_BATCH")
    axis.set_title(f"CPU per step, {figures['mixed_share']:.0%} mixed steps, 64 busy connections", fontsize=10)


def _core(axis: Axes, figures: Figures) -> None:
    for kind, colour in (("without_leases", _WITHOUT), ("with_leases", _WITH)):
        rows = figures[kind]
        engines = [row["engines"] for row in rows]
        axis.plot(engines, [row["core"] for row in rows], "o-", color=colour, label=kind.replace("_", " "))
        _cross_out(axis, rows, "core", colour)
    axis.axhline(0.7, color="black", linewidth=0.8, linestyle=":")
    axis.annotate("0.7", (axis.get_xlim()[0], 0.7), fontsize=8, va="bottom")
    axis.set_xlabel("engines of 50 steps/s")
    axis.set_ylabel("cores the server uses")
    axis.set_ylim(0, 1.15)
    axis.legend(loc="lower right", fontsize=8)
    axis.set_title("Paced engines: core use (crossed: cannot keep up)", fontsize=10)


def _answer_time(axis: Axes, figures: Figures) -> None:
    for kind, colour in (("without_leases", _WITHOUT), ("with_leases", _WITH)):
        rows = figures[kind]
        engines = [row["engines"] for row in rows]
        label = kind.replace("_", " ")
        axis.plot(engines, [row["p99_ms"] for row in rows], "o-", color=colour, label=f"p99 {label}")
        axis.plot(engines, [row["p50_ms"] for row in rows], "o--", color=colour, alpha=0.5, label=f"p50 {label}")
        _cross_out(axis, rows, "p99_ms", colour)
    axis.axhline(5, color="black", linewidth=0.8, linestyle=":")
    axis.annotate("5 ms", (axis.get_xlim()[0], 5), fontsize=8, va="bottom")
    axis.set_yscale("log")
    axis.set_xlabel("engines of 50 steps/s")
    axis.set_ylabel("ms from due to answered")
    axis.legend(loc="lower right", fontsize=8)
    axis.set_title("Paced engines: answer time, generator included", fontsize=10)


def _kernels(axis: Axes, figures: Figures) -> None:
    _bars(axis, figures["single_ns"], lambda name: name.split(",")[0] in _OUR_KERNELS, "{:,.0f}")
    axis.set_xlabel("ns of CPU per call")
    axis.set_title("Kernels, one call from Python (libraries: neighbours alone, no draw)", fontsize=10)


def _growth(axis: Axes, figures: Figures) -> None:
    _bars(axis, figures["us_per_message"], lambda name: True, "{:,.0f}", log=False)
    axis.set_xlabel("us of server CPU per message")
    axis.set_title("What a message costs as things grow, no leases", fontsize=10)


def _hot_swap(axis: Axes, figures: Figures) -> None:
    pairs = figures["p99_ms_of_pairs"]
    axis.scatter(pairs["without"], pairs["with"], color=_OURS)
    limit = 1.15 * max(pairs["without"] + pairs["with"])
    axis.plot([0, limit], [0, limit], color="black", linewidth=0.8, linestyle=":")
    axis.set_xlim(0, limit)
    axis.set_ylim(0, limit)
    low, high = figures["ratio_interval"]
    axis.set_xlabel("p99 answer time without swaps, ms")
    axis.set_ylabel("with swaps, ms")
    axis.set_title(
        f"Hot swap under load: pairs; ratio of medians {figures['ratio']:.2f} ({low:.2f} to {high:.2f})", fontsize=10
    )


def _bars(
    axis: Axes, values: dict[str, Figures], is_ours: Callable[[str], bool], form: str, *, log: bool = True
) -> None:
    names = list(values)
    places = range(len(names))
    medians = [values[name]["median"] for name in names]
    below = [values[name]["median"] - values[name]["low"] for name in names]
    above = [values[name]["high"] - values[name]["median"] for name in names]
    colours = [_OURS if is_ours(name) else _OTHERS for name in names]
    axis.barh(places, medians, xerr=[below, above], color=colours, error_kw={"linewidth": 0.8})
    axis.set_yticks(places, names, fontsize=7)
    axis.invert_yaxis()
    if log:
        axis.set_xscale("log")
        axis.set_xlim(right=6 * max(value["high"] for value in values.values()))
    else:
        axis.set_xlim(right=1.2 * max(value["high"] for value in values.values()))
    for place, name in zip(places, names, strict=True):
        text, end = form.format(values[name]["median"]), (values[name]["high"], place)
        axis.annotate(text, end, (3, 0), textcoords="offset points", va="center", fontsize=7)


def _cross_out(axis: Axes, rows: list[Figures], name: str, colour: str) -> None:
    broken = [row for row in rows if row["broken"]]
    axis.plot([row["engines"] for row in broken], [row[name] for row in broken], "x", color=colour, markersize=14)


_PANELS: list[tuple[str, Callable[[Axes, Figures], None]]] = [
    ("cpu_per_step", _cpu_per_step),
    ("kernels", _kernels),
    ("paced_engines", _core),
    ("paced_engines", _answer_time),
    ("growth", _growth),
    ("hot_swap", _hot_swap),
]
