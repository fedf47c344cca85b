"""Replicas restart, die and lag under engines that move between them: no step fails and no engine goes back."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from guarantees.hot_swaps import binding_of, build_packs
from guarantees.row import Guarantee, Row, judged
from guarantees.shim_engines import ShimEngine, ShimFleet
from oracle_calls import Calls
from oracle_server.rpc.recompute import Report
from postgres_server import PostgresServer
from replicated_servers import ReplicatedServers, stream_ends

REPLICAS = 2
# So that every engine changes its replica all the time.
STREAM_SECONDS = 2
# What half of the first answers after a move may take longer than half of all others: a few round trips of a busy
# machine, below any step latency that matters.
MOVE_BOUND_MS = 10.0


@dataclass(frozen=True)
class Sizes:
    engines: int
    moves: int
    restarts: int
    kills: int
    activations: int
    period_seconds: float = 0.03
    # How much later than the first replica the others have an activation.
    lag_seconds: float = 0.5


LONG = Sizes(engines=20, moves=1000, restarts=20, kills=20, activations=60)
QUICK = Sizes(engines=6, moves=40, restarts=2, kills=2, activations=4)


def run(folder: Path, sizes: Sizes) -> list[Row]:
    packs = build_packs(folder)
    rows = []
    arguments = ("--max-stream-age", str(STREAM_SECONDS))
    with (
        PostgresServer() as postgres,
        ReplicatedServers(
            folder / "fleet", REPLICAS, arguments=arguments, database_url=postgres.new_database()
        ) as fleet,
    ):
        fleet.create(packs[1], **binding_of(1))
        rows += _grow_old(fleet, folder / "moves", sizes)
        rows += _restart(fleet, folder / "restarts", sizes)
        rows += _kill(fleet, folder / "kills", sizes)
    # Each with a state of its own: those of one database do not lag for long enough.
    with ReplicatedServers(folder / "apart", REPLICAS, arguments=arguments) as replicas:
        replicas.create(packs[1], **binding_of(1))
        rows += _lag(replicas, packs, folder / "lags", sizes)
    return rows


def _grow_old(replicas: ReplicatedServers, traces: Path, sizes: Sizes) -> list[Row]:
    def moves(fleet: ShimFleet) -> int:
        return sum(engine.stream.moves for engine in fleet.engines)

    def wait_for_moves(fleet: ShimFleet) -> None:
        while moves(fleet) < sizes.moves and not fleet.failures:
            fleet.go_on(5)

    # Without leases: a step is asked for at every moment, that of the move too.
    fleet, report = _under_load(replicas, traces, sizes, wait_for_moves, leases=False)
    waits = [wait for engine in fleet.engines for wait in engine.waits_ms]
    after = [wait for engine in fleet.engines for wait in engine.waits_after_move_ms]
    (p50, p99), (moved_p50, moved_p99) = np.percentile(waits, (50, 99)), np.percentile(after, (50, 99))
    done = f"{moves(fleet):,} streams that grew old between {REPLICAS} replicas, {sizes.engines} shim clients"
    return [
        _no_step_failed("streams grow old: no step fails", done, fleet, report),
        judged(
            "streams grow old: no step waits for it",
            f"{done}; the first answer after each",
            f"p50 {moved_p50:.1f} ms (p99 {moved_p99:.1f}); of all answers {p50:.1f} ({p99:.1f})",
            f"p50 <= {MOVE_BOUND_MS:g} ms more",
            holds=bool(moved_p50 - p50 <= MOVE_BOUND_MS),
        ),
    ]


def _restart(replicas: ReplicatedServers, traces: Path, sizes: Sizes) -> list[Row]:
    def restart(_: ShimFleet) -> None:
        for number in range(sizes.restarts):
            server = replicas.servers[number % REPLICAS]
            assert server.terminate() == 0
            server.start()
            _wait_for_streams(replicas, number % REPLICAS)

    fleet, report = _under_load(replicas, traces, sizes, restart)
    done = f"{sizes.restarts} restarts of {REPLICAS} replicas of one PostgreSQL in turn, {sizes.engines} shim clients"
    return [_no_step_failed("rolling restart: no step fails", done, fleet, report)]


def _kill(replicas: ReplicatedServers, traces: Path, sizes: Sizes) -> list[Row]:
    def kill(_: ShimFleet) -> None:
        for number in range(sizes.kills):
            server = replicas.servers[number % REPLICAS]
            server.kill()
            server.start()
            _wait_for_streams(replicas, number % REPLICAS)

    fleet, report = _under_load(replicas, traces, sizes, kill)
    done = f"kill -9 of one of {REPLICAS} replicas of one PostgreSQL, {sizes.kills} times, {sizes.engines} shim clients"
    return [_no_step_failed("a replica is killed: no step fails", done, fleet, report)]


def _lag(replicas: ReplicatedServers, packs: list[Path], traces: Path, sizes: Sizes) -> list[Row]:
    digests: list[list[str]] = []
    for server in replicas.servers:
        with Calls(server.target) as calls:
            digests.append([calls.upload(pack) for pack in packs])
    before = [stream_ends(server).get("STALE_GENERATION", 0) for server in replicas.servers]

    def activate(_: ShimFleet) -> None:
        for generation in range(2, sizes.activations + 2):
            for number in range(REPLICAS):
                # The two take turns in being behind.
                one = (number + generation) % REPLICAS
                replicas.activate(one, digests[one][generation % 3], **binding_of(generation))
                time.sleep(sizes.lag_seconds)

    fleet, report = _under_load(replicas, traces, sizes, activate)
    refused = sum(
        stream_ends(server).get("STALE_GENERATION", 0) - ends
        for server, ends in zip(replicas.servers, before, strict=True)
    )
    went_back = sum(engine.went_back for engine in fleet.engines)
    done = (
        f"{sizes.activations} activations, one replica {sizes.lag_seconds:g} s behind the other, {sizes.engines} shim "
        f"clients that move every {STREAM_SECONDS} s; {refused} times to a replica that was behind"
    )
    return [
        _no_step_failed("a replica lags: no step fails", done, fleet, report),
        judged(
            "a replica lags: no engine sees a generation go back",
            done,
            f"{went_back} of {fleet.steps:,} steps",
            "0",
            holds=went_back == 0 and refused > 0,
        ),
    ]


def _under_load(
    replicas: ReplicatedServers,
    traces: Path,
    sizes: Sizes,
    disturb: Callable[[ShimFleet], None],
    *,
    leases: bool = True,
) -> tuple[ShimFleet, Report]:
    """The fleet, ended, and what its answers recompute to from the first replica's folder."""
    traces.mkdir()

    def engine(number: int) -> ShimEngine:
        return ShimEngine(
            replicas.target,
            f"{traces.name}-{number}",
            traces,
            seed=number,
            period_seconds=sizes.period_seconds,
            leases=leases and number % 2 == 0,
        )

    with ShimFleet(sizes.engines, engine) as fleet:
        fleet.go_on(10)
        disturb(fleet)
        fleet.go_on(10)
    return fleet, replicas.recompute(traces)


def _wait_for_streams(replicas: ReplicatedServers, number: int) -> None:
    """Until engines have come to a replica that is back, so that taking away the other one is no outage of both."""
    end = time.monotonic() + 10 * STREAM_SECONDS
    while not stream_ends(replicas.servers[number]).get("OK", 0):
        assert time.monotonic() < end, "no engine comes to the replica that is back"
        time.sleep(0.05)


def _no_step_failed(guarantee: str, done: str, fleet: ShimFleet, report: Report) -> Row:
    failures = fleet.failures
    return judged(
        guarantee,
        done,
        f"{len(failures)} failed, {report.equal:,} answers equal, {report.different} different"
        + (f": {'; '.join(failures[:2])}" if failures else ""),
        "0",
        holds=not failures and report.equal == fleet.steps and not report.different + report.skipped,
    )


GUARANTEE = Guarantee(run, LONG, QUICK)
