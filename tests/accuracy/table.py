"""The figures of a session as one table."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from gates import Figure

WIDTH = 150
_HELD = {True: "held", False: "MISSED", None: ""}


def print_table(figures: Sequence[Figure], console: Console) -> None:
    """Every figure beside its bound and its controls, then how many held."""
    table = Table(title="Accuracy gates")
    table.add_column("gate")
    table.add_column("figure")
    table.add_column("value", justify="right", no_wrap=True)
    table.add_column("bound", justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    table.add_column("controls")
    gate = ""
    for figure in figures:
        if gate and figure.gate != gate:
            table.add_section()
        table.add_row(
            figure.gate if figure.gate != gate else "",
            figure.what,
            f"{figure.value:+.{_digits(figure)}f} {figure.unit}",
            "" if figure.at_most is None else f"± {figure.at_most:.3g} {figure.unit}",
            _HELD[figure.held],
            ", ".join(f"{name} {value:+.2f}" for name, value in figure.controls.items()),
        )
        gate = figure.gate
    console.print(table)
    promised = [figure for figure in figures if figure.held is not None]
    missed = sum(figure.held is False for figure in promised)
    console.print(
        f"{len(promised) - missed} of {len(promised)} bounds held{f', {missed} MISSED' if missed else ''}; "
        f"{len(figures) - len(promised)} figures have no bound"
    )


def _digits(figure: Figure) -> int:
    return 2 if max(abs(figure.value), figure.at_most or 0.0) >= 0.2 else 3
