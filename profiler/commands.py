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


@app.command()
def rescale(
    directory: Annotated[Path, typer.Argument(metavar="PACK", help="Directory of a composed pack.")],
    on: Annotated[Path, typer.Option(help="Measured steps: a table (.parquet, .csv), BLIS's step table or a trace.")],
    output: _Output,
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
    control: Annotated[str, typer.Option(help="LLM-Emu's own oracle, for comparison: k1, k2 ... or auto.")] = "",
    min_samples: Annotated[int, typer.Option(min=1, max=1_000_000, help="Samples to draw from at least.")] = 30,
    drop_longer_than_ms: Annotated[
        float | None, typer.Option(min=0.001, help="Leave longer samples out; recorded as a correction.")
    ] = None,
) -> None:
    """Import an LLM-Emu profile pack as a sampled pack."""
    from profiler.llm_emu import read_llm_emu
    from profiler.llm_emu_pack import ImportOptions, write_llm_emu

    parsed = read_llm_emu(file)
    options = ImportOptions(
        kv_blocks=kv_blocks,
        block_size=block_size,
        name=name,
        architecture=architecture,
        dtype=dtype,
        licence=licence,
        control=control,
        min_samples=min_samples,
        drop_longer_than_ms=drop_longer_than_ms,
    )
    written = write_llm_emu(parsed, options, output)
    typer.echo(f"{output}  {written.digest}")
    for table, report in parsed.reports.items():
        typer.echo(
            f"  {table:<8} {report.cells} cells, {report.samples} samples, {report.thin_cells} cells below 30; "
            f"{report.tail_samples} samples above 3 x their cell's median hold {100 * report.tail_time_share:.1f} % of "
            f"the time, the longest {report.largest_ms:.1f} ms"
        )
    if not control:
        typer.echo(
            f"  steps after prefill work: {written.tail_samples} decode samples hold "
            f"{100 * written.tail_time_share:.1f} % of decode time; {written.continuation_samples} samples go on with "
            f"a chunked prefill; context tokens {'are the third axis' if written.has_context else 'are not known'}"
        )
    if written.dropped_samples:
        typer.echo(f"  dropped: {written.dropped_samples} samples above {drop_longer_than_ms:g} ms")
    typer.echo(f"  left out: {', '.join(parsed.left_out) or 'nothing'}")


@_import.command("llmservingsim")
def import_llmservingsim(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="The bundle, as it is published.")],
    model_config: Annotated[Path, typer.Option(help="The model's config.json, under any name.")],
    output: _Output,
    tp: Annotated[int, typer.Option(min=1, help="Tensor-parallel size the tables are of.")] = 1,
    dp: Annotated[int, typer.Option(min=1, help="Data-parallel size.")] = 1,
    ep: Annotated[int, typer.Option(min=1, help="Expert-parallel size.")] = 1,
    link_gbytes_per_s: Annotated[
        float | None, typer.Option(help="One direction of a link between ranks, gigabytes per second.")
    ] = None,
    link_latency_us: Annotated[float | None, typer.Option(help="One hop over that link.")] = None,
    kv_blocks: Annotated[int | None, typer.Option(min=1, help="KV blocks per rank that an engine logged.")] = None,
    kv_blocks_assumed: Annotated[int | None, typer.Option(min=1, help="KV blocks per rank nobody measured.")] = None,
    device_memory_gib: Annotated[
        float | None, typer.Option(min=0.1, help="Memory of the device, where the bundle does not say.")
    ] = None,
    graph_capture_sizes: Annotated[
        str, typer.Option(help="Pads decode-only steps to the next of these, for example 1,2,4,8.")
    ] = "",
    host_us_per_step: Annotated[
        float, typer.Option(min=0.0, help="Host time of a step that the device does not hide.")
    ] = 0.0,
    host_us_per_sequence: Annotated[float, typer.Option(min=0.0, help="The same, for each request of a step.")] = 0.0,
    licence: Annotated[str, typer.Option(help="SPDX expression of the data.")] = "unknown",
    name: Annotated[str | None, typer.Option(help="Name of the pack.")] = None,
) -> None:
    """Import an LLMServingSim bundle of measured operators as a composed pack."""
    from profiler.llmservingsim import ImportRequest, RingLink, read_bundle
    from profiler.llmservingsim_pack import write_bundle

    if (link_gbytes_per_s is None) != (link_latency_us is None):
        raise typer.BadParameter("--link-gbytes-per-s and --link-latency-us describe one link: give both or neither")
    link = None
    if link_gbytes_per_s is not None and link_latency_us is not None:
        link = RingLink(link_gbytes_per_s * 1e9, link_latency_us * 1e-6, "given to the import")
    bundle = read_bundle(
        ImportRequest(
            directory=directory,
            model_config=model_config,
            tensor_parallel=tp,
            data_parallel=dp,
            expert_parallel=ep,
            link=link,
            kv_blocks=kv_blocks,
            kv_blocks_assumed=kv_blocks_assumed,
            device_memory_bytes=None if device_memory_gib is None else device_memory_gib * 2**30,
            graph_capture_sizes=_sizes(graph_capture_sizes),
            host_ns_per_step=host_us_per_step * 1e3,
            host_ns_per_sequence=host_us_per_sequence * 1e3,
            licence=licence,
            name=name,
        )
    )
    digest = write_bundle(bundle, output)
    typer.echo(f"{output}  {digest}")
    cache = bundle.kv_cache
    typer.echo(f"  KV blocks: {cache.blocks} of {cache.block_size} tokens, {cache.basis} ({cache.source})")
    for operator in bundle.operators:
        points = " x ".join(str(len(axis)) for axis in operator.points)
        typer.echo(f"  {operator.name:<20} {points} points, {operator.summary()}")
    if bundle.skew is not None:
        decode, mixed = bundle.skew
        typer.echo(f"  skew                 decode {decode.coefficient:.4f}, mixed {mixed.coefficient:.4f}")


