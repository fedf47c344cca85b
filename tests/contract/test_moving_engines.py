"""Several identical servers and their engines: restarts, kills, hangs, replicas that lag, streams that grow old."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest

from builders import build_composed_pack, build_constant_pack
from dns_server import DnsServer
from guarantees.shim_engines import ShimEngine, ShimFleet
from oracle_calls import EXPERIMENT, Calls, decode, identity, prefill, reason_of
from oracle_process import OracleProcess
from oracle_server.rpc.recompute import recompute_from
from postgres_server import PostgresServer
from replicated_servers import ReplicatedServers, stream_ends
from sharded_server import wait_for
from step_oracle.v1 import experiment_pb2, oracle_service_pb2
from vllm_shim.config import ShimConfig
from vllm_shim.step_shape import DecodeStep
from vllm_shim.stream import OracleStream, replicas_of

ENGINES = 4


@contextmanager
def two_servers(folder: Path, database_url: str = "") -> Iterator[ReplicatedServers]:
    """Two servers whose streams live about a second, so that every engine moves between them all the time."""
    build_composed_pack(folder / "pack", ratios=[0.9, 1.0, 1.1])
    with ReplicatedServers(folder, 2, arguments=("--max-stream-age", "1"), database_url=database_url) as servers:
        servers.create(folder / "pack", seed=3)
        yield servers


@pytest.fixture(scope="module")
def apart(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ReplicatedServers]:
    """Each with a state of its own: one can lag."""
    with two_servers(tmp_path_factory.mktemp("apart")) as servers:
        yield servers


@pytest.fixture(scope="module")
def pair(postgres: PostgresServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ReplicatedServers]:
    """Two of one PostgreSQL."""
    with two_servers(tmp_path_factory.mktemp("pair"), postgres.new_database()) as servers:
        yield servers


def fleet_of(pair: ReplicatedServers, traces: Path, name: str, budget_seconds: float = 10.0) -> ShimFleet:
    """Engines with and without leases that know both servers."""

    def engine(number: int) -> ShimEngine:
        return ShimEngine(
            pair.target,
            f"{name}-{number}",
            traces,
            seed=number,
            period_seconds=0.02,
            leases=number % 2 == 0,
            budget_seconds=budget_seconds,
        )

    return ShimFleet(ENGINES, engine)


def check(fleet: ShimFleet, pair: ReplicatedServers, traces: Path) -> None:
    """No step failed, none went back, and each was answered as any replica would have answered it."""
    assert fleet.failures == []
    assert [engine.went_back for engine in fleet.engines] == [0] * ENGINES
    report = pair.recompute(traces)
    assert (report.equal, report.different, report.skipped) == (fleet.steps, 0, 0)
    assert sum(engine.leased for engine in fleet.engines) > 0


def test_a_rolling_restart_fails_no_step(pair: ReplicatedServers, tmp_path: Path) -> None:
    with fleet_of(pair, tmp_path, "restart") as fleet:
        fleet.go_on(10)
        for server in pair.servers:
            assert server.terminate() == 0
            fleet.go_on(10)
            server.start()
            # Until some are at the one that is back.
            wait_for(lambda server=server: stream_ends(server).get("OK", 0) > 0)  # type: ignore[misc]
    check(fleet, pair, tmp_path)


def test_an_activation_reaches_engines_that_move_and_none_goes_back(pair: ReplicatedServers, tmp_path: Path) -> None:
    with Calls(pair.servers[1].target) as calls:
        current = calls.experiments.GetExperiment(experiment_pb2.GetExperimentRequest(name=EXPERIMENT), timeout=10)
        generation, digest = current.experiment.generation, current.experiment.binding.default_pack_digest
    with fleet_of(pair, tmp_path, "activate") as fleet:
        fleet.go_on(5)
        for number in range(4):
            pair.activate(number % 2, digest, seed=100 + number)
            fleet.go_on(20)
        wait_for(lambda: all(engine.stream.saw(generation + 4) is not None for engine in fleet.engines))
    check(fleet, pair, tmp_path)


def test_a_killed_replica_fails_no_step(pair: ReplicatedServers, tmp_path: Path) -> None:
    with fleet_of(pair, tmp_path, "kill") as fleet:
        fleet.go_on(10)
        pair.servers[0].kill()
        fleet.go_on(10)
        pair.servers[0].start()
    check(fleet, pair, tmp_path)


def test_a_replica_that_hangs_fails_no_step(pair: ReplicatedServers, tmp_path: Path) -> None:
    with fleet_of(pair, tmp_path, "hang", budget_seconds=4.0) as fleet:
        fleet.go_on(10)
        os.kill(pair.servers[1].pid, signal.SIGSTOP)
        lost_at = time.monotonic() + 4.5
        try:
            # An engine that stayed would be lost by then.
            wait_for(lambda: time.monotonic() > lost_at or bool(fleet.failures))
            fleet.go_on(5)
        finally:
            os.kill(pair.servers[1].pid, signal.SIGCONT)
        fleet.go_on(10)
    check(fleet, pair, tmp_path)


def test_no_engine_goes_back_where_one_replica_lags(apart: ReplicatedServers, tmp_path: Path) -> None:
    build_constant_pack(tmp_path.parent / "newer", latency_ns=7_000_000)
    digests = []
    for server in apart.servers:
        with Calls(server.target) as calls:
            digests.append(calls.upload(tmp_path.parent / "newer"))
    behind = apart.servers[1]
    with fleet_of(apart, tmp_path, "lag") as fleet:
        fleet.go_on(5)
        apart.activate(0, digests[0], seed=4)
        before = stream_ends(behind).get("STALE_GENERATION", 0)
        # Engines that have seen the newer generation come to the one that lags, and are sent on.
        wait_for(lambda: stream_ends(behind).get("STALE_GENERATION", 0) >= before + ENGINES)
        fleet.go_on(20)
        apart.activate(1, digests[1], seed=4)
        wait_for(lambda: all(engine.stream.saw(2) is not None for engine in fleet.engines))
        ends = stream_ends(behind).get("OK", 0)
        wait_for(lambda: stream_ends(behind).get("OK", 0) > ends)
    check(fleet, apart, tmp_path)


def test_a_stream_that_is_old_ends_between_steps_and_leases_stay(server_of_short_streams: OracleProcess) -> None:
    server = server_of_short_streams
    config = ShimConfig.from_environment({"STEP_ORACLE_TARGET": server.target, "STEP_ORACLE_ENGINE_ID": "e"}, [])
    with Calls(server.target) as calls:
        incarnation = calls.attach(identity("e")).incarnation
    opening = oracle_service_pb2.StreamOpen(engine=identity("e"), incarnation=incarnation, leases=True)
    stream = OracleStream(config, replicas_of(config), opening)
    step = DecodeStep([], [], [], 4, 4000, 1000, 0)
    try:
        stream.wait(stream.submit_decode(0, step, lambda _: decode(0)))
        index, asked = 1, 0
        ends = stream_ends(server).get("OK", 0)
        while stream_ends(server).get("OK", 0) < ends + 3:
            pending = stream.submit_decode(index, step, lambda _: decode(index))  # noqa: B023 - called at once, or not
            assert stream.wait(pending).step_index == index
            asked += pending.lease is None
            index += 1
        assert index > 10
        assert asked == 0
        assert stream.wait(stream.submit(prefill(index, (100, 0)))).generation == 1
        with Calls(server.target) as calls:
            request = experiment_pb2.ListEnginesRequest(parent=EXPERIMENT)
            (engine,) = calls.experiments.ListEngines(request, timeout=10).engines
        assert (engine.incarnation, engine.reconnects, engine.streaming) == (incarnation, 0, True)
    finally:
        stream.close()


@pytest.fixture(params=[(), ("--shards", "2")], ids=["one process", "two shards"])
def server_of_short_streams(
    request: pytest.FixtureRequest, new_server: Callable[..., OracleProcess], pack_dirs: dict[str, Path]
) -> OracleProcess:
    """A server whose streams live a second."""
    server = new_server(metrics="127.0.0.1:0", arguments=("--max-stream-age", "1", *request.param))
    with Calls(server.target) as calls:
        calls.create(calls.upload(pack_dirs["composed"]))
    return server


def test_a_stream_lasts_where_age_is_off(new_server: Callable[..., OracleProcess], pack_dirs: dict[str, Path]) -> None:
    server = new_server(arguments=("--max-stream-age", "0"))
    with Calls(server.target) as calls:
        calls.create(calls.upload(pack_dirs["composed"]))
        stream = calls.join("e")
        assert stream.ask(decode(0))
        stream.close()


def opened(calls: Calls, engine_id: str, min_generation: int, experiment: str = EXPERIMENT) -> object:
    """What an engine hears that opens a stream and has seen a generation."""
    config = oracle_service_pb2.EngineConfig(max_num_seqs=64)
    engine = identity(engine_id, experiment)
    stream = calls.oracle.StreamSteps(
        iter(
            [
                oracle_service_pb2.StreamStepsRequest(
                    open=oracle_service_pb2.StreamOpen(engine=engine, config=config, incarnation=1),
                    min_generation=min_generation,
                )
            ]
        ),
        timeout=10,
    )
    try:
        return next(stream).opened.generation
    except grpc.RpcError as error:
        return reason_of(error)


def test_an_engine_that_has_seen_more_is_sent_on_and_not_refused(calls: Calls, pack_dirs: dict[str, Path]) -> None:
    """What a replica that lags says of an experiment it does not have yet, or has at an older generation."""
    stale = ("UNAVAILABLE", "STALE_GENERATION")
    assert opened(calls, "e", 0) == ("NOT_FOUND", "EXPERIMENT_NOT_FOUND")
    assert opened(calls, "e", 1) == stale
    assert opened(calls, "e", 1, "tenants/nobody/experiments/default") == stale
    with pytest.raises(grpc.RpcError) as caught:
        calls.attach(identity("e"), device_generation=1)
    assert reason_of(caught.value) == stale
    with pytest.raises(grpc.RpcError) as caught:
        calls.sample(identity("e"), [decode(0)], min_generation=1)
    assert reason_of(caught.value) == stale
    # A generation that does not fit the engine is none of its business: it is bound by a newer one.
    calls.create(calls.upload(pack_dirs["tied"]))
    assert opened(calls, "e", 1) == ("FAILED_PRECONDITION", "ENGINE_MISMATCH")
    assert opened(calls, "e", 2) == stale
    # And it holds no place here.
    request = experiment_pb2.ListEnginesRequest(parent=EXPERIMENT)
    assert not calls.experiments.ListEngines(request, timeout=10).engines


def test_a_replica_takes_an_engine_that_attached_at_another(apart: ReplicatedServers) -> None:
    """Without a word from the other one."""
    first, second = (Calls(server.target) for server in apart.servers)
    with first, second:
        engine = identity("attached-elsewhere")
        incarnation = first.attach(engine).incarnation
        here, there = first.open(engine, incarnation), second.open(engine, incarnation)
        assert there.opened.incarnation == incarnation
        assert there.ask(decode(5)) == here.ask(decode(5))
        here.close()
        there.close()


def test_engines_follow_the_addresses_of_a_name(tmp_path: Path, pack_dirs: dict[str, Path]) -> None:
    """`dns:///` of a headless service: a replica that joins gets its share, one that leaves fails no step."""
    arguments = ("--max-stream-age", "1")
    first = OracleProcess(tmp_path / "first", metrics="127.0.0.1:0", arguments=arguments)
    with first, DnsServer({"oracle.test": ["127.0.0.1"]}) as dns:
        port = first.target.rpartition(":")[2]
        second = OracleProcess(
            tmp_path / "second", listen=(f"127.0.0.2:{port}",), metrics="127.0.0.1:0", arguments=arguments
        )
        with second:
            for server in (first, second):
                with Calls(server.target) as calls:
                    calls.create(calls.upload(pack_dirs["composed"]))
            target = f"dns://{dns.address}/oracle.test:{port}"
            (tmp_path / "traces").mkdir()

            def engine(number: int) -> ShimEngine:
                return ShimEngine(
                    target, f"e{number}", tmp_path / "traces", seed=number, period_seconds=0.02, leases=False
                )

            with ShimFleet(ENGINES, engine) as fleet:
                fleet.go_on(10)
                assert stream_ends(second) == {}
                dns.names["oracle.test"] = ["127.0.0.1", "127.0.0.2"]
                wait_for(lambda: stream_ends(second).get("OK", 0) >= ENGINES)
                assert first.terminate() == 0
                fleet.go_on(10)
            assert fleet.failures == []
            report = recompute_from(second.state_dir, sorted((tmp_path / "traces").iterdir()))
            assert (report.equal, report.different) == (fleet.steps, 0)


def test_a_command_goes_to_the_replica_that_serves(
    server: OracleProcess, pack_dirs: dict[str, Path], tmp_path: Path
) -> None:
    targets = f"unix:{tmp_path}/nobody, {server.target}"
    with Calls(targets) as calls:
        calls.create(calls.upload(pack_dirs["constant"]))
        assert calls.sample(identity("e"), [decode(0)])
    command = [sys.executable, "-m", "profiler.cli"]
    listed = subprocess.run(
        [*command, "experiment", "list", "--target", targets], capture_output=True, text=True, timeout=60
    )
    assert (listed.returncode, EXPERIMENT in listed.stdout) == (0, True), listed.stderr
    healthy = subprocess.run([*command, "health", "--target", targets], capture_output=True, text=True, timeout=60)
    assert (healthy.returncode, healthy.stdout) == (0, f"{targets}: SERVING\n")
    empty = subprocess.run(
        [*command, "experiment", "list", "--target", f"{server.target},"], capture_output=True, text=True, timeout=60
    )
    assert empty.returncode == 2
    assert "of each of its replicas with commas between them" in empty.stderr
