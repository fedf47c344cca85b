"""What a step costs the engine thread in our code: `make bench-thread`.

The shim's executor and a real server, without an engine around it: SchedulerOutputs of 1, 32 and 128 decode requests,
one millisecond of Python work between handing a step over and asking for its result, as vLLM's scheduler does, and
deadlines that have always passed. Printed per number of requests, leased and asked for, interleaved: microseconds in
execute_model, sample_tokens and result, and the CPU time of the engine thread in them, which a busy machine does not
blur: without a message it is all there is.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

BATCHES = (1, 32, 128)
ROUNDS = 5
ROUND_STEPS = 200
PROMPT_TOKENS = 16


def main() -> int:
    from rich.console import Console

    from environments import REPOSITORY, VLLM_VERSIONS

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vllm-version", default=VLLM_VERSIONS[-1])
    parser.add_argument("--shim", type=Path, default=REPOSITORY, help="a checkout whose vllm_shim and proto are run")
    parser.add_argument("--work-us", type=int, default=1000, help="Python work between handing over and the result")
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    rows = measure(options.vllm_version, options.shim, options.work_us)
    Console().print(table_of(rows, options.vllm_version))
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))
    return 0


def table_of(rows: list[dict[str, Any]], version: str) -> Any:
    """The table people read."""
    from rich.table import Table

    table = Table(title=f"Engine thread in our code, us per step (vLLM {version})", title_justify="left")
    for column in ("requests", "leases", "p50", "mean", "p90", "hand over p50", "result p50", "CPU p50", "leased"):
        table.add_column(column, justify="right")
    for row in rows:
        figures = (row["p50"], row["mean"], row["p90"], row["over"], row["result"], row["cpu"])
        table.add_row(
            str(row["requests"]), row["leases"], *(f"{figure:.1f}" for figure in figures), f"{row['leased']:.1%}"
        )
    return table


def measure(version: str, shim: Path, work_us: int) -> list[dict[str, Any]]:
    """One row of figures per number of requests, with leases and without; the worker runs in vLLM's environment."""
    from builders import build_composed_pack
    from environments import vllm_environment
    from fleet import step_oracle
    from oracle_process import OracleProcess

    python = vllm_environment(version).python
    paths = os.pathsep.join(map(str, (shim, shim / "proto")))
    with tempfile.TemporaryDirectory() as name, OracleProcess(Path(name) / "state") as oracle:
        build_composed_pack(Path(name) / "pack", ratios=[0.9, 0.95, 1.0, 1.1] * 64, composed={"skew_decode": 0.05})
        step_oracle("pack", "upload", f"{name}/pack", "--target", oracle.target)
        # So short that every deadline has passed when the result is asked for.
        create = ("create", "default", "--pack", f"{name}/pack", "--time-scale", "1e-6")
        step_oracle("experiment", *create, "--target", oracle.target)
        done = subprocess.run(
            [python, "-P", __file__, "worker", oracle.target, str(work_us)],
            env={**os.environ, "PYTHONPATH": paths, "VLLM_LOGGING_LEVEL": "ERROR"},
            stdout=subprocess.PIPE,
            check=True,
            text=True,
        )
    rows: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return rows


