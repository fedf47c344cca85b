"""`step-oracle fit`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from profiler.commands.options import Output, sizes

app = typer.Typer()


@app.command("fit")
def fit_steps(
    samples: Annotated[
        Path, typer.Argument(metavar="SAMPLES", help="Measured steps: Parquet, CSV, a step trace, or BLIS's table.")
    ],
    output: Output,
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
            graph_capture_sizes=sizes(graph_capture_sizes),
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
