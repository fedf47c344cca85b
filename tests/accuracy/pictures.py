"""Draws what a session of accuracy tests measured: `python pictures.py FIGURES.json [-o DIR]` draws it again.

Three kinds, each a pure function of the record: distributions laid over one another, figures beside their bounds and
controls, points measured and answered.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure as Canvas
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

from gates import Curve, Figure, Points, Record

# How the files' names begin: distributions, figures, points.
KINDS: Final = ("cdf", "errors", "points")
MEASURED: Final = "measured"
_TRUTH, _OURS, _MISSED, _GREY = "#202020", "#2a788e", "#d1332e", "#555555"
# Marker and color; the same control looks the same in every picture.
_CONTROLS: Final[Mapping[str, tuple[str, str]]] = {
    "LLM-Emu auto": ("^", "#7b3294"),
    "LLM-Emu K=1": ("v", "#5aae61"),
    "LLM-Emu published": ("D", "#e08214"),
    "LLMServingSim": ("D", "#e08214"),
    "unlimited KV": ("s", "#c51b7d"),
    "nearest neighbours": ("s", "#c51b7d"),
    "boosted trees": ("P", "#8c6d31"),
    "physics alone": ("X", "#4393c3"),
}
_OTHERS: Final = (("D", "#e08214"), ("s", "#c51b7d"), ("^", "#7b3294"), ("v", "#5aae61"), ("P", "#8c6d31"))
_DPI: Final = 130

# Figures of these gates share a picture; those of any other gate have one of their own.
_SHARED: Final[Mapping[str, tuple[str, tuple[str, ...]]]] = {
    "whole_runs": ("Whole runs, replayed", ("replay of ", "memory study", "AIConfigurator pack")),
    "packs_of_steps": ("Packs beside real steps", ("synthesized pack ", "KV blocks by", "PRO 6000 operators")),
}


def draw(record: Record, folder: Path) -> list[Path]:
    """Writes every picture of a record; the files, in order of their names."""
    drawn = [*_distributions(record, folder), *_figures(record, folder), *_points(record, folder)]
    return sorted(drawn)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("figures", type=Path, help="figures.json of `make accuracy`")
    parser.add_argument("-o", "--output", type=Path, help="folder of the pictures (default: beside the file)")
    options = parser.parse_args()
    folder = options.output or options.figures.parent
    folder.mkdir(parents=True, exist_ok=True)
    for path in draw(Record.of(json.loads(options.figures.read_text())), folder):
        print(path)
    return 0


# Distributions


def _distributions(record: Record, folder: Path) -> Iterator[Path]:
    for gate in dict.fromkeys(curve.gate for curve in record.curves):
        curves = [curve for curve in record.curves if curve.gate == gate]
        metrics = list(dict.fromkeys(curve.metric for curve in curves))
        series = list(dict.fromkeys(curve.series for curve in curves))
        width = 1.0 + 3.7 * len(metrics)
        canvas = _canvas(width, 4.6)
        looks = _looks(series)
        for number, metric in enumerate(metrics):
            axes = canvas.add_axes((_at(0.65 + 3.7 * number, width), 0.27, _at(3.3, width), 0.535))
            _distribution(axes, [curve for curve in curves if curve.metric == metric], looks, first=number == 0)
        handles = [Line2D([], [], label=name, **looks[name]) for name in series]
        canvas.legend(handles=handles, loc="lower left", ncols=6, bbox_to_anchor=(_at(0.5, width), 0.06), **_LEGEND)
        yield _saved(canvas, folder / f"cdf_{_slug(gate)}.png", gate, "cumulative distributions", record, [gate])


def _distribution(axes: Axes, curves: Sequence[Curve], looks: Mapping[str, dict[str, Any]], *, first: bool) -> None:
    in_seconds = curves[0].unit == "ms" and max(curve.values[-1] for curve in curves) > 5_000
    scale, unit = (1e-3, "s") if in_seconds else (1.0, curves[0].unit)
    for curve in curves:
        shares = [(rank + 1) / len(curve.values) for rank in range(len(curve.values))]
        axes.plot([scale * value for value in curve.values], shares, drawstyle="steps-post", **looks[curve.series])
    medians = [curve.values[len(curve.values) // 2] for curve in curves]
    smallest = min(curve.values[0] for curve in curves)
    # Where a linear axis would show a wall at its left.
    if smallest > 0 and max(*medians, *(curve.values[-1] / 3 for curve in curves)) > 20 * min(medians):
        axes.set_xscale("log")
    else:
        axes.set_xlim(left=0)
        axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.xaxis.set_major_formatter(FuncFormatter(_number))
    axes.set_ylim(0, 1.01)
    axes.set_xlabel(f"{curves[0].metric}, {unit}")
    if first:
        axes.set_ylabel("share of requests")
    else:
        axes.set_yticklabels([])
    _plain(axes)


def _looks(series: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Line of each series: the truth broad and dark, ours on it, controls thin."""
    ours, controls = _ours_and_controls(series)
    return {
        MEASURED: {"color": _TRUTH, "linewidth": 3.6, "alpha": 0.5, "zorder": 2},
        ours: {"color": _OURS, "linewidth": 1.7, "zorder": 4},
        **{
            name: {"color": color, "linewidth": 1.3, "linestyle": (0, (4, 1.5)), "zorder": 3}
            for name, (_, color) in _styles(controls).items()
        },
    }


