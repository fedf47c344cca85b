"""One line of the table: what was done, what came out, what is promised, and whether it holds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from rich.table import Table

Sizes = TypeVar("Sizes")
HELD, MISSED = "held", "MISSED"


@dataclass(frozen=True)
class Row:
    """`verdict` is HELD or MISSED."""

    guarantee: str
    done: str
    figure: str
    bound: str
    verdict: str


@dataclass(frozen=True)
class Guarantee(Generic[Sizes]):
    """How one is shown: `run` takes an empty folder and one of the sizes, and gives the lines of the table."""

    run: Callable[[Path, Sizes], Sequence[Row]]
    long: Sizes
    quick: Sizes


def judged(guarantee: str, done: str, figure: str, bound: str, *, holds: bool) -> Row:
    """A row about something that was measured."""
    return Row(guarantee, done, figure, bound, HELD if holds else MISSED)


def table_of(rows: Sequence[Row], title: str = "Guarantees") -> Table:
    """The rows for people."""
    table = Table(title=title, title_justify="left")
    for heading in ("guarantee", "what was done", "figure", "bound", ""):
        table.add_column(heading)
    for row in rows:
        style = "bold" if row.verdict == MISSED else None
        table.add_row(row.guarantee, row.done, row.figure, row.bound, row.verdict, style=style)
    return table
