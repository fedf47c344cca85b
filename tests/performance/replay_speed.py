"""How fast real runs are replayed: `make bench-replay`.

Both measured runs of 300 requests, the newest tested vLLM, composed packs. Printed per GPU: virtual seconds per wall
second of one process with `--compile`, of the same process with a null oracle (the run's own latencies for answers, so
what the scheduler alone costs), of several such processes at once, and of one process whose vLLM is all Python. They
take turns, so that all see the same machine; a run beside others counts only while all the others run too. Starting
vLLM and compiling are not in the figures.

It ends with status 1, and says so, where a promise is missed: the speed of one process with `--compile`, so many times
that by several processes as LEAST_SHARE of them says (two: 1.6 times one), the same bytes of every process, compiled
or not. On a machine that is busy at the start wall time is partly others', so there CPU time is judged in its place.
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
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from environments import VLLM_VERSIONS, measured_data, vllm_environment
from profiler.replay.compiler import compiled_folder
from profiler.replay.replay import Replay, ReplayRequest, Speed, Workload, document_bytes, replay
from profiler.replay.workload import read_workload
from replays import MEASURED_RUNS

CORES = len(os.sched_getaffinity(0))
# Of so many times the speed of one process, what processes on cores of their own have to reach together.
LEAST_SHARE = 0.8
# Load average at the start from which the machine counts as busy.
BUSY_LOAD = 0.5
# A build may train itself without this option (Debian's does), so without it nothing is known.
TELL_PYTHON = """
import platform, sysconfig
option = "--enable-optimizations" in (sysconfig.get_config_var("CONFIG_ARGS") or "")
print(platform.python_version(), "with PGO" if option else "that does not say whether it was built with PGO")
"""


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
    parser.add_argument("--repeat", type=int, default=1, help="rounds over all numbers of processes, and plain vLLM")
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    if 1 not in options.processes:
        parser.error("--processes needs 1, which the other numbers are compared with")
    data = measured_data()
    if not data.is_dir():
        parser.error(f"no data in {data}; set STEP_ORACLE_DATA")
    python = vllm_environment(options.vllm_version).python
    told_python = subprocess.run([python, "-c", TELL_PYTHON], capture_output=True, text=True, check=True).stdout.strip()
    rows, load = [], os.getloadavg()[0]
    # Compiled here where it was not yet, not inside a round.
    compiled_folder(python, lambda event: print(f"compiling vLLM: {event}", file=sys.stderr, flush=True))
    with tempfile.TemporaryDirectory(prefix="step-oracle-bench-") as name:
        for gpu in options.gpu:
            run = MEASURED_RUNS[gpu]
            request = ReplayRequest(
                pack=run.pack(data, Path(name) / gpu.replace(" ", "-")),
                model_config=run.model_config(data),
                workloads=[Workload(run.requests(data).name, read_workload(run.requests(data), None))],
                vllm=python.parent.parent,
                real_run=run.folder(data),
                seeds=(0,) * options.runs,
                null_oracle=True,
            )
            groups, plain = [], []
            for _ in range(options.repeat):
                print(f"{gpu}: vLLM as Python, {options.runs} runs", file=sys.stderr, flush=True)
                plain += at_once(request, 1)
                for count in options.processes:
                    print(f"{gpu}: compiled, {count} at once, {options.runs} runs each", file=sys.stderr, flush=True)
                    groups.append(at_once(replace(request, compiled=True), count))
            rows.append(row(gpu, run.least_speed, groups, plain))
    busy = load > BUSY_LOAD
    show(rows, options.vllm_version, told_python, by_cpu=busy)
    if busy:
        print(f"The machine was busy at the start, load {load:.1f}: judged by CPU time, not by wall time.")
    misses = missed(rows, by_cpu=busy)
    for sentence in misses:
        print(f"MISSED: {sentence}")
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        judged = {"judged_by": "CPU time" if busy else "wall time", "missed": misses}
        machine = {"vllm": options.vllm_version, "python": told_python, "cores": CORES, "load_at_start": load}
        document = {**machine, **judged, "runs": rows}
        options.json.write_text(json.dumps(document, indent=1) + "\n")
    return 1 if misses else 0


def missed(rows: Sequence[Mapping[str, Any]], *, by_cpu: bool, cores: int = CORES) -> list[str]:
    """One sentence per promise that the figures do not keep; numbers of processes beyond the cores promise nothing."""
    suffix, clock = ("_by_cpu", "CPU time") if by_cpu else ("", "wall time")
    found = []
    for entry in rows:
        speed = entry[f"times_real_time{suffix}"]
        if not speed >= entry["least"]:
            found.append(
                f"{entry['gpu']}: {speed:.1f} times real time by {clock}, at least {entry['least']:g} promised with "
                "--compile"
            )
        for count, part in entry["at_once"].items():
            scaling, least = part[f"scaling{suffix}"], LEAST_SHARE * int(count)
            if int(count) <= cores and not scaling >= least:
                found.append(
                    f"{entry['gpu']}: {count} processes are {scaling:.2f} times one by {clock}, at least {least:g} "
                    "promised"
                )
        if not entry["identical"]:
            found.append(f"{entry['gpu']}: processes wrote different bytes")
    return found


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


def row(gpu: str, least: float, groups: Sequence[Sequence[Process]], plain: Sequence[Process]) -> dict[str, Any]:
    """The figures of one run; speeds are virtual seconds per wall second, medians.

    `groups` are compiled processes that ran at once, `plain` processes without `--compile`, each alone.
    """
    processes = [*plain, *(process for group in groups for process in group)]
    not_compiled = [process for group in groups for process in group if not process.replayed.compiled_modules]
    if not_compiled or any(process.replayed.compiled_modules for process in plain):
        raise SystemExit("a process ran compiled where it should not, or not where it should")
    documents = {document_bytes(process.replayed.document) for process in processes}
    runs = {json.dumps(run) for process in processes for run in process.replayed.document["runs"]}
    alone = [process.replayed for group in groups if len(group) == 1 for process in group]
    speeds = [speed for found in alone for speed in found.speeds]
    nulls = [(found.speeds[-1], found.null_speed) for found in alone if found.null_speed is not None]
    plain_speeds = [speed for process in plain for speed in process.replayed.speeds]
    single = statistics.median(speed.times_real_time for speed in speeds)
    single_by_cpu = statistics.median(map(by_cpu_time, speeds))
    together = {}
    for count in sorted({len(group) for group in groups} - {1}):
        beside = [speed for group in groups if len(group) == count for speed in counted(group)]
        if not beside:
            raise SystemExit(f"no run of {count} processes ran beside all others to its end; take more --runs")
        each = statistics.median(speed.times_real_time for speed in beside)
        each_by_cpu = statistics.median(map(by_cpu_time, beside))
        together[str(count)] = {
            "runs_counted": len(beside),
            "times_real_time_by_cpu": each_by_cpu,
            "times_real_time_each": each,
            "times_real_time_all": count * each,
            "scaling": count * each / single,
            "scaling_by_cpu": count * each_by_cpu / single_by_cpu,
        }
    return {
        "gpu": gpu,
        "virtual_seconds": speeds[0].virtual_seconds,
        "steps": speeds[0].steps,
        "times_real_time": single,
        "times_real_time_range": _range(speeds),
        "times_real_time_by_cpu": single_by_cpu,
        "plain": {
            "times_real_time": statistics.median(speed.times_real_time for speed in plain_speeds),
            "times_real_time_range": _range(plain_speeds),
            "times_real_time_by_cpu": statistics.median(map(by_cpu_time, plain_speeds)),
        },
        "steps_per_second": statistics.median(s.steps / s.wall_seconds for s in speeds),
        "least": least,
        "null_oracle": statistics.median(null.times_real_time for _, null in nulls),
        "time_over_null_oracle": statistics.median(s.cpu_seconds / null.cpu_seconds for s, null in nulls),
        "at_once": together,
        "identical": len(documents) == 1 and len(runs) == 1,
        "documents": len(processes),
    }


def _range(speeds: Sequence[Speed]) -> list[float]:
    return [min(s.times_real_time for s in speeds), max(s.times_real_time for s in speeds)]


def by_cpu_time(speed: Speed) -> float:
    """Virtual seconds per second of CPU time."""
    return speed.virtual_seconds / speed.cpu_seconds


def show(rows: Sequence[dict[str, Any]], vllm_version: str, python: str, *, by_cpu: bool) -> None:
    table = Table(title=f"Replay, vLLM {vllm_version}, {CORES} cores, Python {python}: virtual seconds per wall second")
    headings = (
        "run",
        "virtual s",
        "steps/s",
        "without --compile (range)",
        "by CPU time",
        "with --compile (range)",
        "by CPU time",
        "promised with --compile",
        "null oracle",
        "CPU / null",
    )
    for place, heading in enumerate(headings):
        table.add_column(heading, justify="right" if place else "left")
    counts = list(rows[0]["at_once"])
    for count in counts:
        table.add_column(f"{count} at once: each, all (scaling); by CPU time each (scaling)", justify="right")
    table.add_column("same bytes", justify="right")
    for entry in rows:
        speed, least = entry["times_real_time"], entry["least"]
        judged = entry["times_real_time_by_cpu"] if by_cpu else speed
        cells = [
            entry["gpu"],
            f"{entry['virtual_seconds']:.1f}",
            f"{entry['steps_per_second']:.0f}",
            *_speed_cells(entry["plain"]),
            *_speed_cells(entry),
            f"≥ {least:g}" + ("" if judged >= least else " MISSED"),
            f"{entry['null_oracle']:.1f}",
            f"{entry['time_over_null_oracle']:.2f}",
        ]
        for part in (entry["at_once"][count] for count in counts):
            each, together = part["times_real_time_each"], part["times_real_time_all"]
            by_cpu_each, by_cpu_scaling = part["times_real_time_by_cpu"], part["scaling_by_cpu"]
            cells.append(
                f"{each:.1f}, {together:.1f} ({part['scaling']:.2f}); {by_cpu_each:.1f} ({by_cpu_scaling:.2f})"
            )
        cells.append(f"{entry['documents']} of {entry['documents']}" if entry["identical"] else "NO")
        table.add_row(*cells)
    Console(width=None if sys.stdout.isatty() else 200).print(table)


def _speed_cells(figures: Mapping[str, Any]) -> tuple[str, str]:
    low, high = figures["times_real_time_range"]
    return f"{figures['times_real_time']:.1f} ({low:.1f} to {high:.1f})", f"{figures['times_real_time_by_cpu']:.1f}"


if __name__ == "__main__":
    sys.exit(main())
