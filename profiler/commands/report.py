"""`step-oracle report` and `trace perfetto`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer()
_trace = typer.Typer(name="trace", help="Steps of captures and of emulated runs as tables and timelines.")
app.add_typer(_trace)


@app.command("report")
def report(
    output: Annotated[Path, typer.Option("--output", "-o", help="HTML file to write; it holds its pictures.")],
    pack: Annotated[Path | None, typer.Argument(metavar="[PACK]", help="Directory of a pack.")] = None,
    on: Annotated[
        Path | None,
        typer.Option(metavar="STEPS", help="Judge the pack on a step trace, a table or a capture's folder."),
    ] = None,
    real: Annotated[
        Path | None, typer.Option(help="A real run: `vllm bench serve --save-detailed` JSON, or a replay's.")
    ] = None,
    emulated: Annotated[Path | None, typer.Option(help="The same workload on the emulated engine.")] = None,
    png: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Also write every picture into this folder.")
    ] = None,
) -> None:
    """Draw a pack, its errors and a comparison of runs on one page that opens offline."""
    from profiler.report.command import ReportRequest, write_report

    for path in write_report(ReportRequest(output, pack, on, real, emulated, png)):
        typer.echo(path)


@_trace.command("perfetto")
def perfetto(
    traces: Annotated[list[Path], typer.Argument(metavar="TRACE...", help="Step traces of the shim, or captures.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="JSON file for Perfetto or chrome://tracing.")],
) -> None:
    """Turn step traces into one timeline: dispatch, device, lateness."""
    from profiler.report.perfetto import write_perfetto

    typer.echo(f"{output}: {write_perfetto(traces, output)} steps")
