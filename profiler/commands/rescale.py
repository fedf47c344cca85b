"""`step-oracle rescale`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from profiler.commands.options import Output

app = typer.Typer()


@app.command()
def rescale(
    directory: Annotated[Path, typer.Argument(metavar="PACK", help="Directory of a composed pack.")],
    on: Annotated[Path, typer.Option(help="Measured steps: a table (.parquet, .csv), BLIS's step table or a trace.")],
    output: Output,
    steps: Annotated[int, typer.Option(min=1, help="Steps to fit on, evenly over the file; the others judge.")] = 200,
    kv_blocks: Annotated[int | None, typer.Option(min=1, help="KV blocks the measured engine logged.")] = None,
    name: Annotated[str | None, typer.Option(help="Name of the new pack.")] = None,
) -> None:
    """Fit a composed pack's dense, attention and host terms to measured steps."""
    from profiler.rescale_pack import RescaleRequest, write_rescaled
    from profiler.rescale_pack import rescale as run

    rescaled = run(RescaleRequest(directory, on, steps=steps, kv_blocks=kv_blocks, name=name))
    digest = write_rescaled(rescaled, output)
    typer.echo(f"{output}  {digest}")
    fit = rescaled.rescaling
    for label, estimate, scale, unit in (
        ("dense", fit.dense, 1.0, "x"),
        ("attention", fit.attention, 1.0, "x"),
        ("host", fit.host_ns, 1e-3, "us a step"),
    ):
        interval = f"90 % between {estimate.low * scale:.4g} and {estimate.high * scale:.4g}"
        told = "held: these steps do not tell it" if estimate.held else interval
        typer.echo(f"  {label:<10} {estimate.value * scale:.4g} {unit} ({told})")
    rows = [(f"{fit.steps} steps of the fit", fit.before_percent, fit.after_percent)]
    if rescaled.unseen:
        rows.append((f"{rescaled.unseen} other steps", rescaled.unseen_before_percent, rescaled.unseen_after_percent))
    for label, before, after in rows:
        typer.echo(
            f"  {label}: mean error {before[0]:+.2f} -> {after[0]:+.2f} %, "
            f"mean absolute {before[1]:.2f} -> {after[1]:.2f} %"
        )
    if fit.outliers:
        typer.echo(f"  {fit.outliers} steps left out: above twice or below half of the fit")