# Figures beside bounds and controls


def _figures(record: Record, folder: Path) -> Iterator[Path]:
    """Errors in per cent; figures in other units, and gates with nothing beside them, stand in the table alone."""
    figures = [figure for figure in record.figures if figure.unit == "%"]
    taken: set[str] = set()
    for name, (title, prefixes) in _SHARED.items():
        chosen = [figure for prefix in prefixes for figure in figures if figure.gate.startswith(prefix)]
        taken |= {figure.gate for figure in chosen}
        if chosen:
            yield _figure_picture(record, folder / f"errors_{name}.png", title, chosen)
    for gate in dict.fromkeys(figure.gate for figure in figures if figure.gate not in taken):
        chosen = [figure for figure in figures if figure.gate == gate]
        if any(figure.at_most is not None or figure.controls for figure in chosen):
            yield _figure_picture(record, folder / f"errors_{_slug(gate)}.png", gate, chosen)


def _figure_picture(record: Record, path: Path, title: str, figures: Sequence[Figure]) -> Path:
    rows = _rows(figures)
    left = min(5.3, 0.5 + 0.063 * max(len(entry if isinstance(entry, str) else entry.what) for entry in rows))
    panel, row, above, below = 5.75, 0.235, 0.95, 1.15
    width, height = left + panel + 0.95, above + below + row * len(rows)
    canvas = _canvas(width, height)
    axes = canvas.add_axes((_at(left, width), _at(below, height), _at(panel, width), _at(row * len(rows), height)))
    controls = list(dict.fromkeys(name for figure in figures for name in figure.controls))
    styles = _styles(controls)
    _scale(axes, figures)
    for y, entry in enumerate(rows):
        if isinstance(entry, str):
            axes.text(-(left - 0.25) / panel, y, entry, transform=_beside(axes), weight="bold", **_ROW)
        else:
            _figure_row(axes, y, entry, styles, -(left - 0.33) / panel)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_yticks([])
    axes.axvline(0, color=_GREY, linewidth=0.8, zorder=1)
    axes.set_xlabel("error, %")
    _plain(axes, grid="x")
    handles: list[Any] = [_dot("this project", "o", _OURS)]
    if any(figure.at_most is not None for figure in figures):
        handles.append(Patch(color="#d6e6ea", label="promised"))
    if any(figure.held is False for figure in figures):
        handles.append(_dot("MISSED", "o", _MISSED))
    handles += [_dot(name, *styles[name], hollow=True) for name in controls]
    columns = max(2, int(width / 1.9))
    canvas.legend(handles=handles, loc="lower left", ncols=columns, bbox_to_anchor=(0.01, _at(0.26, height)), **_LEGEND)
    gates = list(dict.fromkeys(figure.gate for figure in figures))
    return _saved(canvas, path, title, "errors beside what is promised and beside controls", record, gates)


