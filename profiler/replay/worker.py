"""The process that holds the engines: `python -m profiler.replay.worker JOB.json FD`, in vLLM's environment.

It reads the job, starts the engines once, makes the runs one after the other and writes one JSON file per run. What
happens goes to the file descriptor FD, one JSON object per line: started, progress, run, error.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from oracle_server.errors import InvalidArgument, OracleError
from profiler.replay import compiled
from profiler.replay.job import Job, Request, RunSpec, read_job, read_requests

if TYPE_CHECKING:
    from profiler.replay.lock_step import WaveRules

_PROGRESS_SECONDS = 0.2


def main(argv: list[str]) -> int:
    with os.fdopen(int(argv[1]), "w", encoding="utf-8", buffering=1) as events:
        try:
            _Worker(read_job(Path(argv[0])), events).run()
        except OracleError as error:
            _tell(events, "error", kind="refused", message=error.message)
            return 1
        except Exception as error:  # noqa: BLE001  whatever vLLM raises is told to the parent, in one line and whole
            traceback.print_exc()
            _tell(events, "error", kind=type(error).__name__, message=str(error).strip())
            return 1
    return 0


class _Worker:
    def __init__(self, job: Job, events: TextIO) -> None:
        self._job = job
        self._events = events

    def run(self) -> None:
        job = self._job
        start = time.perf_counter()
        if job.compiled_modules:
            compiled.install(Path(job.compiled_modules))
        from vllm.version import __version__ as vllm_version

        from oracle_server.pack.load import load_compiled, open_oracle
        from oracle_server.pack.manifest import host_time, wake_curve
        from profiler.replay import clock
        from profiler.replay.engine import ReplayEngine
        from profiler.replay.executor import ReplayContext
        from profiler.replay.fleet import Fleet
        from profiler.replay.lock_step import LockStepGroup

        pack = load_compiled(Path(job.compiled_pack))
        self._oracle = open_oracle(pack)
        self._wake, self._host = wake_curve(pack.manifest.latency), host_time(pack.manifest.latency)
        self._oracle.warm()
        ranks = _data_parallel_size(job)
        config = _vllm_config(job, ranks)
        self._names = _engine_names(job, ranks)
        contexts = [ReplayContext(pack.manifest, name, job.allow_mismatch, ranks) for name in self._names]
        virtual_time = clock.VirtualTime(contexts[0].clock)
        clock.install(virtual_time)
        configs = [config, *(_vllm_config(job, ranks) for _ in contexts[1:])]
        self._engines = [
            ReplayEngine(i, config, context) for i, (config, context) in enumerate(zip(configs, contexts, strict=True))
        ]
        self._group = None
        if ranks > 1:
            self._group = LockStepGroup(self._engines, job.router, virtual_time, _wave_rules(configs[0]))
        self._fleet = Fleet([self._group] if self._group else self._engines, job.router, virtual_time)
        files = dict.fromkeys([job.requests, *(spec.requests for spec in job.runs if spec.requests)])
        workloads = {file: self._admissible(read_requests(Path(file))) for file in files}
        requests, rejected = workloads[job.requests]
        _tell(
            self._events,
            "started",
            seconds=time.perf_counter() - start,
            vllm_version=vllm_version,
            engine=self._engines[0].executor.facts,
            warnings=sorted({sentence for context in contexts for sentence in context.warnings}),
            rejected=rejected,
            requests=len(requests),
            compiled_modules=compiled.imported(),
        )
        _collect_less_garbage()
        latencies: list[list[int]] = []
        for number, spec in enumerate(job.runs):
            requests, rejected = workloads[spec.requests or job.requests]
            latencies = self._run(number, spec, requests, latencies, rejected)
        for engine in self._engines:
            engine.shutdown()

    def _admissible(self, requests: list[Request]) -> tuple[list[Request], list[str]]:
        """Requests vLLM's front-end would take, and the ids of those it would refuse for their length."""
        limit = self._engines[0].max_model_len
        taken = [request for request in requests if request.prompt_tokens + request.output_tokens <= limit]
        if not taken:
            raise InvalidArgument(
                f"no request fits the engine's max_model_len of {limit}; give --engine-args '--max-model-len N'"
            )
        fitting = {request.request_id for request in taken}
        return taken, [request.request_id for request in requests if request.request_id not in fitting]

    def _run(
        self,
        number: int,
        spec: RunSpec,
        requests: Sequence[Request],
        before: list[list[int]],
        rejected: Sequence[str],
    ) -> list[list[int]]:
        """Writes the run's file; `before` are the latencies of the run before, by engine, and so is the answer."""
        from profiler.replay.local_oracle import LocalOracle

        oracles = []
        for i, engine in enumerate(self._engines):
            oracle = LocalOracle(
                self._oracle,
                seed=spec.seed,
                engine_id=self._names[i],
                refuse_extrapolated=self._job.refuse_extrapolated,
                latencies_ns=before[i] if spec.null_oracle else None,
                wake=self._wake,
                host=self._host,
            )
            oracles.append(oracle)
            engine.begin_run(oracle, spec.trace_prefix)
        if self._group is not None:
            self._group.begin_run()
        last_told = 0.0

        def progress(ended: int, time_ns: int) -> None:
            nonlocal last_told
            now = time.perf_counter()
            if now - last_told > _PROGRESS_SECONDS:
                last_told = now
                _tell(
                    self._events,
                    "progress",
                    run=number,
                    ended=ended,
                    requests=len(requests),
                    virtual_seconds=time_ns * 1e-9,
                )

        begin, begin_cpu = time.perf_counter(), time.process_time()
        if requests[0].admit_step >= 0:
            times = self._fleet.run_by_step(requests, progress)
        else:
            times = self._fleet.run(requests, spec.users or self._job.users, progress)
        wall_seconds, cpu_seconds = time.perf_counter() - begin, time.process_time() - begin_cpu
        for engine in self._engines:
            engine.executor.end_run()
        result = {
            "seed": spec.seed,
            "null_oracle": spec.null_oracle,
            "rejected": rejected,
            "requests": [dataclasses.asdict(entry) for entry in times],
            "steps": [len(oracle.latencies_ns) for oracle in oracles],
            "dummy_steps": [oracle.dummy_steps for oracle in oracles],
            "device_busy_ns": [sum(oracle.latencies_ns) for oracle in oracles],
            "support": [dataclasses.asdict(oracle.counts) for oracle in oracles],
        }
        path = Path(self._job.results, f"run-{number}.json")
        path.write_text(json.dumps(result), encoding="utf-8")
        _tell(self._events, "run", run=number, path=str(path), wall_seconds=wall_seconds, cpu_seconds=cpu_seconds)
        return [oracle.latencies_ns for oracle in oracles]


