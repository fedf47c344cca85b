"""How well a held step is held: `make bench-held`.

The oracle answers 10 ms for every step. A real engine, or several beside each other (`--engines`), serves `vllm bench
serve` in a closed loop; its step trace says when each step was due and when it resolved. A bare process that only
sleeps to absolute deadlines 10 ms apart runs at the same time, so both see the same noise of the machine. Printed per
concurrency: the engine's step period, the client's mean TPOT, and the lateness of both, as milliseconds and as what is
left after the control.
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import json
import math
import multiprocessing
import multiprocessing.synchronize
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from engine_process import EngineProcess, engine_variables
from environments import VLLM_VERSIONS, VllmEnvironment, shim_site, vllm_environment
from fleet import MODEL, replies, step_oracle, upload
from model_dir import write_model_dir
from oracle_process import OracleProcess

STEP_NS = 10_000_000
CONCURRENCIES = (1, 8, 32, 128)
OUTPUT_TOKENS = 128
_PR_SET_TIMERSLACK = 29


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vllm-version", default=VLLM_VERSIONS[-1])
    parser.add_argument("--wait", default="hybrid", choices=("hybrid", "sleep", "spin", "yield"))
    parser.add_argument("--concurrency", type=int, nargs="+", default=CONCURRENCIES)
    parser.add_argument("--engines", type=int, default=1, help="engines, each with a load of its own")
    parser.add_argument("--seconds", type=float, default=12.0, help="length of the load at each concurrency")
    parser.add_argument("--repeat", type=int, default=1, help="rounds over all concurrencies; figures are medians")
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    environment = vllm_environment(options.vllm_version)
    with tempfile.TemporaryDirectory(prefix="step-oracle-bench-") as name:
        rounds = list(options.concurrency) * options.repeat
        rows = measure(environment, Path(name), options.wait, rounds, options.seconds, options.engines)
    title = f"A held step of 10 ms, vLLM {options.vllm_version}, wait mode {options.wait}, engines: {options.engines}"
    Console(width=140).print(table_of(rows, title))
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))
    return 0


def measure(
    environment: VllmEnvironment,
    folder: Path,
    wait: str,
    concurrencies: Sequence[int],
    seconds: float,
    engines: int = 1,
) -> list[dict[str, Any]]:
    """One row of figures per concurrency and engine."""
    model, site = write_model_dir(folder / "qwen3-8b", "qwen3-8b"), shim_site(folder / "site")
    traces = [folder / f"traces-{number}" for number in range(engines)]
    rows = []
    with OracleProcess(folder / "state") as oracle, ExitStack() as stack:
        digest = upload(oracle, folder / "pack", STEP_NS)
        step_oracle("experiment", "create", "default", "--pack", digest, "--target", oracle.target)
        started = []
        for number, trace in enumerate(traces):
            trace.mkdir()
            engine = EngineProcess(
                environment,
                model,
                target=oracle.target,
                site=site,
                log_path=folder / f"engine-{number}.log",
                extra_args=["--served-model-name", MODEL, "--max-model-len", "4096"],
                extra_env={"STEP_ORACLE_TRACE": f"{trace}/", "STEP_ORACLE_WAIT": wait},
            )
            started.append(stack.enter_context(engine))
        for engine in started:
            engine.wait_ready()
        bench = [str(environment.python), "-m", "vllm.entrypoints.cli.main", "bench", "serve"]
        bench += ["--backend", "vllm", "--model", MODEL, "--tokenizer", str(model)]
        bench += ["--dataset-name", "random", "--random-input-len", "64"]
        bench += ["--random-output-len", str(OUTPUT_TOKENS), "--ignore-eos", "--save-result", "--save-detailed"]
        bench += ["--num-warmups", "8", "--percentile-metrics", "ttft,tpot,itl,e2el"]
        for number, concurrency in enumerate(concurrencies, 1):
            print(f"{number}/{len(concurrencies)}: concurrency {concurrency}", file=sys.stderr, flush=True)
            seen = [len(replies(trace)) for trace in traces]
            prompts = max(4, math.ceil(concurrency * seconds / (OUTPUT_TOKENS * STEP_NS * 1e-9)))
            bench_load = [*bench, "--max-concurrency", str(concurrency), "--num-prompts", str(prompts)]
            results = [folder / f"bench-{number}-{engine}.json" for engine in range(engines)]
            with BareSleep() as bare, ThreadPoolExecutor(engines) as pool:

                def load(engine: EngineProcess, result: Path, command: list[str] = bench_load) -> Any:
                    command = [*command, "--base-url", engine.base_url, "--result-filename", str(result)]
                    return subprocess.run(command, env=engine_variables(site, None), capture_output=True, text=True)

                for done in pool.map(load, started, results):
                    assert done.returncode == 0, done.stderr[-2000:]
            for result, trace, before in zip(results, traces, seen, strict=True):
                client = json.loads(result.read_text())
                rows.append(row(concurrency, client, replies(trace)[before:], bare.lateness_ns))
    return rows


def row(concurrency: int, client: dict[str, Any], steps: list[Any], bare_ns: list[int]) -> dict[str, Any]:
    """The figures of one concurrency; steps that followed an idle device are not back to back and do not count."""
    periods = [
        after.resolved_ns - before.resolved_ns
        for before, after in itertools.pairwise(steps)
        if after.device_start_ns == before.device_finish_ns
    ]
    lateness = [step.resolved_ns - step.deadline_ns for step in steps]
    return {
        "concurrency": concurrency,
        "completed": client["completed"],
        "steps": len(steps),
        "step_period_p50_ms": statistics.median(periods) / 1e6,
        "step_period_mean_ms": statistics.fmean(periods) / 1e6,
        "client_mean_tpot_ms": client["mean_tpot_ms"],
        "client_median_itl_ms": client["median_itl_ms"],
        "lateness_p50_us": quantile(lateness, 0.5) / 1e3,
        "lateness_p99_us": quantile(lateness, 0.99) / 1e3,
        "bare_sleep_lateness_p50_us": quantile(bare_ns, 0.5) / 1e3,
        "bare_sleep_lateness_p99_us": quantile(bare_ns, 0.99) / 1e3,
        "late_answers": sum(step.answer_ns > step.deadline_ns for step in steps),
    }


def quantile(values: list[int], share: float) -> float:
    ordered = sorted(values)
    return float(ordered[min(int(share * len(ordered)), len(ordered) - 1)])


class BareSleep:
    """A process that sleeps to absolute deadlines 10 ms apart while the block runs, and tells how late it woke."""

    def __enter__(self) -> BareSleep:
        context = multiprocessing.get_context("spawn")
        self._stop = context.Event()
        self._receiver, sender = context.Pipe(duplex=False)
        self._process = context.Process(target=_sleep_on, args=(self._stop, sender))
        self._process.start()
        self.lateness_ns: list[int] = []
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self.lateness_ns = self._receiver.recv()
        self._process.join()


def _sleep_on(stop: multiprocessing.synchronize.Event, sender: Any) -> None:
    ctypes.CDLL(None).prctl(_PR_SET_TIMERSLACK, 1, 0, 0, 0)
    lateness = []
    deadline = time.monotonic_ns() + STEP_NS
    while not stop.is_set():
        time.sleep(max(deadline - time.monotonic_ns(), 0) * 1e-9)
        now = time.monotonic_ns()
        lateness.append(now - deadline)
        deadline = max(deadline + STEP_NS, now)
    sender.send(lateness)


def table_of(rows: Sequence[dict[str, Any]], title: str) -> Table:
    """The table people read: medians over rounds and engines, and the ratio of the two p99 with its range."""
    table = Table(title=title, title_justify="left")
    headings = (
        "conc.",
        "steps",
        "step period p50",
        "",
        "client mean TPOT",
        "",
        "late p50 / p99",
        "bare sleep p50 / p99",
    )
    for heading in (*headings, "p99 / bare p99"):
        table.add_column(heading, justify="right")
    for concurrency in dict.fromkeys(r["concurrency"] for r in rows):
        rounds = [r for r in rows if r["concurrency"] == concurrency]
        m = {name: statistics.median(r[name] for r in rounds) for name in rounds[0]}
        ratios = sorted(r["lateness_p99_us"] / r["bare_sleep_lateness_p99_us"] for r in rounds)
        spread = f" ({ratios[0]:.2f} to {ratios[-1]:.2f})" if len(ratios) > 1 else ""
        table.add_row(
            str(concurrency),
            f"{sum(r['steps'] for r in rounds)}",
            f"{m['step_period_p50_ms']:.3f} ms",
            f"{(m['step_period_p50_ms'] / 10 - 1) * 100:+.2f} %",
            f"{m['client_mean_tpot_ms']:.3f} ms",
            f"{(m['client_mean_tpot_ms'] / 10 - 1) * 100:+.2f} %",
            f"{m['lateness_p50_us']:.0f} / {m['lateness_p99_us']:.0f} us",
            f"{m['bare_sleep_lateness_p50_us']:.0f} / {m['bare_sleep_lateness_p99_us']:.0f} us",
            f"{statistics.median(ratios):.2f}{spread}",
        )
    return table


if __name__ == "__main__":
    sys.exit(main())
