"""`step-oracle silicon-points`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer()


@app.command("silicon-points")
def silicon_points(
    vllm: Annotated[
        Path | None, typer.Option(help="Virtual environment with vLLM [default: the one this command runs in].")
    ] = None,
    only: Annotated[str, typer.Option(help="Only rows whose id contains this, for example 70b_h200.")] = "",
    list_only: Annotated[bool, typer.Option("--list", help="Say what would be replayed, and replay nothing.")] = False,
    as_launched: Annotated[
        bool, typer.Option("--as-launched", help="Also tell the packs what launch scripts add to the rows.")
    ] = False,
    corrections: Annotated[bool, typer.Option(help="Apply the packs' named corrections.")] = True,
    processes: Annotated[int, typer.Option(min=1, help="Packs that are replayed at a time.")] = 2,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write every row into this file.")] = None,
) -> None:
    """Hold synthesized packs against the closed loops that ship with aiconfigurator-core, row by row."""
    from profiler import silicon_report
    from profiler.silicon_points import read_rows
    from profiler.silicon_replays import predict

    rows = read_rows().narrowed(only)
    for line in silicon_report.row_lines(rows, with_points=list_only):
        typer.echo(line)
    if list_only or not rows.points:
        return
    predictions = predict(
        rows.points,
        vllm,
        as_launched=as_launched,
        corrections=corrections,
        processes=processes,
        on_row=lambda prediction: typer.echo(silicon_report.prediction_line(prediction)),
    )
    for line in silicon_report.summary_lines(predictions):
        typer.echo(line)
    if json_file is not None:
        json_file.write_text(silicon_report.document(rows, predictions), encoding="utf-8")
