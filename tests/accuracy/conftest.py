"""Every figure of the accuracy gates ends in one table, and in JSON where asked for."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest
from rich.console import Console
from rich.table import Table

from gates import Gates

_GATES = pytest.StashKey[Gates]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_GATES] = Gates()


@pytest.fixture
def gates(request: pytest.FixtureRequest) -> Gates:
    """Where a test puts its figures."""
    return request.config.stash[_GATES]


def pytest_terminal_summary(config: pytest.Config) -> None:
    figures = config.stash[_GATES].figures
    if not figures:
        return
    table = Table(title="Accuracy gates")
    for heading, justify in (
        ("gate", "left"),
        ("figure", "left"),
        ("value", "right"),
        ("bound", "right"),
        ("", "left"),
    ):
        table.add_column(heading, justify=justify)  # type: ignore[arg-type]
    table.add_column("controls", justify="left")
    for figure in figures:
        table.add_row(
            figure.gate,
            figure.what,
            f"{figure.value:+.2f} {figure.unit}",
            "" if figure.at_most is None else f"± {figure.at_most:g} {figure.unit}",
            {True: "held", False: "MISSED", None: ""}[figure.held],
            ", ".join(f"{name} {value:+.2f}" for name, value in figure.controls.items()),
        )
    Console(width=140).print(table)
    path = config.getoption("--accuracy-json")
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps([asdict(figure) | {"held": figure.held} for figure in figures], indent=1) + "\n")
