"""`step-oracle vllm-check`."""

from __future__ import annotations

from typing import Annotated

import typer

app = typer.Typer()


@app.command("vllm-check")
def vllm_check(
    releases: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[VERSION|WHEEL|FOLDER]...", help="Versions on pip's index, wheel files, or environments."
        ),
    ] = None,
    every: Annotated[
        bool, typer.Option("--all", help="Every release on the index, from the oldest supported.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print data instead of text.")] = False,
    as_markdown: Annotated[bool, typer.Option("--markdown", help="Print a table for a document.")] = False,
) -> None:
    """Say from its source whether shim, replay and capture fit a vLLM release, and what moved."""
    from profiler.vllm_check.command import check, print_verdicts

    if as_json and as_markdown:
        raise typer.BadParameter("--json and --markdown exclude each other")
    if not print_verdicts(check(releases or [], every=every), as_json=as_json, as_markdown=as_markdown):
        raise typer.Exit(1)