def _figure_row(axes: Axes, y: int, figure: Figure, styles: Mapping[str, tuple[str, str]], left: float) -> None:
    if figure.at_most is not None:
        axes.add_patch(Rectangle((-figure.at_most, y - 0.4), 2 * figure.at_most, 0.8, color="#d6e6ea", zorder=0))
    for name, value in figure.controls.items():
        marker, color = styles[name]
        axes.plot(value, y, marker, color=color, markersize=5, fillstyle="none", zorder=2)
    color = _MISSED if figure.held is False else _OURS
    axes.plot(figure.value, y, "o", color=color, markersize=6, zorder=3)
    axes.text(left, y, textwrap.shorten(figure.what, 96, placeholder=" …"), transform=_beside(axes), **_ROW)
    text = f"{figure.value:+.2f}" + (" MISSED" if figure.held is False else "")
    axes.text(1.015, y, text.replace("-", "−"), transform=_beside(axes), **{**_ROW, "color": color})


def _rows(figures: Sequence[Figure]) -> list[str | Figure]:
    """A heading for each gate, then its figures."""
    gates = dict.fromkeys(figure.gate for figure in figures)
    if len(gates) == 1:
        return list(figures)
    rows: list[str | Figure] = []
    for gate in gates:
        rows += [gate, *(figure for figure in figures if figure.gate == gate)]
    return rows


def _scale(axes: Axes, figures: Sequence[Figure]) -> None:
    """Linear; where a control is far away, logarithmic beyond 5 %. From 0 on where no error has a sign."""
    values = [value for figure in figures for value in (figure.value, *figure.controls.values())]
    bound = max(figure.at_most or 0 for figure in figures)
    lowest, highest = min(*values, -bound if min(values) < 0 else 0), max(*values, bound)
    margin = 0.04 * (highest - lowest) or 1.0
    if max(-lowest, highest) > 30:
        axes.set_xscale("symlog", linthresh=5, linscale=1.2)
        ticks = [sign * tick for sign in (-1, 1) for tick in (2, 5, 10, 30, 100, 300)] + [0]
        axes.set_xticks(sorted(tick for tick in ticks if 1.3 * lowest - 1 <= tick <= 1.3 * highest + 1))
        axes.set_xlim(1.2 * lowest - 0.5, 1.2 * highest + 0.5)
    else:
        axes.set_xlim(lowest - margin if lowest < 0 else 0, highest + margin)
    axes.xaxis.set_major_formatter(FuncFormatter(_number))
    axes.xaxis.set_minor_formatter(NullFormatter())


# Points


def _points(record: Record, folder: Path) -> Iterator[Path]:
    for gate in dict.fromkeys(points.gate for points in record.points):
        points = [entry for entry in record.points if entry.gate == gate]
        metrics = list(dict.fromkeys(entry.metric for entry in points))
        labels = list(dict.fromkeys(label for entry in points for label in entry.values))
        series = list(dict.fromkeys(entry.series for entry in points))
        left, panel = 0.6 + 0.068 * max(map(len, labels)), 3.0 if len(metrics) > 1 else 6.0
        width, height = left + (panel + 0.25) * len(metrics) + 0.2, 2.2 + 0.32 * len(labels)
        canvas = _canvas(width, height)
        looks = _point_looks(series)
        for number, metric in enumerate(metrics):
            x = left + (panel + 0.25) * number
            box = (_at(x, width), _at(1.2, height), _at(panel, width), _at(0.32 * len(labels), height))
            axes = canvas.add_axes(box)
            _point_panel(axes, [entry for entry in points if entry.metric == metric], labels, looks, first=number == 0)
        handles = [Line2D([], [], linestyle="none", label=name, **looks[name]) for name in series]
        canvas.legend(handles=handles, loc="lower left", ncols=5, bbox_to_anchor=(0.02, _at(0.26, height)), **_LEGEND)
        yield _saved(canvas, folder / f"points_{_slug(gate)}.png", gate, "measured and answered", record, [gate])


