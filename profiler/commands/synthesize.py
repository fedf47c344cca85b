"""`step-oracle synthesize`."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from profiler.commands.options import Output

app = typer.Typer()


class KvBasis(StrEnum):
    """How a given block count is known."""

    MEASURED = "measured"
    ASSUMED = "assumed"


@app.command()
def synthesize(
    system: Annotated[str, typer.Option(help="Accelerator, for example h100_sxm.")],
    model: Annotated[Path, typer.Option(help="Local directory with the model's config.json.")],
    output: Output,
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
    kv_cache_dtype: Annotated[str, typer.Option(help="As the engine is told: auto, or fp8.")] = "auto",
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
            kv_cache_dtype=kv_cache_dtype,
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
    if limits is None:
        typer.echo("  How far the truth lies from these latencies is not known: no run on such a device was compared.")
        return
    typer.echo(
        f"  The truth is expected {limits.low_percent:+g} to {limits.high_percent:+g} % from these latencies "
        f"({limits.basis}); no claim on TTFT under load."
    )


def _blocks(text: str) -> int | None:
    if text == "estimated":
        return None
    try:
        return int(text)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is neither a number of blocks nor `estimated`") from None
