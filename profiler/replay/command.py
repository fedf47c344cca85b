"""The command `step-oracle replay`: options to a replay, and its outcome to the terminal."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from oracle_server.errors import InvalidArgument
from profiler.replay import recorded, workload
from profiler.replay.job import ROUTERS
from profiler.replay.replay import ReplayRequest, Workload, document_bytes, replay
from profiler.replay.report import ProgressBar, print_replay

_ENGINE_ID = "replay"
# Columns of a table beside a measured run, where no terminal says how many there are.
_WIDTH = 170


@dataclass(frozen=True)
class ReplayOptions:
    """One field per option of the command."""

    pack: Path
    model_config: Path
    requests: tuple[Path, ...]
    real_run: Path | None
    engine_args: str
    json_file: Path | None
    vllm: Path | None
    limit: int | None
    users: int
    loop_requests: int
    prompt_tokens: int
    output_tokens: int
    engines: int
    router: str
    seeds: tuple[int, ...]
    engine_id: str
    trace: str
    support: str
    allow_mismatch: str
    null_oracle: bool
    compiled: bool


def run_replay(options: ReplayOptions) -> None:
    """Replays, prints the tables and writes the file asked for."""
    if options.router not in ROUTERS:
        raise InvalidArgument(f"--router is {options.router!r}; known are {', '.join(ROUTERS)}", field="router")
    if options.support not in ("serve", "refuse"):
        raise InvalidArgument(f"--support is {options.support!r}; serve or refuse", field="support")
    workloads, engine_id = _workloads(options)
    try:
        engine_args = tuple(shlex.split(options.engine_args))
    except ValueError as error:
        raise InvalidArgument(f"--engine-args is {options.engine_args!r}: {error}", field="engine_args") from error
    request = ReplayRequest(
        pack=options.pack,
        model_config=options.model_config,
        workloads=workloads,
        vllm=options.vllm,
        real_run=options.real_run,
        engine_args=engine_args,
        seeds=options.seeds,
        engine_id=engine_id,
        engines=options.engines,
        router=options.router,
        users=options.users,
        trace=options.trace,
        refuse_extrapolated=options.support == "refuse",
        allow_mismatch=tuple(name for name in options.allow_mismatch.split(",") if name),
        null_oracle=options.null_oracle,
        compiled=options.compiled,
    )
    with ProgressBar(len(workloads) * len(options.seeds) + options.null_oracle) as bar:
        outcome = replay(request, bar)
    console = Console(markup=False, highlight=False, emoji=False)
    if not console.is_terminal:
        console.width = _WIDTH
    print_replay(console, outcome)
    if options.json_file is not None:
        options.json_file.write_bytes(document_bytes(outcome.document))


def _workloads(options: ReplayOptions) -> tuple[list[Workload], str]:
    """What to replay, and the engine's id: a recorded engine keeps its own, for its draws depend on it."""
    if not options.requests:
        if not options.users or options.real_run is not None:
            raise InvalidArgument(
                "give --requests FILE, or --users N for a closed loop of --loop-requests requests of --prompt-tokens "
                "and --output-tokens",
                field="requests",
            )
        loop = workload.closed_loop(options.loop_requests, options.prompt_tokens, options.output_tokens)
        return [Workload(None, loop)], options.engine_id or _ENGINE_ID
    if any(map(recorded.is_trace, options.requests)):
        if len(options.requests) > 1:
            raise InvalidArgument("a step trace is repeated alone: give --requests once", field="requests")
        if options.users or options.real_run is not None or options.limit is not None:
            raise InvalidArgument("a step trace is repeated as it is: no --users, no --limit, no --real-run")
        (path,) = options.requests
        run = recorded.read_recorded(path)
        return [Workload(path.name, run.requests)], options.engine_id or run.engine_id
    if options.users and options.real_run is not None:
        raise InvalidArgument("a measured run has arrivals of its own: --users and --real-run exclude each other")
    if options.real_run is not None and options.limit is not None:
        raise InvalidArgument("a measured run is compared whole: --limit and --real-run exclude each other")
    workloads = [Workload(path.name, workload.read_workload(path, options.limit)) for path in options.requests]
    return workloads, options.engine_id or _ENGINE_ID
