"""A replay from the pack to the JSON document: compile, start, follow, compare."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

from oracle_server.errors import InvalidArgument
from oracle_server.pack import PackReport, compile_pack
from profiler.replay import launch
from profiler.replay.compiler import compiled_folder
from profiler.replay.job import Job, Request, RunSpec, write_requests
from profiler.replay.metrics import METRICS, Latencies, error_percent, known, latencies, per_request_mape, summary
from profiler.replay.real_run import RealRun, read_real_run

SCHEMA = "step_oracle.replay/1"
_MEASURED = ("arrival_ns", "first_token_ns", "last_token_ns", "output_tokens")
_SUPPORT = {1: "exact", 2: "interpolated", 3: "extrapolated"}


@dataclass(frozen=True)
class Workload:
    """Requests of one run; `name` is their file's, None for those of a closed loop without a file."""

    name: str | None
    requests: Sequence[Request]


@dataclass(frozen=True)
class ReplayRequest:
    """What to replay: each workload with each seed, in one process.

    Either requests arrive at their times, or `users` send them one after the other.
    """

    pack: Path
    model_config: Path
    workloads: Sequence[Workload]
    vllm: Path | None = None
    real_run: Path | None = None
    engine_args: tuple[str, ...] = ()
    seeds: tuple[int, ...] = (0,)
    engine_id: str = "replay"
    engines: int = 1
    router: str = "round_robin"
    users: int = 0
    trace: str = ""
    refuse_extrapolated: bool = False
    allow_mismatch: tuple[str, ...] = ()
    null_oracle: bool = False
    # Run vLLM's scheduler compiled to C: the same document, sooner (compiler.py).
    compiled: bool = False


@dataclass(frozen=True)
class Speed:
    """How fast one run was; the only figures that differ from one replay to the next."""

    wall_seconds: float
    cpu_seconds: float
    virtual_seconds: float
    steps: int

    @property
    def times_real_time(self) -> float:
        return self.virtual_seconds / self.wall_seconds


@dataclass
class Replay:
    """What came of it. `document` is what --json writes: the same bytes for the same inputs."""

    document: dict[str, Any]
    start_seconds: float
    speeds: list[Speed] = field(default_factory=list)
    # The last run once more with its own latencies for answers: what the scheduler alone costs.
    null_speed: Speed | None = None
    real: RealRun | None = None
    replayed: list[Latencies] = field(default_factory=list)
    # Names of vLLM's modules that ran compiled.
    compiled_modules: tuple[str, ...] = ()


def replay(request: ReplayRequest, on_event: launch.OnEvent) -> Replay:
    """Runs everything; `on_event` sees the worker's events as they come."""
    if request.engines < 1 or request.users < 0 or not request.seeds or not request.workloads:
        raise InvalidArgument("at least one engine and one run are needed, and users cannot be negative")
    if request.real_run is not None and len(request.workloads) > 1:
        raise InvalidArgument("a measured run is one workload's: with --real-run give --requests once")
    python = launch.vllm_python(request.vllm)
    model = launch.model_folder(request.model_config)
    real = None if request.real_run is None else read_real_run(request.real_run, request.workloads[0].requests)
    workloads = request.workloads if real is None else [Workload(request.workloads[0].name, real.requests)]
    folder = Path(tempfile.mkdtemp(prefix="step-oracle-replay-"))
    try:
        report = compile_pack(request.pack, folder / "pack")
        modules = str(compiled_folder(python, on_event)) if request.compiled else ""
        files = [folder / f"requests-{i}.jsonl" for i in range(len(workloads))]
        for file, workload in zip(files, workloads, strict=True):
            write_requests(file, workload.requests)
        runs = list(product(files, request.seeds))
        specs = [
            RunSpec(seed, _trace_prefix(request, i, len(runs)), requests=str(file))
            for i, (file, seed) in enumerate(runs)
        ]
        if request.null_oracle:
            # Right behind the run whose latencies it repeats.
            specs.append(replace(specs[-1], trace_prefix="", null_oracle=True))
        job = Job(
            compiled_pack=str(folder / "pack"),
            model=str(model),
            requests=str(files[0]),
            results=str(folder),
            engine_args=request.engine_args,
            engine_defaults={} if real is None else real.engine_defaults,
            runs=tuple(specs),
            engine_id=request.engine_id,
            engines=request.engines,
            router=request.router,
            users=request.users,
            refuse_extrapolated=request.refuse_extrapolated,
            allow_mismatch=request.allow_mismatch,
            compiled_modules=modules,
        )
        events: list[dict[str, Any]] = []

        def keep(event: dict[str, Any]) -> None:
            if event["event"] != "progress":
                events.append(event)
            on_event(event)

        launch.run_worker(python, job, report.manifest, folder, keep)
        return _assemble(request, report, real, events)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _trace_prefix(request: ReplayRequest, run: int, runs: int) -> str:
    if not request.trace:
        return ""
    prefix = f"{Path(request.trace).absolute()}{'/' if request.trace.endswith('/') else ''}"
    return prefix if runs == 1 else f"{prefix}run{run}-"


