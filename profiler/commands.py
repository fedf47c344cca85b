"""The profiler's own verbs. Each function reads options, calls one module and prints what came of it."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from profiler.cli import standard_library_main

app = typer.Typer()
_import = typer.Typer(name="import", help="Turn a foreign profile into a pack.")
_pack = typer.Typer(name="pack", help="Profile packs: check, show, upload, list.")
_lengths = typer.Typer(name="lengths", help="Tables of output lengths.")
app.add_typer(_import)
app.add_typer(_pack)
app.add_typer(_lengths)

_Output = Annotated[Path, typer.Option("--output", "-o", help="Directory of the new pack; must not exist.")]


class KvBasis(StrEnum):
    """How a given block count is known."""

    MEASURED = "measured"
    ASSUMED = "assumed"


@app.command()
def synthesize(
    system: Annotated[str, typer.Option(help="Accelerator, for example h100_sxm.")],
    model: Annotated[Path, typer.Option(help="Local directory with the model's config.json.")],
    output: _Output,
    tp: Annotated[int, typer.Option(help="Tensor-parallel size.")] = 1,
    vllm: Annotated[str | None, typer.Option(help="vLLM version the pack stands for, for example 0.24.0.")] = None,
    async_scheduling: Annotated[
        bool | None, typer.Option(help="Whether the engine schedules asynchronously [default: as the version does].")
    ] = None,
    kv_blocks: Annotated[str, typer.Option(help="KV blocks per rank, or `estimated`.")] = "estimated",
    kv_blocks_basis: Annotated[KvBasis, typer.Option(help="How a given --kv-blocks is known.")] = KvBasis.ASSUMED,
    block_size: Annotated[int, typer.Option(help="Tokens per KV block.")] = 16,
    gpu_memory_utilization: Annotated[float, typer.Option(help="Share of device memory vLLM may take.")] = 0.9,
    max_num_batched_tokens: Annotated[int | None, typer.Option(help="Ties the pack to this limit.")] = None,
    max_num_seqs: Annotated[int | None, typer.Option(help="Ties the pack to this limit.")] = None,
    max_model_len: Annotated[int | None, typer.Option(help="Ties the pack to this limit.")] = None,
    dtype: Annotated[str | None, typer.Option(help="Overrides the checkpoint's dtype.")] = None,
    link_gbytes_per_s: Annotated[
        float | None, typer.Option(help="All-reduce bus bandwidth of your machine, as nccl-tests prints it (busbw).")
    ] = None,
    link_latency_us: Annotated[
        float | None, typer.Option(help="All-reduce time of the smallest message, from the same run.")
    ] = None,
    allow_transferred: Annotated[
        bool, typer.Option(help="Take tables that are missing from another device or shape.")
    ] = False,
    corrections: Annotated[bool, typer.Option(help="Apply the named corrections.")] = True,
    name: Annotated[str | None, typer.Option(help="Name of the pack.")] = None,
) -> None:
    """Make a pack from published operator tables: no GPU and no capture needed."""
    from profiler.operators import Link
    from profiler.synthesize import SynthesisRequest, write_synthesis
    from profiler.synthesize import synthesize as run

    if (link_gbytes_per_s is None) != (link_latency_us is None):
        raise typer.BadParameter("--link-gbytes-per-s and --link-latency-us describe one link: give both or neither")
    link = None
    if link_gbytes_per_s is not None and link_latency_us is not None:
        link = Link(link_gbytes_per_s * 1e9, link_latency_us * 1e-6)
    synthesis = run(
        SynthesisRequest(
            system=system,
            model_directory=model,
            tensor_parallel=tp,
            vllm_version=vllm,
            async_scheduling=async_scheduling,
            kv_blocks=_blocks(kv_blocks),
            kv_blocks_basis=kv_blocks_basis.value,
            block_size=block_size,
            gpu_memory_utilization=gpu_memory_utilization,
            max_num_batched_tokens=max_num_batched_tokens,
            max_num_seqs=max_num_seqs,
            max_model_len=max_model_len,
            dtype=dtype,
            link=link,
            allow_transferred=allow_transferred,
            corrections=corrections,
            name=name,
        )
    )
    digest = write_synthesis(synthesis, output)
    typer.echo(f"{output}  {digest}")
    typer.echo(f"  {synthesis.model.model_id} on {synthesis.system.device_name}, TP{tp}")
    typer.echo(f"  KV blocks: {synthesis.kv_blocks} ({synthesis.kv_source})")
    for operator in synthesis.operators:
        typer.echo(f"  {operator.name:<20} {operator.summary()}")
    if synthesis.transferred:
        typer.echo(f"  transferred: {', '.join(synthesis.transferred)}")
    limits = synthesis.uncertainty
    typer.echo(
        f"  The truth is expected {limits.low_percent:+g} to {limits.high_percent:+g} % from these latencies "
        f"({limits.basis}); no claim on TTFT under load."
    )


@_import.command("llm-emu")
def import_llm_emu(
    file: Annotated[Path, typer.Argument(help="LLM-Emu profile pack, JSON 2.0 or 2.1.")],
    output: _Output,
    kv_blocks: Annotated[int | None, typer.Option(min=1, help="KV blocks, where the file does not say.")] = None,
    block_size: Annotated[
        int | None, typer.Option(min=1, help="Tokens per block, where the file does not say.")
    ] = None,
    architecture: Annotated[
        str, typer.Option(help="Model class, for example Qwen3ForCausalLM: engines are then compared with the shape.")
    ] = "",
    dtype: Annotated[str, typer.Option(help="Model dtype; the file does not say.")] = "",
    licence: Annotated[str, typer.Option(help="SPDX expression of the data.")] = "unknown",
    name: Annotated[str | None, typer.Option(help="Name of the pack.")] = None,
) -> None:
    """Import an LLM-Emu profile pack as a sampled pack."""
    from profiler.llm_emu import ImportOptions, read_llm_emu, write_llm_emu

    parsed = read_llm_emu(file)
    options = ImportOptions(
        kv_blocks=kv_blocks, block_size=block_size, name=name, architecture=architecture, dtype=dtype, licence=licence
    )
    digest = write_llm_emu(parsed, options, output)
    typer.echo(f"{output}  {digest}")
    for table, report in parsed.reports.items():
        typer.echo(
            f"  {table:<8} {report.cells} cells, {report.samples} samples, {report.thin_cells} cells below 30; "
            f"{report.tail_samples} samples above 3 x their cell's median hold {100 * report.tail_time_share:.1f} % of "
            f"the time, the longest {report.largest_ms:.1f} ms"
        )
    typer.echo(f"  left out: {', '.join(parsed.left_out) or 'nothing'}")


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
        _print_json(pack_summary.summary_json(report, surfaces))
        return
    from rich.console import Console

    small = surfaces_of(
        compiled,
        per_octave=1,
        most_rows=pack_summary.TERMINAL_ROWS,
        most_columns=pack_summary.TERMINAL_COLUMNS,
    )
    pack_summary.print_summary(Console(markup=False, highlight=False, emoji=False), report, small)


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


# `main` runs the next two before this tree exists; they are here for --help alone.
_PASS_ALL = {"allow_extra_args": True, "ignore_unknown_options": True}


@app.command("doctor", context_settings=_PASS_ALL, add_help_option=False)
def doctor(context: typer.Context) -> None:
    """Say what this environment can do and what is missing."""
    raise typer.Exit(standard_library_main("doctor", list(context.args)))


@app.command("vllm-install", context_settings=_PASS_ALL, add_help_option=False)
def vllm_install(context: typer.Context) -> None:
    """Make an environment that serves vLLM on a machine without a GPU."""
    raise typer.Exit(standard_library_main("vllm-install", list(context.args)))


def _blocks(text: str) -> int | None:
    if text == "estimated":
        return None
    try:
        return int(text)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is neither a number of blocks nor `estimated`") from None


def _print_json(value: Any) -> None:
    import json

    typer.echo(json.dumps(value, indent=2))
