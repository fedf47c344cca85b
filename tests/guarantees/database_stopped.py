"""Two servers over one PostgreSQL: engines hear of every activation soon, and step on while the database is stopped."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import grpc

from builders import build_composed_pack
from fleet_servers import FleetServers
from guarantees.fleet_processes import Done, FleetProcesses
from guarantees.row import Guarantee, Row, judged
from guarantees.shim_engines import ShimEngine
from oracle_calls import EXPERIMENT, TIMEOUT, Calls, reason_of
from oracle_server.rpc.recompute import Report, recompute_from
from postgres_server import PostgresServer
from step_oracle.v1.experiment_pb2 import GetExperimentRequest

LIMIT_MS = 100.0
# That the engines are shared out over.
PROCESSES = 2
REFUSED = ("UNAVAILABLE", "DATABASE_UNAVAILABLE")


@dataclass(frozen=True)
class Sizes:
    activations: int
    engines: int
    # How long the database is stopped, and how long it hangs.
    down_seconds: float
    period_seconds: float = 0.05


LONG = Sizes(activations=300, engines=20, down_seconds=60.0)
QUICK = Sizes(activations=100, engines=8, down_seconds=4.0)


def run(folder: Path, sizes: Sizes) -> list[Row]:
    traces = folder / "traces"
    traces.mkdir()
    build_composed_pack(folder / "pack", ratios=[0.9, 1.0, 1.1])
    build_composed_pack(folder / "other", ratios=[0.8, 1.0, 1.3])
    with PostgresServer() as postgres, FleetServers(postgres.new_database(), folder / "fleet") as servers:
        with Calls(servers.targets[0]) as first, Calls(servers.targets[1]) as second:
            both = (first, second)
            digests = [first.upload(folder / name) for name in ("pack", "other")]
            first.create(digests[0])

            engine = partial(_engine, targets=servers.targets, traces=traces, period_seconds=sizes.period_seconds)
            with FleetProcesses(sizes.engines, PROCESSES, engine) as fleet:
                fleet.go_on(5)
                began = []
                for number in range(sizes.activations):
                    begin = time.monotonic()
                    began.append((both[number % 2].activate(digests[number % 2]).experiment.generation, begin))
                fleet.go_on(5)
                seen_ms, missing = _seen(fleet, began)
                rows = [
                    _without(fleet, both, digests[0], sizes, how, stop, start)
                    for how, stop, start in (
                        ("fast shutdown", postgres.stop, postgres.start),
                        ("SIGSTOP", postgres.freeze, postgres.go_on),
                    )
                ]
                serving = all(process.is_serving() for process in servers.processes)
                fleet.stop()
                done = fleet.done
        report = recompute_from(folder / "fleet" / "a", sorted(traces.iterdir()), servers.database)
    return [_activations(seen_ms, missing, sizes), *rows, _answers(done, report, serving=serving)]


def _engine(number: int, *, targets: Sequence[str], traces: Path, period_seconds: float) -> ShimEngine:
    target = targets[number % len(targets)]
    return ShimEngine(
        target, f"vllm-{number}", traces, seed=number, period_seconds=period_seconds, leases=number % 4 < 2
    )


def _without(
    fleet: FleetProcesses,
    both: tuple[Calls, Calls],
    digest: str,
    sizes: Sizes,
    how: str,
    stop: Callable[[], object],
    start: Callable[[], object],
) -> Row:
    """Steps while the database does not answer, changes that are refused, and how soon all is well again."""
    before = fleet.done.steps
    wrong: list[str] = []
    refused = 0
    longest = 0.0
    stop()
    try:
        end = time.monotonic() + sizes.down_seconds
        while time.monotonic() < end:
            for calls in both:
                begin = time.monotonic()
                reason = _activate(calls, digest)
                longest = max(longest, time.monotonic() - begin)
                refused += 1
                if reason != REFUSED:
                    wrong.append(f"a change: {reason or 'was made'}")
                calls.experiments.GetExperiment(GetExperimentRequest(name=EXPERIMENT), timeout=TIMEOUT)
            fleet.go_on(2)
    finally:
        start()
    steps = fleet.done.steps - before
    begin = time.monotonic()
    for calls in both:
        while _activate(calls, digest) is not None and time.monotonic() < begin + TIMEOUT:
            time.sleep(0.02)
    back = time.monotonic() - begin
    fleet.go_on(5)
    failures = fleet.done.failures
    wrong += failures
    return judged(
        "attached engines step on without PostgreSQL, changes are refused with a reason",
        f"{how} for {sizes.down_seconds:g} s, {sizes.engines} shim clients at two servers",
        f"{steps:,} steps, {len(failures)} failed; {refused} changes refused, the slowest in {longest:.1f} s; "
        f"changes are made again after {back:.1f} s" + (f"; {'; '.join(wrong[:2])}" if wrong else ""),
        "0 failed",
        holds=not wrong and steps > 0 and back < TIMEOUT,
    )


def _activate(calls: Calls, digest: str) -> tuple[str, str] | None:
    """Why an activation was refused; None where it was made."""
    try:
        calls.activate(digest)
    except grpc.RpcError as error:
        return reason_of(error)
    return None


def _seen(fleet: FleetProcesses, began: list[tuple[int, float]]) -> tuple[list[float], int]:
    """(ms from the call to the last engine that knew of each generation, how many some engine never knew of)."""
    until = time.monotonic()
    seen = [(begin, fleet.saw(generation, until)) for generation, begin in began]
    return sorted(1000 * (at - begin) for begin, at in seen if at is not None), sum(at is None for _, at in seen)


def _activations(seen_ms: list[float], missing: int, sizes: Sizes) -> Row:
    p50, p99 = (seen_ms[int(share * (len(seen_ms) - 1))] for share in (0.5, 0.99))
    return judged(
        "every engine of two servers knows of an activation, p99",
        f"{sizes.activations} activations through both servers in turn, {sizes.engines} shim clients",
        f"{p99:.1f} ms (p50 {p50:.1f}), from the call to the last engine; {missing} never known",
        f"{LIMIT_MS:g} ms",
        holds=p99 <= LIMIT_MS and not missing,
    )


def _answers(done: Done, report: Report, *, serving: bool) -> Row:
    return judged(
        "what two servers answered over all that recomputes, no generation goes back",
        "the same",
        f"{report.equal:,} of {done.steps:,} answers equal, {report.different} different, {done.went_back} went back"
        + ("" if serving else "; a server is not SERVING"),
        "0",
        holds=not report.different and report.equal == done.steps and not done.went_back and serving,
    )


GUARANTEE = Guarantee(run, LONG, QUICK)
