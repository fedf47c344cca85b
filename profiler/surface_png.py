"""Draws latency surfaces as one picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from oracle_server.errors import FailedPrecondition
from profiler.surface import Surface, count_label, milliseconds_label

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def draw_surfaces(surfaces: Sequence[Surface], path: Path, *, title: str, subtitle: str, footer: str) -> None:
    """Writes a PNG: one heat map per surface, latency on a logarithmic color scale in milliseconds."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise FailedPrecondition("--png needs matplotlib: pip install 'step-oracle[profiler]'") from error
    # The object interface keeps no global figure and needs no display.
    figure = Figure(figsize=(7.6 * len(surfaces), 6.6), dpi=130)
    FigureCanvasAgg(figure)
    for number, surface in enumerate(surfaces, start=1):
        _draw(figure, figure.add_subplot(1, len(surfaces), number), surface)
    figure.subplots_adjust(left=0.05, right=0.98, top=0.84, bottom=0.19, wspace=0.16)
    figure.text(0.05, 0.945, title, fontsize=15, weight="bold", parse_math=False)
    figure.text(0.05, 0.905, subtitle, fontsize=10, color="#555555", parse_math=False)
    figure.text(0.05, 0.025, footer, fontsize=9, color="#555555", parse_math=False)
    figure.savefig(path, format="png")


def _draw(figure: Any, axes: Axes, surface: Surface) -> None:
    from matplotlib.colors import LogNorm
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    known = surface.latency_ms[np.isfinite(surface.latency_ms)]
    norm = LogNorm(vmin=float(known.min()), vmax=float(max(known.max(), known.min() * 1.01)))
    columns, rows = np.arange(len(surface.x) + 1), np.arange(len(surface.y) + 1)
    values = np.ma.masked_invalid(surface.latency_ms)
    mesh = axes.pcolormesh(columns, rows, values, cmap="viridis", norm=norm, edgecolors="none", rasterized=True)
    _hatch(axes, np.isnan(surface.latency_ms), "///", "#dcdcdc")
    _hatch(axes, surface.weak, "///", (1.0, 1.0, 1.0, 0.55))
    axes.set_facecolor("#f7f7f7")
    _label_cells(axes, surface, norm)
    axes.set_xticks(np.arange(len(surface.x)) + 0.5, _ticks(surface.x), rotation=90, fontsize=8)
    axes.set_yticks(np.arange(len(surface.y)) + 0.5, _ticks(surface.y), fontsize=8)
    axes.set_xlabel(surface.x_name)
    axes.set_ylabel(surface.y_name)
    axes.set_title(surface.title, loc="left", fontsize=11)
    axes.set_title(_hatch_legend(surface), loc="right", fontsize=9, color="#777777")
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    bar = figure.colorbar(mesh, ax=axes, pad=0.02, aspect=32)
    bar.ax.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    bar.ax.yaxis.set_minor_formatter(NullFormatter())
    bar.set_label("step latency, ms")
    bar.outline.set_visible(False)


def _hatch_legend(surface: Surface) -> str:
    if np.isnan(surface.latency_ms).any():
        return "hatched: no sample"
    return "hatched: extrapolated" if surface.weak.any() else ""


def _hatch(axes: Axes, mask: Any, pattern: str, color: Any) -> None:
    from matplotlib.patches import Rectangle

    for row, column in zip(*np.nonzero(mask), strict=True):
        axes.add_patch(
            Rectangle((column, row), 1, 1, fill=False, hatch=pattern, linewidth=0, edgecolor=color, zorder=2)
        )


def _label_cells(axes: Axes, surface: Surface, norm: Any) -> None:
    """Numbers where they can be read: in every cell of a sparse picture, at the labelled ticks of a full one."""
    is_sparse = np.isfinite(surface.latency_ms).sum() <= 160
    for row, row_tick in enumerate(_ticks(surface.y)):
        for column, column_tick in enumerate(_ticks(surface.x)):
            value = surface.latency_ms[row, column]
            if np.isfinite(value) and (is_sparse or (row_tick and column_tick)):
                color = "#202020" if norm(value) > 0.65 else "white"
                axes.text(
                    column + 0.5,
                    row + 0.5,
                    milliseconds_label(value),
                    ha="center",
                    va="center",
                    fontsize=6,
                    color=color,
                )


def _ticks(values: Sequence[int]) -> list[str]:
    """All values of a short axis; of a long one 0 and the powers of two, which stand in every other place."""
    return [count_label(value) if len(values) <= 14 or value & (value - 1) == 0 else "" for value in values]
