"""`step-oracle pack`: what the profiler adds to that group."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from profiler.commands.options import print_json

app = typer.Typer()
_pack = typer.Typer(name="pack", help="Profile packs: check, show, upload, list.")
app.add_typer(_pack)


@_pack.command("show")
def show_pack(
    directory: Annotated[Path, typer.Argument(metavar="PACK", help="Directory of the pack.")],
    png: Annotated[Path | None, typer.Option(help="Also draw the latency surfaces into this file.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print data instead of text.")] = False,
) -> None:
    """Say what a pack is, what it covers and how it is known; draw its latency surfaces."""
    from profiler import pack_summary
    from profiler.surface import read_pack, surfaces_of

    report, compiled = read_pack(directory)
    surfaces = surfaces_of(compiled)

    if png is not None:
        from profiler.surface_png import draw_surfaces

        manifest = report.manifest
        draw_surfaces(
            surfaces,
            png,
            title=manifest.name,
            subtitle=f"{pack_summary.headline(manifest)}   |   {manifest.kind}   |   {report.digest[:19]}",
            footer=f"{pack_summary.kv_line(manifest)}\n{pack_summary.uncertainty_line(manifest)}",
        )
    if as_json:
        print_json(pack_summary.summary_json(report, surfaces))
        return
    from rich.console import Console

    small = surfaces_of(
        compiled,
        per_octave=1,
        most_rows=pack_summary.TERMINAL_ROWS,
        most_columns=pack_summary.TERMINAL_COLUMNS,
    )
    pack_summary.print_summary(Console(markup=False, highlight=False, emoji=False), report, small)
