"""`step-oracle lengths`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer()
_lengths = typer.Typer(name="lengths", help="Tables of output lengths.")
app.add_typer(_lengths)


@_lengths.command("fit")
def fit(
    trace: Annotated[Path, typer.Argument(help="Azure or Mooncake trace, or `vllm bench serve --save-detailed` JSON.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="JSON file for `experiment create --lengths`.")],
    bins: Annotated[int, typer.Option(min=1, max=256, help="Prompt-length bins.")] = 8,
    quantiles: Annotated[int, typer.Option(min=2, max=4097, help="Quantiles per bin.")] = 1025,
    limit: Annotated[
        int | None, typer.Option(min=1, help="max_tokens the trace was recorded under; such rows count as cut.")
    ] = None,
) -> None:
    """Fit a table of output lengths given prompt lengths."""
    from profiler.lengths import fit_lengths, read_trace, write_lengths

    fitted = fit_lengths(read_trace(trace), bins=bins, quantiles_per_bin=quantiles, limit=limit)
    write_lengths(fitted, output)
    typer.echo(f"{output}: {fitted.table['provenance']}")
    for begin, count in zip(fitted.prompt_bin_begin, fitted.bin_requests, strict=True):
        typer.echo(f"  from {begin:>6} prompt tokens: {count} requests")
