"""`step-oracle experiment report`: what the profiler adds to that group."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from oracle_server.cli.console import TARGET, TENANT, Target, Tenant
from profiler.commands.options import print_json

app = typer.Typer()
_experiment = typer.Typer(name="experiment", help="Experiments: which packs answer for a fleet.")
app.add_typer(_experiment)


@_experiment.command("report")
def report(
    name: Annotated[str, typer.Argument(help="Name or id of the experiment; its engines have to be attached.")],
    results: Annotated[
        list[str],
        typer.Option(
            metavar="ENGINE_ID=FILE",
            help="What an engine's client saw: JSON of `vllm bench serve --save-result --save-detailed`. Once per "
            "engine; an id without /dpN is a vLLM server with all its ranks.",
        ),
    ],
    by: Annotated[
        str, typer.Option(help="What makes an arm: pack, overlays, engine, or label.KEY.", show_default=True)
    ] = "pack",
    baseline: Annotated[
        str | None,
        typer.Option(help="Arm the others are compared with, or a part of its name [default: that of the first file]."),
    ] = None,
    png: Annotated[Path | None, typer.Option(help="Also draw it into this file.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print data instead of tables.")] = False,
    tenant: Tenant = TENANT,
    target: Target = TARGET,
) -> None:
    """Compare the arms of an experiment: TTFT, TPOT, throughput and support, with 95 % intervals.

    Intervals are bootstrapped over engines where every arm has five or more, else over stretches of consecutive
    requests; the report says which.
    """
    from oracle_server.cli.attached import read_fleet
    from oracle_server.cli.console import print_table
    from profiler.experiment_report import report as reports
    from profiler.experiment_report.arms import arms_of, read_results

    runs = read_results(results)
    fleet = read_fleet(name, tenant, target)
    found = reports.build_report(fleet, arms_of(fleet, runs, by, baseline), by)
    if png is not None:
        from profiler.experiment_report.picture import draw_report

        draw_report(found, png)
    if as_json:
        print_json(reports.as_json(found))
        return
    typer.echo(f"{fleet.experiment}: generation {fleet.generation}, {len(found.arms)} arms by {by}")
    for header, rows in reports.tables(found):
        typer.echo()
        print_table(header, rows)
    typer.echo()
    typer.echo(f"In brackets: 95 % intervals, bootstrap of {found.resampled}.")
    if found.left_out:
        shown = ", ".join(found.left_out[:5]) + (" ..." if len(found.left_out) > 5 else "")
        typer.echo(f"Attached, without --results and in no arm: {shown}")
