"""How fast real runs are replayed: `make bench-replay`.

Both measured runs of 300 requests, the newest tested vLLM, composed packs. Printed per GPU: virtual seconds per wall
second of one process, of the same process with a null oracle (the run's own latencies for answers, so what the
scheduler alone costs), and of several processes at once. Numbers of processes take turns, so that all see the same
machine; a run beside others counts only while all the others run too. Starting vLLM is not in the figures. Every
process must write the same bytes.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from environments import REPOSITORY, VLLM_VERSIONS, vllm_environment
from profiler.replay.replay import Replay, ReplayRequest, Speed, document_bytes, replay
from profiler.replay.workload import read_workload
from replays import MEASURED_RUNS

CORES = len(os.sched_getaffinity(0))


@dataclass(frozen=True)
class Process:
    """What one process measured; when each of its runs began and ended, the null oracle's last."""

    replayed: Replay
    intervals: Sequence[tuple[float, float]]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vllm-version", default=VLLM_VERSIONS[-1])
    parser.add_argument("--gpu", nargs="+", choices=MEASURED_RUNS, default=list(MEASURED_RUNS))
    parser.add_argument("--processes", type=int, nargs="+", default=sorted({1, CORES}), help="1 and others; at once")
    parser.add_argument("--runs", type=int, default=3, help="runs of each process, one after the other")
    parser.add_argument("--repeat", type=int, default=1, help="rounds over all numbers of processes")
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    data = Path(os.environ.get("STEP_ORACLE_DATA") or REPOSITORY.parent / "shared" / "data")
    if not data.is_dir():
        parser.error(f"no data in {data}; set STEP_ORACLE_DATA")
    venv = vllm_environment(options.vllm_version).python.parent.parent
    rows, load = [], os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="step-oracle-bench-") as name:
        for gpu in options.gpu:
            run = MEASURED_RUNS[gpu]
            request = ReplayRequest(
                pack=run.pack(data, Path(name) / gpu.replace(" ", "-")),
                model_config=run.model_config(data),
                requests=read_workload(run.requests(data), None),
                vllm=venv,
                real_run=run.folder(data),
                seeds=(0,) * options.runs,
                null_oracle=True,
            )
            groups = []
            for count in options.processes * options.repeat:
                print(f"{gpu}: {count} at once, {options.runs} runs each", file=sys.stderr, flush=True)
                groups.append(at_once(request, count))
            rows.append(row(gpu, run.least_speed, groups))
    show(rows, options.vllm_version)
    if load > 0.5:
        print(f"The machine was busy at the start, load {load:.1f}: what counts then is the column by CPU time.")
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        document = {"vllm": options.vllm_version, "cores": CORES, "load_at_start": load, "runs": rows}
        options.json.write_text(json.dumps(document, indent=1) + "\n")
    return 0 if all(entry["identical"] for entry in rows) else 1


def at_once(request: ReplayRequest, count: int) -> list[Process]:
    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(_process, [request] * count))


def _process(request: ReplayRequest) -> Process:
    intervals: list[tuple[float, float]] = []

    def follow(event: dict[str, Any]) -> None:
        if event["event"] == "run":
            now = time.perf_counter()
            intervals.append((now - event["wall_seconds"], now))

    return Process(replay(request, follow), intervals)


def counted(group: Sequence[Process]) -> list[Speed]:
    """The runs through all of which every other process was running too."""
    begin = max(process.intervals[0][0] for process in group)
    end = min(process.intervals[-1][1] for process in group)
    return [
        speed
        for process in group
        for speed, interval in zip(process.replayed.speeds, process.intervals, strict=False)
        if begin <= interval[0] and interval[1] <= end
    ]


def row(gpu: str, least: float, groups: Sequence[Sequence[Process]]) -> dict[str, Any]:
    """The figures of one run; speeds are virtual seconds per wall second, medians."""
    processes = [process for group in groups for process in group]
    documents = {document_bytes(process.replayed.document) for process in processes}
    runs = {json.dumps(run) for process in processes for run in process.replayed.document["runs"]}
    alone = [process.replayed for group in groups if len(group) == 1 for process in group]
    alone = alone or [process.replayed for process in processes]
    speeds = [speed for found in alone for speed in found.speeds]
    nulls = [(found.speeds[-1], found.null_speed) for found in alone if found.null_speed is not None]
    single = statistics.median(speed.times_real_time for speed in speeds)
    together = {}
    for count in sorted({len(group) for group in groups} - {1}):
        beside = [speed for group in groups if len(group) == count for speed in counted(group)]
        if not beside:
            raise SystemExit(f"no run of {count} processes ran beside all others to its end; take more --runs")
        each = statistics.median(speed.times_real_time for speed in beside)
        together[str(count)] = {
            "runs_counted": len(beside),
            "times_real_time_by_cpu": statistics.median(s.virtual_seconds / s.cpu_seconds for s in beside),
            "times_real_time_each": each,
            "times_real_time_all": count * each,
            "scaling": count * each / single,
        }
    return {
        "gpu": gpu,
        "virtual_seconds": speeds[0].virtual_seconds,
        "steps": speeds[0].steps,
        "times_real_time": single,
        "times_real_time_range": [min(s.times_real_time for s in speeds), max(s.times_real_time for s in speeds)],
        "times_real_time_by_cpu": statistics.median(s.virtual_seconds / s.cpu_seconds for s in speeds),
        "steps_per_second": statistics.median(s.steps / s.wall_seconds for s in speeds),
        "least": least,
        "null_oracle": statistics.median(null.times_real_time for _, null in nulls),
        "time_over_null_oracle": statistics.median(s.cpu_seconds / null.cpu_seconds for s, null in nulls),
        "at_once": together,
        "identical": len(documents) == 1 and len(runs) == 1,
        "documents": len(processes),
    }


def show(rows: Sequence[dict[str, Any]], vllm_version: str) -> None:
    table = Table(title=f"Replay, vLLM {vllm_version}, {CORES} cores: virtual seconds per wall second")
    headings = (
        "run",
        "virtual s",
        "steps/s",
        "1 process (range)",
        "by CPU time",
        "promised",
        "null oracle",
        "CPU / null",
    )
    for place, heading in enumerate(headings):
        table.add_column(heading, justify="right" if place else "left")
    counts = list(rows[0]["at_once"])
    for count in counts:
        table.add_column(f"{count} at once: each, all (scaling), by CPU time", justify="right")
    table.add_column("same bytes", justify="right")
    for entry in rows:
        low, high = entry["times_real_time_range"]
        speed, least = entry["times_real_time"], entry["least"]
        cells = [
            entry["gpu"],
            f"{entry['virtual_seconds']:.1f}",
            f"{entry['steps_per_second']:.0f}",
            f"{speed:.1f} ({low:.1f} to {high:.1f})",
            f"{entry['times_real_time_by_cpu']:.1f}",
            f"≥ {least:g}" + ("" if speed >= least else " MISSED"),
            f"{entry['null_oracle']:.1f}",
            f"{entry['time_over_null_oracle']:.2f}",
        ]
        for part in (entry["at_once"][count] for count in counts):
            each, together = part["times_real_time_each"], part["times_real_time_all"]
            cells.append(f"{each:.1f}, {together:.1f} ({part['scaling']:.2f}), {part['times_real_time_by_cpu']:.1f}")
        cells.append(f"{entry['documents']} of {entry['documents']}" if entry["identical"] else "NO")
        table.add_row(*cells)
    Console(width=None if sys.stdout.isatty() else 170).print(table)


if __name__ == "__main__":
    sys.exit(main())