def _assemble(
    request: ReplayRequest, report: PackReport, real: RealRun | None, events: Sequence[Mapping[str, Any]]
) -> Replay:
    started = next(event for event in events if event["event"] == "started")
    runs = [(event, json.loads(Path(event["path"]).read_bytes())) for event in events if event["event"] == "run"]
    if real is not None and started["rejected"]:
        raise InvalidArgument(
            f"the engine would refuse {len(started['rejected'])} requests of the measured run for their length, "
            f"{started['rejected'][0]} first; give --engine-args '--max-model-len N'"
        )
    document: dict[str, Any] = {
        "schema": SCHEMA,
        "pack": report.digest,
        "vllm_version": started["vllm_version"],
        "engine": started["engine"],
        "engines": request.engines,
        "router": request.router if max(request.engines, started["engine"]["data_parallel_size"]) > 1 else None,
        "users": request.users or None,
        "warnings": started["warnings"],
        "unmeasured_requests": None if real is None else real.unmeasured,
        "runs": [],
    }
    result = Replay(document, started["seconds"], real=real, compiled_modules=tuple(started["compiled_modules"]))
    for event, run in runs:
        times = run["requests"]
        finished_ns = max(entry["last_token_ns"] for entry in times)
        begin_ns = min(entry["arrival_ns"] for entry in times)
        speed = Speed(event["wall_seconds"], event["cpu_seconds"], (finished_ns - begin_ns) * 1e-9, sum(run["steps"]))
        if run["null_oracle"]:
            result.null_speed = speed
            continue
        result.speeds.append(speed)
        columns = {key: [entry[key] for entry in times] for key in _MEASURED}
        replayed = latencies(**columns)
        result.replayed.append(replayed)
        name = request.workloads[len(document["runs"]) // len(request.seeds)].name
        document["runs"].append({"requests_file": name, **_run_document(run, replayed, real, speed.virtual_seconds)})
    first = document["runs"][0]
    for key in ("error_percent", "per_request_mape", "metrics_ms", "extrapolated", "rejected_requests"):
        if key in first:
            document[key] = first[key]
    return result


def _run_document(run: Mapping[str, Any], replayed: Latencies, real: RealRun | None, seconds: float) -> dict[str, Any]:
    times = run["requests"]
    output = sum(entry["output_tokens"] for entry in times)
    compared: dict[str, Any] = {}
    if real is not None:
        compared = {
            "error_percent": error_percent(replayed, real.latencies),
            "per_request_mape": per_request_mape(replayed, real.latencies),
        }
    steps: dict[str, int] = {}
    busy: dict[str, int] = {}
    for counts in run["support"]:
        for number, name in _SUPPORT.items():
            steps[name] = steps.get(name, 0) + counts["steps"].get(str(number), 0)
            busy[name] = busy.get(name, 0) + counts["device_ns"].get(str(number), 0)
    return {
        "seed": run["seed"],
        "rejected_requests": run["rejected"],
        **compared,
        "metrics_ms": {name: summary(getattr(replayed, name)) for name in METRICS},
        "metrics_requests": {name: len(known(getattr(replayed, name))) for name in METRICS},
        "virtual_seconds": seconds,
        "output_tokens_per_second": output / seconds if seconds else 0.0,
        "steps": sum(run["steps"]),
        "dummy_steps": sum(run["dummy_steps"]),
        "device_busy_seconds": sum(run["device_busy_ns"]) * 1e-9,
        "output_tokens": output,
        "prefix_hit_tokens": sum(entry["prefix_hit_tokens"] for entry in times),
        "preemptions": sum(entry["preemptions"] for entry in times),
        "support_steps": steps,
        "extrapolated": {
            "steps_percent": 100 * steps["extrapolated"] / max(sum(steps.values()), 1),
            "device_time_percent": 100 * busy["extrapolated"] / max(sum(busy.values()), 1),
        },
        "requests": times,
    }


def document_bytes(document: Mapping[str, Any]) -> bytes:
    """The JSON file: keys in a fixed order, floats in their shortest exact form."""
    return (json.dumps(document, indent=1, sort_keys=True) + "\n").encode()
