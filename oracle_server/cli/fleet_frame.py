"""One frame of `step-oracle top`: a fleet's figures as text of a given width and height."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from oracle_server.cli.fleet import STATES, EngineLine, Figures, View, sort_lines

NOTHING = "–"
GAP = 2
# Texts but for the first column's are cut here.
MAX_TEXT = 24

_STYLE_OF_STATE = dict(zip(STATES, ("red", "bold red", "cyan", "yellow", "green"), strict=True))
# Shares and times from which a figure is worth a second look: those of deploy/observability's alerts.
EXTRAPOLATED_SHARE = 0.05
LATENESS_SECONDS = 5e-3


@dataclass(frozen=True, slots=True)
class Header:
    """What a frame says apart from the fleet."""

    target: str
    now: datetime
    # What happened to the connection, empty: nothing.
    note: str = ""
    # False: the figures are of the last answer.
    fresh: bool = True


@dataclass(frozen=True, slots=True)
class _Column:
    title: str
    text: Callable[[Any], Text]
    # Narrow terminals lose the columns of the highest rank first; 0 stays.
    rank: int
    left: bool = False


def frame(view: View, header: Header, width: int, height: int, order: str = "trouble") -> RenderableType:
    """The header, the experiments, then as many engines as there is room for."""
    parts: list[RenderableType] = [_headline(view, header)]
    if header.note:
        parts.append(
            Text(header.note, style="bold yellow" if header.fresh else "bold red", overflow="ellipsis", no_wrap=True)
        )
    room = height - len(parts)
    # Experiments may fill a third of the terminal, a title and a line for the rest included.
    shown = view.experiments[: max(1, room // 3 - 2)]
    if shown:
        parts += [Text(), _grid(_OF_EXPERIMENT, shown, width)]
        room -= 2 + len(shown)
        if len(shown) < len(view.experiments):
            parts.append(_dim(f"… {len(view.experiments) - len(shown)} more experiments"))
            room -= 1
    else:
        parts += [Text(), _dim("no experiment yet: step-oracle experiment create NAME --pack PACK")]
        room -= 2
    # An empty line and the titles.
    room -= 2
    lines = sort_lines(view.engines, order)
    if not lines:
        return Group(*parts, *([Text(), _dim("no engine is attached")] if shown else []))
    cut = lines if len(lines) <= room else lines[: max(0, room - 1)]
    columns = [c for c in _OF_ENGINE if c.title != "EXPERIMENT" or len(view.experiments) > 1]
    if cut:
        parts += [Text(), _grid(columns, cut, width)]
    if len(cut) < len(lines):
        parts.append(_dim(f"… {len(lines) - len(cut)} more of {len(lines)} engines"))
    return Group(*parts)


def _headline(view: View, header: Header) -> Text:
    total = view.total
    health = Text(view.health, style="bold green" if view.health == "SERVING" and header.fresh else "bold red")
    text = Text("step-oracle top  ", style="bold", overflow="ellipsis", no_wrap=True)
    text.append(f"{header.target} ", style="default").append_text(health)
    text.append(f"  {total.engines} engines", style="default")
    if total.engines - total.streaming:
        text.append(f", {total.engines - total.streaming} starting", style="cyan")
    if total.degraded:
        text.append(f", {total.degraded} degraded", style="yellow")
    text.append(f"  {_rate(total.figures)} steps/s  {header.now:%H:%M:%SZ}", style="default")
    return text


def _grid(columns: Sequence[_Column], lines: Sequence[Any], width: int) -> Table:
    """The lines under as many columns as fit; the first takes what room is left."""
    cells = {column.title: [column.text(line) for line in lines] for column in columns}

    def needed(column: _Column) -> int:
        widest = max(cell.cell_len for cell in cells[column.title])
        return max(len(column.title), min(widest, MAX_TEXT) if column.left else widest) + GAP

    shown = list(columns)
    while sum(map(needed, shown)) > width and any(column.rank for column in shown):
        shown.remove(max(shown, key=lambda column: column.rank))
    table = Table(box=None, expand=True, padding=(0, GAP, 0, 0), pad_edge=False, header_style="bold dim")
    for i, column in enumerate(shown):
        table.add_column(
            column.title,
            justify="left" if column.left else "right",
            no_wrap=True,
            overflow="ellipsis",
            ratio=None if i else 1,
            max_width=MAX_TEXT if i and column.left else None,
        )
    for i in range(len(lines)):
        table.add_row(*(cells[column.title][i] for column in shown))
    return table


def _dim(text: str) -> Text:
    return Text(text, style="dim", overflow="ellipsis", no_wrap=True)


def _state(line: EngineLine) -> Text:
    return Text(line.state, style=_STYLE_OF_STATE[line.state])


# Of a line of either kind.
_FIGURES = (
    _Column("STEPS/S", lambda line: Text(_rate(line.figures)), 0),
    _Column("EXTRAP", lambda line: _share(line.figures.extrapolated_share, EXTRAPOLATED_SHARE), 1),
    _Column("LATENESS P50", lambda line: _time(line.figures.lateness_p50_seconds), 4),
    _Column("P99", lambda line: _time(line.figures.lateness_p99_seconds), 2),
    _Column("LATE", lambda line: _late(line.figures), 0),
    _Column("LEASED", lambda line: _share(line.figures.lease_share), 3),
    _Column("RECONN", lambda line: Text(f"{line.figures.reconnects:,}"), 6),
)
_OF_EXPERIMENT = (
    _Column("EXPERIMENT", lambda line: Text(_short(line.experiment.name)), 0, left=True),
    _Column("ENGINES", lambda line: Text(f"{line.engines:,}"), 5),
    *_FIGURES,
    _Column("GEN", lambda line: Text(str(line.experiment.generation)), 7),
    _Column("PACK", lambda line: Text(", ".join(line.experiment.packs)), 8, left=True),
)
_OF_ENGINE = (
    _Column("ENGINE", lambda line: Text(line.engine.engine_id), 0, left=True),
    _Column("EXPERIMENT", lambda line: Text(_short(line.engine.experiment)), 5, left=True),
    _Column("STATE", _state, 0, left=True),
    *_FIGURES,
    _Column("GEN", lambda line: Text(str(line.engine.generation)), 8),
    _Column("PACK", lambda line: Text(line.engine.pack), 7, left=True),
)


def _rate(figures: Figures) -> str:
    rate = figures.steps_per_second
    if rate is None:
        return NOTHING
    return f"{rate:,.0f}" if rate >= 100 else f"{rate:.1f}"


def _share(share: float | None, limit: float = math.inf) -> Text:
    if share is None:
        return Text(NOTHING, style="dim")
    # A share that is not zero is not shown as zero, and one that is not all not as all.
    percent = 100 * share
    if 0 < percent < 0.1:
        text = "<0.1%"
    elif 99.9 < percent < 100:
        text = ">99.9%"
    else:
        text = f"{percent:.1f}%"
    return Text(text, style="yellow" if share > limit else "")


def _time(seconds: float | None) -> Text:
    if seconds is None:
        return Text(NOTHING, style="dim")
    if math.isinf(seconds):
        return Text(">50ms", style="red")
    text = f"{seconds * 1e6:.0f}µs" if seconds < 0.9995e-3 else f"{seconds * 1e3:.1f}ms"
    return Text(text, style="yellow" if seconds > LATENESS_SECONDS else "")


def _late(figures: Figures) -> Text:
    if figures.new_late_answers:
        return Text(f"{figures.late_answers:,} (+{figures.new_late_answers:,})", style="bold red")
    return Text(f"{figures.late_answers:,}", style="yellow" if figures.late_answers else "")


def _short(name: str) -> str:
    """A name of the default tenant by its id alone, others as tenant/experiment."""
    parts = name.split("/")
    if len(parts) != 4:
        return name
    return parts[3] if parts[1] == "default" else f"{parts[1]}/{parts[3]}"
