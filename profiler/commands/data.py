"""`step-oracle data`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from profiler.commands.options import print_json

app = typer.Typer()


@app.command("data")
def published_data(
    base_url: Annotated[
        str | None, typer.Option(help="Fetch from this mirror of the data folder: https, or http on this machine.")
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to fetch into.")] = Path("data"),
    only: Annotated[str, typer.Option(help="Only files whose path begins so, for example llmservingsim/.")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print data instead of text.")] = False,
) -> None:
    """List the published measurements that tests and accuracy figures are from, or fetch them."""
    from profiler.published_data import fetch, files_below

    files = files_below(only)
    if base_url is None:
        if as_json:
            print_json([{**file._asdict(), "source": file.source._asdict()} for file in files])
            return
        for file in files:
            origin = f"{file.source.repository} {file.source.commit or '-'} {file.source.licence}"
            typer.echo(f"{file.sha256}  {file.size_bytes:>8}  {file.path}  {origin}")
        return
    fetched = []
    for file in fetch(files, base_url, output):
        fetched.append(file.path)
        if not as_json:
            typer.echo(f"{file.sha256}  {output / file.path}")
    if as_json:
        print_json({"folder": str(output), "fetched": fetched, "present": len(files) - len(fetched)})
        return
    typer.echo(f"{len(fetched)} files fetched, {len(files) - len(fetched)} were there: STEP_ORACLE_DATA={output}")