def _point_panel(
    axes: Axes, points: Sequence[Points], labels: Sequence[str], looks: Mapping[str, dict[str, Any]], *, first: bool
) -> None:
    values = [value for entry in points for value in entry.values.values()]
    for entry in points:
        for label, value in entry.values.items():
            axes.plot(value, labels.index(label), **looks[entry.series])
    if min(values) > 0 and max(values) > 8 * min(values):
        axes.set_xscale("log")
        exponents = range(math.floor(math.log10(min(values))) - 1, math.ceil(math.log10(max(values))) + 1)
        ticks = [step * 10.0**e for e in exponents for step in (1, 2, 5)]
        axes.set_xticks([tick for tick in ticks if 0.7 * min(values) <= tick <= 1.4 * max(values)])
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlim(0.75 * min(values), 1.33 * max(values))
    else:
        axes.set_xlim(0, 1.08 * max(values))
    axes.xaxis.set_major_formatter(FuncFormatter(_number))
    axes.set_yticks(range(len(labels)), labels if first else [], fontsize=8)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.set_xlabel(f"{points[0].metric}, {points[0].unit}")
    _plain(axes)


def _point_looks(series: Sequence[str]) -> dict[str, dict[str, Any]]:
    ours, controls = _ours_and_controls(series)
    # Another of ours, "replayed, sync" beside "replayed, async", is a hollow one.
    kin = [name for name in controls if name.split(",")[0] == ours.split(",")[0]]
    styles = _styles([name for name in controls if name not in kin]) | dict.fromkeys(kin, ("o", _OURS))
    return {
        MEASURED: {"marker": "|", "color": _TRUTH, "markersize": 14, "markeredgewidth": 2.4},
        ours: {"marker": "o", "color": _OURS, "markersize": 6.5},
        **{
            name: {"marker": marker, "color": color, "markersize": 5.5, "fillstyle": "none"}
            for name, (marker, color) in styles.items()
        },
    }


# What all share

_LEGEND: Final[Mapping[str, Any]] = {"frameon": False, "fontsize": 9, "handletextpad": 0.5, "columnspacing": 1.6}
_ROW: Final[Mapping[str, Any]] = {"fontsize": 8, "va": "center", "ha": "left", "clip_on": False, "parse_math": False}


def _ours_and_controls(series: Sequence[str]) -> tuple[str, list[str]]:
    """The first series that was not measured is ours."""
    answered = [name for name in series if name != MEASURED]
    return (answered[0] if answered else ""), answered[1:]


def _styles(controls: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Marker and color by name; a stranger takes what is left."""
    taken = {_CONTROLS[name] for name in controls if name in _CONTROLS}
    free = iter([style for style in _OTHERS if style not in taken] + list(_OTHERS) * 9)
    return {name: _CONTROLS.get(name) or next(free) for name in controls}


def _canvas(width: float, height: float) -> Canvas:
    # The object interface keeps no global figure and needs no display.
    canvas = Canvas(figsize=(width, height), dpi=_DPI)
    FigureCanvasAgg(canvas)
    return canvas


def _saved(canvas: Canvas, path: Path, title: str, subtitle: str, record: Record, gates: Iterable[str]) -> Path:
    """Title and sources at fixed distances from the edges, whatever the size."""
    height = float(canvas.get_size_inches()[1])
    canvas.text(0.02, 1 - _at(0.36, height), title[0].upper() + title[1:], fontsize=14, weight="bold", parse_math=False)
    canvas.text(0.02, 1 - _at(0.6, height), subtitle, fontsize=9, color=_GREY, parse_math=False)
    sources = "; ".join(dict.fromkeys(record.sources[gate] for gate in gates if gate in record.sources))
    if sources:
        canvas.text(0.02, _at(0.1, height), f"source: {sources}", fontsize=8, color=_GREY, parse_math=False)
    canvas.savefig(path, format="png")
    return path


def _plain(axes: Axes, grid: str = "both") -> None:
    axes.tick_params(which="both", length=0, labelsize=8)
    axes.grid(visible=True, axis=grid, color="#e6e6e6", linewidth=0.7)  # type: ignore[arg-type]
    axes.set_axisbelow(True)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _dot(name: str, marker: str, color: str, *, hollow: bool = False) -> Line2D:
    look = Line2D([], [], linestyle="none", marker=marker, color=color, markersize=6, label=name)
    look.set_fillstyle("none" if hollow else "full")
    return look


def _beside(axes: Axes) -> Any:
    """Across in shares of the panel, down in rows."""
    return axes.get_yaxis_transform()


def _number(value: float, _: object = None) -> str:
    return f"{value:,g}".replace("-", "−")


def _at(inches: float, size: float) -> float:
    return inches / size


def _slug(gate: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", gate.lower()).strip("_")


if __name__ == "__main__":
    raise SystemExit(main())
