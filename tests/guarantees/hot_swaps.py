"""Activations under load: no answer fails, none mixes two generations, and every engine knows at once."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from builders import build_composed_pack, build_hybrid_pack, build_sampled_pack
from guarantees.fleet_processes import FleetProcesses
from guarantees.row import Guarantee, Row, judged
from guarantees.shim_engines import ShimEngine
from oracle_calls import Calls
from oracle_process import OracleProcess
from oracle_server.rpc.recompute import Report, recompute_from
from step_oracle.v1 import experiment_pb2 as pb

RATIOS = [0.9, 0.95, 1.0, 1.1]
SEEN_BOUND_MS = 100.0
# So long an engine may take to hear of a generation before the run counts it as one that never did.
_GIVE_UP_SECONDS = 5.0


@dataclass(frozen=True)
class Sizes:
    activations: int
    engines: int
    period_seconds: float
    # The least time from one activation to the next.
    every_seconds: float
    # That the engines are shared out over.
    processes: int


LONG = Sizes(activations=1000, engines=50, period_seconds=0.05, every_seconds=0.08, processes=5)
QUICK = Sizes(activations=60, engines=20, period_seconds=0.05, every_seconds=0.05, processes=2)


@dataclass(frozen=True)
class Swapped:
    """What one run saw; `seen_ms` is, per activation, from its call until the last engine knew of it."""

    report: Report
    failures: list[str]
    went_back: int
    steps: int
    leased: int
    generations: int
    seen_ms: list[float]
    never_seen: int
    call_ms: list[float]


def build_packs(folder: Path) -> list[Path]:
    """One pack of each kind."""
    build_composed_pack(folder / "composed", ratios=RATIOS)
    build_sampled_pack(folder / "sampled")
    build_hybrid_pack(folder / "hybrid", ratios=RATIOS)
    return [folder / "composed", folder / "sampled", folder / "hybrid"]


def binding_of(generation: int) -> dict[str, Any]:
    """What is bound beside the pack: no two generations in a row answer anything alike."""
    binding: dict[str, Any] = {"seed": generation, "time_scale": 1 + generation % 7 / 10}
    if generation % 4 == 0:
        binding["overlays"] = [pb.Overlay(slow_down_factor=1.5, begin_step_index=generation % 50)]
    return binding


def swap(folder: Path, sizes: Sizes, *, arguments: Sequence[str] = ()) -> Swapped:
    """Activate while the fleet runs, then recompute every answer from the generations that the server's folder has."""
    packs, traces = build_packs(folder), folder / "traces"
    traces.mkdir()
    seen_ms, call_ms, never = [], [], 0
    with OracleProcess(folder / "state", arguments=arguments) as server, Calls(server.target) as calls:
        digests = [calls.upload(pack) for pack in packs]
        calls.create(digests[1], **binding_of(1))

        engine = partial(_engine, target=server.target, traces=traces, period_seconds=sizes.period_seconds)
        with FleetProcesses(sizes.engines, sizes.processes, engine) as fleet:
            fleet.go_on(3)
            for generation in range(2, sizes.activations + 2):
                begin = time.monotonic()
                calls.activate(digests[generation % 3], **binding_of(generation))
                call_ms.append(1e3 * (time.monotonic() - begin))
                time.sleep(max(0.0, begin + sizes.every_seconds - time.monotonic()))
                last = fleet.saw(generation, begin + _GIVE_UP_SECONDS)
                never += last is None
                seen_ms += [] if last is None else [1e3 * (last - begin)]
            fleet.go_on(3)
            fleet.stop()
            done = fleet.done
        report = recompute_from(server.state_dir, sorted(traces.iterdir()))
    return Swapped(
        report=report,
        failures=done.failures,
        went_back=done.went_back,
        steps=done.steps,
        leased=done.leased,
        generations=sizes.activations,
        seen_ms=seen_ms,
        never_seen=never,
        call_ms=call_ms,
    )


def _engine(number: int, *, target: str, traces: Path, period_seconds: float) -> ShimEngine:
    # Every third without leases: all its answers come over the wire.
    return ShimEngine(
        target, f"vllm-{number}", traces, seed=number, period_seconds=period_seconds, leases=number % 3 > 0
    )


def run(folder: Path, sizes: Sizes) -> list[Row]:
    found = swap(folder, sizes)
    done = f"{sizes.activations:,} activations under {sizes.engines} shim clients"
    report = found.report
    p50, p99 = np.percentile(found.seen_ms, (50, 99)) if found.seen_ms else (float("inf"),) * 2
    examples = "; ".join(report.examples[:2] + found.failures[:2])
    return [
        judged(
            "hot swap: no step fails",
            done,
            f"{len(found.failures)} failed engines of {sizes.engines}, {found.steps:,} steps" + _in_brackets(examples),
            "0",
            holds=not found.failures and found.steps > 0,
        ),
        judged(
            "hot swap: every answer recomputes at the generation it names",
            f"{done}; {found.leased:,} of the answers from leases",
            f"{report.equal:,} equal, {report.different} different, {report.skipped} left out",
            "all equal",
            holds=report.equal == found.steps and not report.different + report.skipped,
        ),
        judged(
            "no engine sees a generation go back", done, f"{found.went_back} steps", "0", holds=found.went_back == 0
        ),
        judged(
            "activation known to every engine, p99",
            f"{done}; from the call to the last engine",
            f"{p99:.1f} ms (p50 {p50:.1f}, longest {max(found.seen_ms, default=float('inf')):.1f}; the call itself "
            f"{np.percentile(found.call_ms, 99):.1f} ms); {found.never_seen} never",
            f"<= {SEEN_BOUND_MS:g} ms",
            holds=p99 <= SEEN_BOUND_MS and not found.never_seen,
        ),
    ]


def _in_brackets(text: str) -> str:
    return f" ({text})" if text else ""


GUARANTEE = Guarantee(run, LONG, QUICK)
