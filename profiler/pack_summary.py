"""Says on a terminal, or as JSON, what a pack is, what it covers, how it is known and how far to trust it."""

from __future__ import annotations

import math
from typing import Any

import msgspec
import numpy as np
from rich.console import Console, Group
from rich.panel import Panel
from rich.style import Style
from rich.table import Table
from rich.text import Text

from oracle_server.pack import Manifest, PackReport
from profiler.surface import Surface, count_label, milliseconds_label

# viridis at seven even steps: dark is fast, bright is slow, as in the picture.
_RAMP = ("#440154", "#443983", "#31688e", "#21918c", "#35b779", "#90d743", "#fde725")
TERMINAL_COLUMNS = 9
TERMINAL_ROWS = 14


def print_summary(console: Console, report: PackReport, surfaces: tuple[Surface, ...]) -> None:
    """The whole of `pack show`; `console` must not interpret markup, since a pack's words are somebody else's."""
    manifest = _printable(report.manifest)
    console.print(
        Panel(_identity(report.digest, manifest), title=Text(manifest.name), title_align="left", expand=False)
    )
    console.print(_knowledge(manifest))
    if manifest.corrections:
        console.print(_corrections(manifest))
    console.print(_trust(manifest))
    for warning in report.warnings:
        console.print(Text.assemble(("warning: ", "yellow"), warning))
    for surface in surfaces:
        console.print(terminal_surface(surface))


def summary_json(report: PackReport, surfaces: tuple[Surface, ...]) -> dict[str, Any]:
    """Plain data: digest, warnings, the manifest as it is, and the surfaces (null where there is no sample)."""
    return {
        "digest": report.digest,
        "warnings": list(report.warnings),
        "manifest": msgspec.to_builtins(report.manifest),
        "surfaces": [
            {
                "title": surface.title,
                "x_name": surface.x_name,
                "y_name": surface.y_name,
                "x": list(surface.x),
                "y": list(surface.y),
                "latency_ms": [
                    [None if math.isnan(value) else round(float(value), 6) for value in row]
                    for row in surface.latency_ms
                ],
                "extrapolated": surface.weak.tolist(),
            }
            for surface in surfaces
        ],
    }


def headline(manifest: Manifest) -> str:
    """Model, device and parallelism in one line."""
    model = " ".join(part for part in (manifest.model.id, manifest.model.dtype, manifest.model.quantization) if part)
    parallel = manifest.parallel
    return f"{model} on {manifest.device.name}, TP{parallel.tensor} PP{parallel.pipeline} DP{parallel.data}"


def uncertainty_line(manifest: Manifest) -> str:
    """How far the truth may lie from the answers."""
    known = manifest.uncertainty
    if known is None:
        return "Uncertainty: not stated by the pack"
    return f"Truth lies {known.low_percent:+g} to {known.high_percent:+g} % from the answers ({known.basis})"


def kv_line(manifest: Manifest) -> str:
    """KV blocks, how they are known and from where."""
    cache = manifest.kv_cache
    tokens = cache.blocks * cache.block_size
    return f"{cache.blocks:,} KV blocks of {cache.block_size} ({tokens:,} tokens), {cache.basis}: {cache.source}"


def terminal_surface(surface: Surface) -> Group:
    """A heat map in text: milliseconds on the color of their logarithm, `·` for holes, `*` for extrapolated cells."""
    rows = _thinned(len(surface.y), TERMINAL_ROWS)
    columns = _thinned(len(surface.x), TERMINAL_COLUMNS)
    known = surface.latency_ms[np.isfinite(surface.latency_ms)]
    low, high = math.log(known.min()), math.log(max(known.max(), known.min() * 1.01))
    table = Table(box=None, pad_edge=False, padding=(0, 0), show_header=False)
    table.add_column(justify="right")
    for row in reversed(rows):
        cells: list[Text] = [Text(f"{surface.y[row]} ")]
        for column in columns:
            value = float(surface.latency_ms[row, column])
            cells.append(_cell(value, bool(surface.weak[row, column]), low, high))
        table.add_row(*cells)
    table.add_row(Text(""), *(Text(f"{count_label(surface.x[column])} ", justify="right") for column in columns))
    caption = f"{surface.title}, ms: {surface.y_name} (up) by {surface.x_name} (right)"
    marks = []
    if np.isnan(surface.latency_ms).any():
        marks.append("· no sample")
    if surface.weak.any():
        marks.append("* extrapolated")
    return Group(Text(""), Text(caption, style="bold"), table, Text("   ".join(marks), style="dim"))


