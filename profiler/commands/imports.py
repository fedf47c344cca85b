"""`step-oracle import`: foreign profiles."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from profiler.commands.options import Output, sizes

app = typer.Typer()
_import = typer.Typer(name="import", help="Turn a foreign profile into a pack.")
app.add_typer(_import)


@_import.command("llm-emu")
def import_llm_emu(
    file: Annotated[Path, typer.Argument(help="LLM-Emu profile pack, JSON 2.0 or 2.1.")],
    output: Output,
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
    output: Output,
    tp: Annotated[int, typer.Option(min=1, help="Tensor-parallel size the tables are of.")] = 1,
    dp: Annotated[int, typer.Option(min=1, help="Data-parallel ranks; of a MoE model they run in lock-step.")] = 1,
    ep: Annotated[int, typer.Option(min=1, help="Expert-parallel ranks of a MoE model: --tp times --dp.")] = 1,
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
    from profiler.llmservingsim import ImportRequest, read_bundle
    from profiler.llmservingsim_link import RingLink
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
            graph_capture_sizes=sizes(graph_capture_sizes),
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
