"""`step-oracle top`: the fleet, live, in a terminal."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer

from oracle_server.cli.console import TARGET, USAGE, Target, connect, experiment_name, fail, print_json
from oracle_server.cli.fleet import ExperimentLine, Figures, View

if TYPE_CHECKING:
    from oracle_server.cli.fleet_frame import Header

# A frame that does not have to fit a terminal.
PIPE_COLUMNS = 140
ALL_LINES = 100_000
_ORDERS = ("trouble", "steps", "lateness", "engine")


def top(
    experiment: Annotated[str | None, typer.Option(help="Only this experiment: its name or its id.")] = None,
    interval: Annotated[float, typer.Option(help="Seconds between two polls, 0.2 to 60.")] = 2.0,
    sort: Annotated[str, typer.Option(help="trouble (the worst first), steps, lateness or engine.")] = "trouble",
    once: Annotated[bool, typer.Option("--once", help="Two polls, one frame, and end.")] = False,
    tenant: Annotated[str | None, typer.Option(help="Only this tenant.")] = None,
    target: Target = TARGET,
    json_output: Annotated[
        bool, typer.Option("--json", help="Print JSON: one object per interval, with --once one alone.")
    ] = False,
) -> None:
    """Show every engine of the fleet, live: rate, support, lateness, leases. Ctrl-C ends it.

    Rates, shares and lateness are of the last interval (of all its steps where an engine is new), late answers and
    reconnects since the server knows the engine. An engine with late answers is degraded, and a run with it no result;
    so is one whose tenant is over its step rate.
    """
    if not 0.2 <= interval <= 60:
        fail(f"--interval is {interval:g}; allowed: 0.2 to 60 seconds", USAGE)
    if sort not in _ORDERS:
        fail(f"--sort is {sort!r}; allowed: {', '.join(_ORDERS)}", USAGE)
    only = None if experiment is None else experiment_name(experiment, tenant or "default")
    with connect(target) as client:
        from oracle_server.cli.fleet_frame import Header
        from oracle_server.cli.fleet_watch import FleetWatch

        watch = FleetWatch(client, only, tenant)
        # The first poll may fail the command: there is nothing to show yet.
        watch.poll_once()
        try:
            if once:
                time.sleep(interval)
                watch.poll_once()
            with _screen(sort, json_output=json_output, live=not once) as show:
                while True:
                    show(watch.view, Header(target, datetime.now(UTC), watch.note(), fresh=watch.fresh))
                    if once:
                        return
                    time.sleep(interval)
                    watch.poll()
        except KeyboardInterrupt:
            pass


def as_document(view: View, header: Header) -> dict[str, Any]:
    """The frame as plain values; infinity (beyond the last bucket) as text."""
    return {
        "time": header.now.isoformat(timespec="milliseconds"),
        "target": header.target,
        "health": view.health,
        "note": header.note,
        "fresh": header.fresh,
        "interval_seconds": view.interval_seconds,
        "total": _experiment_document(view.total),
        "experiments": [
            {**dataclasses.asdict(line.experiment), **_experiment_document(line)} for line in view.experiments
        ],
        "engines": [
            {**dataclasses.asdict(line.engine), "state": line.state, **_figures_document(line.figures)}
            for line in view.engines
        ],
    }


def _experiment_document(line: ExperimentLine) -> dict[str, Any]:
    sums = {"engines": line.engines, "streaming": line.streaming, "degraded": line.degraded}
    return {**sums, **_figures_document(line.figures)}


def _figures_document(figures: Figures) -> dict[str, Any]:
    values = dataclasses.asdict(figures)
    return {name: "inf" if value == float("inf") else value for name, value in values.items()}


@contextmanager
def _screen(sort: str, *, json_output: bool, live: bool) -> Iterator[Callable[[View, Header], None]]:
    """What shows one frame: a whole terminal, or lines where there is none."""
    if json_output:
        yield lambda view, header: print_json(as_document(view, header))
        return
    from rich.console import Console
    from rich.live import Live

    from oracle_server.cli.fleet_frame import frame

    console = Console(highlight=False)
    if not console.is_terminal or not live:
        width = console.width if console.is_terminal else PIPE_COLUMNS
        console.width = width
        yield lambda view, header: console.print(frame(view, header, width, ALL_LINES, sort))
        return
    with Live(console=console, screen=True, auto_refresh=False) as screen:

        def show(view: View, header: Header) -> None:
            width, height = console.size
            screen.update(frame(view, header, width, height, sort), refresh=True)

        yield show