class Engine:
    """An executor on a stream of its own, driven by hand through decode steps of one batch."""

    def __init__(self, target: str, requests: int, leases: str) -> None:
        from step_oracle.v1 import oracle_service_pb2 as pb
        from vllm_shim import executor as shim
        from vllm_shim import stream
        from vllm_shim.config import ShimConfig
        from vllm_shim.output import OutputBuilder
        from vllm_shim.timeline import Clock
        from vllm_shim.tokens import TokenSource

        class PastClock(Clock):
            """Every deadline has passed: what is left is our own code."""

            def wait_until(self, deadline_ns: int) -> None:
                return

        variables = {"STEP_ORACLE_TARGET": target, "STEP_ORACLE_ENGINE_ID": f"thread-{leases}-{requests}"}
        if "leases" in ShimConfig.__annotations__:
            variables["STEP_ORACLE_LEASES"] = "1" if leases == "on" else "0"
        config = ShimConfig.from_environment(variables, [])
        engine = pb.EngineIdentity(experiment=config.experiment, engine_id=config.engine_id)
        # Older checkouts have channels where later ones have replicas.
        replicas_of: Any = getattr(stream, "replicas_of", getattr(stream, "open_channels", None))
        replicas = replicas_of(config)
        request = pb.AttachEngineRequest(engine=engine)
        attached = stream.call_unary(replicas, config, "AttachEngine", request, pb.AttachEngineResponse)
        self.executor: Any = object.__new__(shim.StepOracleExecutor)
        values: dict[str, Any] = {
            "_config": config,
            "_clock": PastClock("sleep"),
            "_channels": replicas,
            "_replicas": replicas,
            "_trace": None,
            "_num_drafts": 0,
            "_tokens": TokenSource(None, 32_000),
        }
        self.executor.__dict__.update(values)
        self.executor._output = OutputBuilder(values["_tokens"], speculative=False)
        self.executor._begin()
        opening = pb.StreamOpen(engine=engine, incarnation=attached.incarnation)
        if "leases" in opening.DESCRIPTOR.fields_by_name:
            opening.leases = leases == "on"
        self.executor._stream = self.executor._open_stream(opening)
        self.leases, self.requests, self.leased = leases, requests, 0
        self._ids = [f"cmpl-client-{requests}-{i}-0" for i in range(requests)]
        self._outputs = 0

    def scheduled(self) -> Any:
        """The SchedulerOutput of the next step: all prompts first, then one token each."""
        sampling = SimpleNamespace(
            max_tokens=10_000,
            min_tokens=0,
            ignore_eos=True,
            eos_token_id=2,
            extra_args=None,
            logprobs=None,
            prompt_logprobs=None,
            stop=[],
            allowed_token_ids=None,
            all_stop_token_ids=set(),
            bad_words_token_ids=None,
        )
        first = not self._outputs
        new = [
            SimpleNamespace(
                req_id=name,
                prompt_token_ids=[1] * PROMPT_TOKENS,
                prefill_token_ids=None,
                num_computed_tokens=0,
                sampling_params=sampling,
                lora_request=None,
            )
            for name in self._ids
        ]
        cached = SimpleNamespace(
            req_ids=[] if first else list(self._ids),
            num_computed_tokens=[] if first else [PROMPT_TOKENS + self._outputs - 1] * self.requests,
            num_output_tokens=[] if first else [self._outputs] * self.requests,
            resumed_req_ids=set(),
        )
        tokens = PROMPT_TOKENS if first else 1
        self._outputs += 1
        return SimpleNamespace(
            scheduled_new_reqs=new if first else [],
            scheduled_cached_reqs=cached,
            num_scheduled_tokens=dict.fromkeys(self._ids, tokens),
            total_num_scheduled_tokens=tokens * self.requests,
            scheduled_spec_decode_tokens={},
            finished_req_ids=set(),
        )

    def run(self, steps: int, work_ns: int) -> list[tuple[int, int, int]]:
        """(Hand over, result, CPU of both) of so many steps in nanoseconds."""
        now, cpu, executor, found = time.perf_counter_ns, time.thread_time_ns, self.executor, []
        for _ in range(steps):
            scheduled = self.scheduled()
            begin_cpu, begin = cpu(), now()
            executor.execute_model(scheduled, non_block=True)
            future = executor.sample_tokens(None, non_block=True)
            handed_over, used = now(), cpu() - begin_cpu
            self.leased += getattr(executor._dispatched[2], "lease", None) is not None
            while now() - handed_over < work_ns:
                pass
            begin_cpu, asked = cpu(), now()
            future.result()
            found.append((handed_over - begin, now() - asked, used + cpu() - begin_cpu))
            # Whoever reads an output lets go of it, in code that is not ours.
            del future
        return found


def worker(target: str, work_us: int) -> int:
    """In vLLM's environment."""
    engines = [Engine(target, requests, leases) for requests in BATCHES for leases in ("on", "off")]
    times: dict[Engine, list[tuple[int, int, int]]] = {engine: [] for engine in engines}
    for round_number in range(ROUNDS):
        for engine in engines:
            found = engine.run(ROUND_STEPS, work_us * 1000)
            if round_number:
                times[engine] += found
    rows = []
    for engine, found in times.items():
        over, result, cpu = zip(*found, strict=True)
        sums = sorted(map(sum, zip(over, result, strict=True)))
        rows.append(
            {
                "requests": engine.requests,
                "leases": engine.leases,
                "p50": statistics.median(sums) / 1e3,
                # Without the slowest hundredth: what is worked out ahead for 16 steps is in it, interruptions are not.
                "mean": statistics.fmean(sums[: len(sums) * 99 // 100]) / 1e3,
                "p90": sums[len(sums) * 9 // 10] / 1e3,
                "over": statistics.median(over) / 1e3,
                "result": statistics.median(result) / 1e3,
                "cpu": statistics.median(cpu) / 1e3,
                "leased": engine.leased / (ROUNDS * ROUND_STEPS - 1),
            }
        )
        engine.executor._stream.close()
    print(json.dumps(rows))
    return 0


if __name__ == "__main__":
    sys.exit(worker(sys.argv[2], int(sys.argv[3])) if sys.argv[1:2] == ["worker"] else main())