@app.command("replay")
def replay_command(
    pack: Annotated[Path, typer.Option(help="Directory of the pack that answers.")],
    model_config: Annotated[Path, typer.Option(help="The model's config.json, under any name, or its directory.")],
    requests: Annotated[
        Path | None,
        typer.Option(help="Requests: ShareGPT-like JSONL with token ids, Mooncake JSONL, Azure CSV, or a step trace."),
    ] = None,
    real_run: Annotated[
        Path | None, typer.Option(help="Measured run of these requests (requests.jsonl, meta.json) to compare with.")
    ] = None,
    engine_args: Annotated[str, typer.Option(help="Arguments of `vllm serve`, in one string.")] = "",
    json_file: Annotated[Path | None, typer.Option("--json", help="Write everything into this file.")] = None,
    vllm: Annotated[
        Path | None, typer.Option(help="Virtual environment with vLLM [default: the one this command runs in].")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Take the first requests of the file only.")] = None,
    users: Annotated[int, typer.Option(min=0, help="Closed loop of so many users; 0: requests have arrivals.")] = 0,
    loop_requests: Annotated[int, typer.Option(min=1, help="Requests of a closed loop without --requests.")] = 256,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Prompt of each of them.")] = 1024,
    output_tokens: Annotated[int, typer.Option(min=1, help="Output of each of them.")] = 128,
    engines: Annotated[int, typer.Option(min=1, help="Engines behind the router.")] = 1,
    router: Annotated[str, typer.Option(help="round_robin or least_requests.")] = "round_robin",
    seed: Annotated[int, typer.Option(min=0, help="Seed of the first run; the next ones count up.")] = 0,
    runs: Annotated[int, typer.Option(min=1, help="Runs, all in one process.")] = 1,
    engine_id: Annotated[str, typer.Option(help="Engine id, part of every draw.")] = "",
    trace: Annotated[str, typer.Option(help="Path prefix of step traces, one file per engine.")] = "",
    support: Annotated[str, typer.Option(help="serve or refuse steps the pack has no data for.")] = "serve",
    allow_mismatch: Annotated[str, typer.Option(help="Fields that may differ from the pack, comma separated.")] = "",
    null_oracle: Annotated[
        bool, typer.Option("--null-oracle", help="Run once more without the oracle's cost and print the ratio.")
    ] = False,
) -> None:
    """Run the real vLLM scheduler on a virtual clock: what a deployment would have done, in seconds."""
    from profiler.replay.command import ReplayOptions, run_replay

    run_replay(
        ReplayOptions(
            pack=pack,
            model_config=model_config,
            requests=requests,
            real_run=real_run,
            engine_args=engine_args,
            json_file=json_file,
            vllm=vllm,
            limit=limit,
            users=users,
            loop_requests=loop_requests,
            prompt_tokens=prompt_tokens,
            output_tokens=output_tokens,
            engines=engines,
            router=router,
            seeds=tuple(range(seed, seed + runs)),
            engine_id=engine_id,
            trace=trace,
            support=support,
            allow_mismatch=allow_mismatch,
            null_oracle=null_oracle,
        )
    )


@app.command("fit")
def fit_steps(
    samples: Annotated[
        Path, typer.Argument(metavar="SAMPLES", help="Measured steps: Parquet, CSV, a step trace, or BLIS's table.")
    ],
    output: _Output,
    device: Annotated[str, typer.Option(help="Name of the device, as engines are told it.")],
    device_memory_gib: Annotated[float, typer.Option(min=0.1, help="Memory of one device.")],
    form: Annotated[str, typer.Option("--format", help="auto, table, trace or blis.")] = "auto",
    kv_blocks: Annotated[int | None, typer.Option(min=1, help="KV blocks per rank that an engine logged.")] = None,
    kv_blocks_assumed: Annotated[int | None, typer.Option(min=1, help="KV blocks per rank nobody measured.")] = None,
    block_size: Annotated[int, typer.Option(min=1, help="Tokens per KV block.")] = 16,
    model: Annotated[str, typer.Option(help="The model's id.")] = "unknown",
    model_config: Annotated[
        Path | None, typer.Option(help="The model's config.json: engines are then compared with its shape.")
    ] = None,
    tp: Annotated[int, typer.Option(min=1, help="Tensor-parallel size the steps are of.")] = 1,
    vllm: Annotated[str | None, typer.Option(help="vLLM version the steps are of.")] = None,
    graph_capture_sizes: Annotated[
        str, typer.Option(help="Pads decode-only steps to the next of these, for example 1,2,4,8.")
    ] = "",
    licence: Annotated[str, typer.Option(help="SPDX expression of the data.")] = "unknown",
    name: Annotated[str | None, typer.Option(help="Name of the pack.")] = None,
) -> None:
    """Fit a hybrid pack to measured steps: physics terms, learned ratios, residual samples."""
    from profiler.hybrid_pack import FitRequest, fit, write_fit
    from profiler.hybrid_report import report_lines

    config = None
    if model_config is not None:
        from profiler.model_config import read_model_config_file

        config = read_model_config_file(model_config)
    fitted = fit(
        FitRequest(
            samples=samples,
            device_name=device,
            device_memory_bytes=int(device_memory_gib * 2**30),
            form=form,
            kv_blocks=kv_blocks,
            kv_blocks_assumed=kv_blocks_assumed,
            block_size=block_size,
            model_id=model,
            model_shape=config.shape if config else "",
            dtype=config.dtype if config else "",
            tensor_parallel=tp,
            vllm_version=vllm,
            graph_capture_sizes=_sizes(graph_capture_sizes),
            licence=licence,
            name=name,
        )
    )
    digest = write_fit(fitted, output)
    typer.echo(f"{output}  {digest}")
    cache = fitted.kv_cache
    typer.echo(f"  KV blocks: {cache.blocks} of {cache.block_size} tokens, {cache.basis} ({cache.source})")
    for line in report_lines(fitted.file, fitted.model, fitted.regions):
        typer.echo(line)


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
            _print_json([{**file._asdict(), "source": file.source._asdict()} for file in files])
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
        _print_json({"folder": str(output), "fetched": fetched, "present": len(files) - len(fetched)})
        return
    typer.echo(f"{len(fetched)} files fetched, {len(files) - len(fetched)} were there: STEP_ORACLE_DATA={output}")


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


def _sizes(text: str) -> tuple[int, ...]:
    try:
        return tuple(sorted({int(size) for size in text.split(",") if size}))
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not a list of sizes such as 1,2,4,8") from None


def _print_json(value: Any) -> None:
    import json

    typer.echo(json.dumps(value, indent=2))
