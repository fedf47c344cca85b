"""Paced engines, 50 steps/s each on a connection of its own: what one core carries, and where it breaks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from performance.load.client import LoadRun
from performance.packs import build_leasable_pack
from performance.servers import PERIOD_NS, Ours, play

WITHOUT_LEASES = (20, 100, 300, 600, 900, 1200)
WITH_LEASES = (100, 300, 600, 1000, 1500, 2000, 3000, 4000, 6000)
# What a core is promised to carry; measured several times.
PROMISED = {"without": 100, "with": 1500}
# Of a short run.
_QUICK = {"without": (20, 100, 300, 900), "with": (100, 600, 1500, 3000, 6000)}
_STEPS_PER_SECOND = 1_000_000_000 // PERIOD_NS


def measure(folder: Path, *, seconds: float, quick: bool) -> dict[str, Any]:
    """Rows for engines without and with leases; each table ends with the first row that breaks."""
    steps = int(seconds * _STEPS_PER_SECOND)
    with Ours(folder / "ours") as ours:
        build_leasable_pack(folder / "pack")
        ours.calls.create(ours.calls.upload(folder / "pack"))
        tables = {}
        for name, leases, counts in (("without", False, WITHOUT_LEASES), ("with", True, WITH_LEASES)):
            rows: list[dict[str, Any]] = []
            for engines in _QUICK[name] if quick else counts:
                script = ours.script(engines, steps, leases=leases)
                runs = []
                for _ in range(3 if engines == PROMISED[name] else 1):
                    run = play(script, ours.target, ours.pids, max_seconds=seconds + 60, may_fail=True)
                    runs.append(row(engines, steps, run))
                rows.append(middle(runs))
                if rows[-1]["broken"]:
                    break
            tables[name] = rows
        leasable, of_all = ours.lease_share(steps)
    return {
        "seconds": seconds,
        "leased_share_of_leasable": leasable,
        "leased_share_of_all": of_all,
        "without_leases": tables["without"],
        "with_leases": tables["with"],
    }


def middle(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The run with the median p99, and the p99 of all."""
    ordered = sorted(runs, key=lambda run: float(run["p99_ms"]))
    return ordered[len(runs) // 2] | {"p99_ms_of_runs": [run["p99_ms"] for run in ordered]}


def row(engines: int, steps: int, run: LoadRun) -> dict[str, Any]:
    """One load. Broken: something was not answered within two seconds of the end, or a connection failed."""
    p50, p99 = (float(value) / 1e6 for value in np.percentile(run.latency_ns, (50, 99)))
    return {
        "engines": engines,
        "steps_per_second": engines * steps / (run.last_answer_ns * 1e-9),
        "messages_per_second": run.answered / (run.last_answer_ns * 1e-9),
        "core": run.server_core,
        "waited": run.server_waited,
        "us_per_step": run.server_cpu_ns / (engines * steps) / 1e3,
        "us_per_message": run.server_cpu_ns / max(1, run.answered) / 1e3,
        "p50_ms": p50,
        "p99_ms": p99,
        "broken": not run.kept_up,
        "why": run.first_error or run.end,
        "generator_core": run.own_core,
        "send_late_p99_us": float(np.percentile(run.send_lateness_ns, 99)) / 1e3,
        "window_stalls": run.window_stalls,
        "socket_stalls": run.socket_stalls,
    }