def _cell(value: float, weak: bool, low: float, high: float) -> Text:
    if math.isnan(value):
        return Text("      · ", style="dim")
    place = (math.log(value) - low) / (high - low)
    index = min(len(_RAMP) - 1, int(place * len(_RAMP)))
    style = Style(color="black" if index >= 4 else "white", bgcolor=_RAMP[index])
    return Text(f"{milliseconds_label(value) + ('*' if weak else ' '):>8}", style=style)


def _thinned(count: int, most: int) -> list[int]:
    """At most `most` indices, evenly spread, both ends among them."""
    if count <= most:
        return list(range(count))
    return sorted({round(index * (count - 1) / (most - 1)) for index in range(most)})


def _printable(manifest: Manifest) -> Manifest:
    """The manifest without control characters, which a terminal would obey."""

    def clean(value: Any) -> Any:
        if isinstance(value, str):
            return "".join(character if character.isprintable() else "?" for character in value)
        if isinstance(value, dict):
            return {clean(key): clean(item) for key, item in value.items()}
        return [clean(item) for item in value] if isinstance(value, list | tuple) else value

    return msgspec.convert(clean(msgspec.to_builtins(manifest)), Manifest)


def _identity(digest: str, manifest: Manifest) -> Table:
    device, engine = manifest.device, manifest.engine
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim")
    table.add_column(overflow="fold")
    table.add_row("digest", digest)
    table.add_row("kind", f"{manifest.kind}, created {manifest.created}, licence {manifest.licence}")
    table.add_row("model", headline(manifest))
    table.add_row("shape", manifest.model.shape or "unknown (not compared with engines)")
    capability = f"{device.capability_major}.{device.capability_minor}" if device.capability_major else "unknown"
    table.add_row("device", f"{device.name}, {device.memory_bytes / 2**30:.1f} GiB, capability {capability}")
    tied = [f"{name}={value}" for name, value in msgspec.structs.asdict(engine).items() if value is not None]
    table.add_row("tied to", ", ".join(tied) or "no engine setting")
    table.add_row("KV cache", kv_line(manifest))
    rows = ", ".join(f"{file.name} {file.rows:,} rows, {file.size_bytes / 1024:,.0f} kB" for file in manifest.files)
    table.add_row("files", rows)
    for name, value in manifest.provenance.items():
        if not name.startswith("sha256 "):
            table.add_row(name, value)
    return table


def _knowledge(manifest: Manifest) -> Table:
    table = Table(title="Coverage", title_justify="left", title_style="bold", box=None, pad_edge=False)
    composed = manifest.latency.composed
    if composed is None:
        table.add_column("what")
        table.add_column("value", justify="right")
        for name, value in manifest.coverage.items():
            table.add_row(name, f"{value:,}" if isinstance(value, int) else str(value))
        return table
    table.add_column("operator")
    table.add_column("over")
    table.add_column("group")
    table.add_column("how its grid points are known")
    for operator in composed.operators:
        table.add_row(operator.name, ", ".join(operator.axes), operator.group, operator.knowledge)
    reach = ", ".join(f"{name} {value:,}" for name, value in manifest.coverage.items() if isinstance(value, int))
    table.caption = f"up to {reach}"
    table.caption_justify = "left"
    return table


def _corrections(manifest: Manifest) -> Table:
    table = Table(title="Corrections", title_justify="left", title_style="bold", box=None, pad_edge=False)
    table.add_column("name", no_wrap=True)
    table.add_column("value", justify="right")
    table.add_column("why, and where the number is from")
    for item in manifest.corrections:
        table.add_row(item.name, f"{item.value:g}", Text.assemble(item.reason, "\n", (item.source, "dim")))
    return table


def _trust(manifest: Manifest) -> Text:
    style = "yellow" if manifest.uncertainty is not None and manifest.uncertainty.high_percent > 15 else "green"
    return Text(f"\n{uncertainty_line(manifest)}; no claim on TTFT under load.", style=style)
