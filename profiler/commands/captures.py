"""`step-oracle capture` (its --help alone), `build`, `evaluate`, `pack compare` and `trace export`."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer

from oracle_server.errors import InvalidArgument
from profiler.cli import standard_library_main
from profiler.commands.options import Output, print_json

app = typer.Typer()
_pack = typer.Typer(name="pack", help="Profile packs: check, show, upload, list.")
_trace = typer.Typer(name="trace", help="Steps of captures and of emulated runs as tables and timelines.")
app.add_typer(_pack)
app.add_typer(_trace)

_Capture = Annotated[Path, typer.Argument(metavar="CAPTURE", help="Folder of a capture, or one run of it.")]
_Skip = Annotated[int, typer.Option(min=0, help="Leave out the first steps of every run, beside a plan's warm-up.")]

_Steps = Annotated[
    list[str] | None,
    typer.Option(
        metavar="FROM:TO", help="Of every run these steps alone, from 0, without a plan's warm-up; may be repeated."
    ),
]


@app.command(
    "capture", context_settings={"allow_extra_args": True, "ignore_unknown_options": True}, add_help_option=False
)
def capture(context: typer.Context) -> None:
    """Start a real vLLM and record every step: its shape and how long the device was busy with it."""
    raise typer.Exit(standard_library_main("capture", list(context.args)))


def _span(text: str) -> tuple[int, int]:
    try:
        begin, end = map(int, text.split(":"))
    except ValueError:
        raise InvalidArgument(f"--steps {text}: give FROM:TO, two whole numbers", field="steps") from None
    return begin, end


@app.command("build")
def build(
    folder: _Capture,
    output: Output,
    kind: Annotated[str, typer.Option(help="hybrid (fitted) or sampled (the steps themselves).")] = "hybrid",
    skip_steps: _Skip = 0,
    steps: _Steps = None,
    licence: Annotated[str, typer.Option(help="SPDX expression of the data.")] = "unknown",
    name: Annotated[str | None, typer.Option(help="Name of the pack.")] = None,
) -> None:
    """Make a profile pack from a capture."""
    from profiler.capture.build import BuildRequest, build_pack

    spans = tuple(map(_span, steps or ()))
    request = BuildRequest(folder, kind, skip_steps=skip_steps, steps=spans, licence=licence, name=name)
    built = build_pack(request, output)
    typer.echo(f"{output}  {built.digest}")
    for line in built.lines:
        typer.echo(line)


@app.command("evaluate")
def evaluate_pack(
    directory: Annotated[Path, typer.Argument(metavar="PACK", help="Directory of the pack.")],
    on: Annotated[Path, typer.Option(metavar="CAPTURE", help="Steps to judge it on, which it was not made of.")],
    skip_steps: _Skip = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print data instead of text.")] = False,
) -> None:
    """Judge a pack on captured steps: error by run and by region, coverage of its intervals, support."""
    from profiler.capture.evaluate import evaluate, table_rows

    evaluation = evaluate(directory, on, skip_steps=skip_steps)
    if as_json:
        print_json(evaluation.as_dict())
        return
    typer.echo(f"{evaluation.pack}  {evaluation.digest}")
    heads = ("", "steps", "MAPE %", "median %", "bias %", "in 90 %", "exact / inter- / extrapolated %")
    _print_table((heads, *table_rows(evaluation)))
    for note in evaluation.notes:
        typer.echo(f"  note: {note}")


@_pack.command("compare")
def compare(
    a: Annotated[Path, typer.Argument(metavar="A", help="Directory of a pack.")],
    b: Annotated[Path, typer.Argument(metavar="B", help="Directory of the other.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print data instead of text.")] = False,
) -> None:
    """Say how far B's answers are from A's, by region, in percent and in standard deviations."""
    from profiler.pack_compare import compare_packs

    comparison = compare_packs(a, b)
    if as_json:
        print_json(comparison.as_dict())
        return
    typer.echo(f"A: {comparison.a}\nB: {comparison.b}")
    for field, (ours, theirs) in comparison.fields.items():
        typer.echo(f"  {field}: {ours} in A, {theirs} in B")
    rows: list[tuple[str, ...]] = [("region", "shapes", "B over A %", "least to most %", "effect, sd", "moved")]
    rows += [
        (
            region.region,
            str(region.shapes),
            f"{region.change:+.2f}",
            f"{region.smallest:+.1f} to {region.largest:+.1f}",
            f"{region.effect:+.2f}",
            f"{100 * region.moved_share:.0f} %",
        )
        for region in comparison.regions
    ]
    _print_table(rows)
    typer.echo(f"  {comparison.left_out} shapes left out: one of the packs has no data near them")


@_trace.command("export")
def export(
    folder: _Capture,
    output: Annotated[Path, typer.Option("--output", "-o", help="New file: .parquet, or .csv by its name.")],
) -> None:
    """Write captured steps as a table that pandas, polars and duckdb open; columns and units: profiler/capture."""
    from profiler.capture.steps import read_capture
    from profiler.capture.table import write_table

    runs = read_capture(folder)
    rows = write_table(runs, output)
    typer.echo(f"{output}: {rows} steps of {len(runs)} runs")
    for run in runs:
        for note in run.notes:
            typer.echo(f"  note: {run.name}: {note}")


def _print_table(rows: Iterable[tuple[str, ...]]) -> None:
    """Columns as wide as they need to be, numbers to the right."""
    lines = list(rows)
    widths = [max(len(line[place]) for line in lines) for place in range(len(lines[0]))]
    for line in lines:
        first, *others = line
        cells = [f"{cell:>{width}}" for cell, width in zip(others, widths[1:], strict=True)]
        typer.echo("  ".join((f"  {first:<{widths[0]}}", *cells)))