def _collect_less_garbage() -> None:
    """For the rest of the process: what the start left is looked through no more, what comes rarely.

    4 % of a replay's samples were the collector's (py-spy, RTX 4090 run, some of them at the start).
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 50, 100)


def _engine_names(job: Job, ranks: int) -> list[str]:
    """Ids of the engines; ranks are named as the shim names them."""
    if ranks > 1 and job.engines > 1:
        raise InvalidArgument(
            f"--engines {job.engines} with --data-parallel-size {ranks}: one group of lock-step ranks is replayed at a "
            "time; take --engines 1"
        )
    if ranks > 1:
        return [f"{job.engine_id}/dp{rank}" for rank in range(ranks)]
    return [job.engine_id if job.engines == 1 else f"{job.engine_id}-{i}" for i in range(job.engines)]


def _data_parallel_size(job: Job) -> int:
    return int(_engine_arguments(job).data_parallel_size or 1)


def _vllm_config(job: Job, ranks: int) -> Any:
    """vLLM's own command line decides what is allowed.

    A rank of a group is configured as an engine of its own: vLLM's scheduler does not ask for the others.
    """
    from vllm.engine.arg_utils import EngineArgs
    from vllm.usage.usage_lib import UsageContext

    arguments = _engine_arguments(job)
    arguments.data_parallel_size = 1
    config = EngineArgs.from_cli_args(arguments).create_engine_config(
        UsageContext.OPENAI_API_SERVER
    )  # the defaults of `vllm serve`
    if ranks > 1 and not config.model_config.is_moe:
        engines = job.engines if job.engines > 1 else ranks
        raise InvalidArgument(
            f"--data-parallel-size {ranks} of a dense model: its ranks are engines of their own; add --engine-args "
            f'"--data-parallel-size 1" and give --engines {engines} --router least_requests',
            field="engine_args",
        )
    if getattr(config.scheduler_config, "prefill_schedule_interval", 1) > 1:
        raise InvalidArgument(
            "prefills held back for a balance of ranks are not replayed: no --prefill-schedule-interval"
        )
    if config.speculative_config is not None:
        raise InvalidArgument("speculative decoding is not replayed: nobody says how many draft tokens are accepted")
    return config


def _wave_rules(config: Any) -> WaveRules:
    """Since 0.33 the interval is a setting, and ranks agree after the first pass too (0.18.1 to 0.33.0, read)."""
    from profiler.replay.lock_step import WaveRules

    interval = getattr(config.parallel_config, "dp_sync_interval", None)
    return WaveRules() if interval is None else WaveRules(int(interval), syncs_first=True)


def _engine_arguments(job: Job) -> Any:
    """The arguments given win over those of a measured run."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = EngineArgs.add_cli_args(FlexibleArgumentParser(prog="--engine-args"))
    unknown = sorted(set(job.engine_defaults) - {field.name for field in dataclasses.fields(EngineArgs)})
    if unknown:
        raise InvalidArgument(f"this vLLM has no engine argument {unknown[0]}, which the measured run was started with")
    parser.set_defaults(
        **{**job.engine_defaults, "model": job.model, "load_format": "dummy", "skip_tokenizer_init": True}
    )
    try:
        return parser.parse_args(list(job.engine_args))
    except SystemExit:
        raise InvalidArgument(
            f"vLLM does not take these --engine-args: {' '.join(job.engine_args)}", field="engine_args"
        ) from None


def _tell(events: TextIO, event: str, **fields: Any) -> None:
    events.write(json.dumps({"event": event, **fields}) + "\n")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
