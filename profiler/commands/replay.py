"""`step-oracle replay`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer()


@app.command("replay")
def replay_command(
    pack: Annotated[Path, typer.Option(help="Directory of the pack that answers.")],
    model_config: Annotated[Path, typer.Option(help="The model's config.json, under any name, or its directory.")],
    requests: Annotated[
        list[Path] | None,
        typer.Option(
            help="Requests: ShareGPT-like JSONL with token ids, Mooncake JSONL, Azure CSV, or a step trace; give it "
            "again for runs of other files in the same process."
        ),
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
    router: Annotated[str, typer.Option(help="round_robin or least_requests; also for MoE ranks.")] = "round_robin",
    seed: Annotated[int, typer.Option(min=0, help="Seed of the first run; the next ones count up.")] = 0,
    runs: Annotated[int, typer.Option(min=1, help="Runs of each file, all in one process.")] = 1,
    engine_id: Annotated[str, typer.Option(help="Engine id, part of every draw.")] = "",
    trace: Annotated[str, typer.Option(help="Path prefix of step traces, one file per engine.")] = "",
    support: Annotated[str, typer.Option(help="serve or refuse steps the pack has no data for.")] = "serve",
    allow_mismatch: Annotated[str, typer.Option(help="Fields that may differ from the pack, comma separated.")] = "",
    null_oracle: Annotated[
        bool, typer.Option("--null-oracle", help="Run once more without the oracle's cost and print the ratio.")
    ] = False,
    compiled: Annotated[
        bool,
        typer.Option(
            "--compile",
            help="Run vLLM's scheduler compiled to C: the same bytes, sooner. Compiling takes about a minute, once per "
            "vLLM and Python: the cache keeps it. Needs Cython (pip install 'step-oracle[compile]') and a C compiler.",
        ),
    ] = False,
) -> None:
    """Run the real vLLM scheduler on a virtual clock: what a deployment would have done, in seconds."""
    from profiler.replay.command import ReplayOptions, run_replay

    run_replay(
        ReplayOptions(
            pack=pack,
            model_config=model_config,
            requests=tuple(requests or ()),
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
            compiled=compiled,
        )
    )
