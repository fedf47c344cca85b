"""Two real servers over one PostgreSQL: answers, activations, a database that stops."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest

from fleet_servers import FleetServers
from guarantees.shim_engines import ShimEngine, ShimFleet
from oracle_calls import TIMEOUT, Calls, decode, identity, mixed_steps, reason_of
from oracle_process import OracleFailed, OracleProcess
from oracle_server.rpc.recompute import recompute_from
from postgres_server import PostgresServer, file_of
from sharded_server import TWO_SHARDS, wait_for
from step_oracle.v1.experiment_pb2 import (
    Experiment,
    GetExperimentRequest,
    ListExperimentsRequest,
    ListGenerationsRequest,
)

ACTIVATIONS = 100
TENANT = "tenants/default"


@pytest.fixture(scope="module")
def own_postgres() -> Iterator[PostgresServer]:
    """One that these tests may stop."""
    with PostgresServer(durable=False) as server:
        yield server


@pytest.fixture(scope="module")
def fleet(own_postgres: PostgresServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[FleetServers]:
    """Two servers of one database; each test has an experiment of its own."""
    with FleetServers(own_postgres.new_database(), tmp_path_factory.mktemp("fleet")) as servers:
        yield servers


@pytest.fixture
def both(fleet: FleetServers) -> Iterator[tuple[Calls, Calls]]:
    """A connection to each."""
    with Calls(fleet.targets[0]) as first, Calls(fleet.targets[1]) as second:
        yield first, second


@pytest.fixture
def name(both: tuple[Calls, Calls], pack_dirs: dict[str, Path]) -> str:
    """An experiment that answers from the composed pack, made at the first server."""
    first, _ = both
    request = ListExperimentsRequest(parent=TENANT)
    number = len(list(first.client.pages(first.experiments.ListExperiments, request, "experiments")))
    return str(first.create(first.upload(pack_dirs["composed"]), f"e{number}", seed=42).name)


@pytest.fixture
def engines(fleet: FleetServers, name: str, tmp_path: Path) -> Iterator[ShimFleet]:
    """Four shim clients at each server, half of them with leases, that take a step each 20 ms."""
    (tmp_path / "traces").mkdir()

    def engine(number: int) -> ShimEngine:
        return ShimEngine(
            fleet.targets[number % 2],
            f"vllm-{number}",
            tmp_path / "traces",
            seed=number,
            period_seconds=0.02,
            leases=number % 4 < 2,
            experiment=name,
        )

    with ShimFleet(8, engine) as running:
        yield running


def test_every_server_gives_the_same_answers(both: tuple[Calls, Calls], name: str, pack_dirs: dict[str, Path]) -> None:
    first, second = both
    steps = mixed_steps(200)
    engine = identity("x", name)
    assert first.sample(engine, steps) == second.sample(engine, steps)
    second.activate(second.upload(pack_dirs["hybrid"]), name, seed=7)
    assert first.sample(engine, steps, min_generation=2) == second.sample(engine, steps)
    assert {reply.generation for reply in first.sample(engine, steps)} == {2}


def test_an_activation_is_answered_from_by_every_server_soon(
    both: tuple[Calls, Calls], name: str, pack_dirs: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """Each engine hears of it on its stream; how soon is printed, and within a time no machine should miss."""
    digests = [both[0].upload(pack_dirs[pack]) for pack in ("composed", "hybrid")]
    streams = []
    for number, calls in enumerate(both):
        engine = identity(f"e{number}", name)
        streams.append(calls.open(engine, calls.attach(engine).incarnation, leases=True))
    took = []
    for number in range(ACTIVATIONS):
        begin = time.monotonic()
        generation = both[number % 2].activate(digests[number % 2], name, seed=number).experiment.generation
        # The call returns when every server answers from it.
        assert [stream.receive().new_generation for stream in streams] == [generation, generation]
        took.append(time.monotonic() - begin)
        for calls in both:
            assert calls.sample(identity("x", name), [decode(0)])[0].generation == generation
    for stream in streams:
        stream.close()
    took.sort()
    p50, p99 = (1000 * took[int(share * (len(took) - 1))] for share in (0.5, 0.99))
    with capsys.disabled():
        print(f"\nactivation to the engines of both servers, {ACTIVATIONS}: p50 {p50:.1f} ms, p99 {p99:.1f} ms")
    assert p50 < 1000


@pytest.mark.parametrize("how", ["stopped", "frozen"])
def test_steps_go_on_without_the_database_and_changes_are_refused(
    how: str,
    own_postgres: PostgresServer,
    fleet: FleetServers,
    both: tuple[Calls, Calls],
    name: str,
    engines: ShimFleet,
    pack_dirs: dict[str, Path],
    tmp_path: Path,
) -> None:
    first, second = both
    digest = first.upload(pack_dirs["composed"])
    engines.go_on(10)
    held = first.open(identity("held", name), first.attach(identity("held", name)).incarnation)
    held.ask(decode(0))
    # The other server hears of it too.
    wait_for(lambda: all(_experiment(calls, name).attached_engines == 9 for calls in both))
    (own_postgres.stop if how == "stopped" else own_postgres.freeze)()
    try:
        for calls in both:
            with pytest.raises(grpc.RpcError) as refused:
                calls.activate(digest, name, seed=1)
            assert reason_of(refused.value) == ("UNAVAILABLE", "DATABASE_UNAVAILABLE")
            assert "retry" in (refused.value.details() or "")
            assert _experiment(calls, name).generation == 1
        with pytest.raises(grpc.RpcError) as refused:
            first.attach(identity("new", name))
        assert reason_of(refused.value) == ("UNAVAILABLE", "DATABASE_UNAVAILABLE")
        with pytest.raises(grpc.RpcError) as refused:
            first.experiments.ListGenerations(ListGenerationsRequest(name=name), timeout=TIMEOUT)
        assert reason_of(refused.value) == ("UNAVAILABLE", "DATABASE_UNAVAILABLE")
        # An engine that is known comes back, here or at the other server.
        moved = second.open(identity("held", name), held.opened.incarnation)
        assert moved.ask(decode(1))[0].generation == 1
        assert first.open(identity("held", name), held.opened.incarnation).ask(decode(2))
        engines.go_on(20)
        assert all(process.is_serving() for process in fleet.processes)
    finally:
        (own_postgres.start if how == "stopped" else own_postgres.go_on)()

    wait_for(lambda: _is_activated(first, name, digest))
    wait_for(lambda: _is_activated(second, name, digest))
    engines.go_on(20)
    assert not engines.failures
    assert not any(engine.went_back for engine in engines.engines)
    for engine in engines.engines:
        engine.stop()
    report = recompute_from(fleet.processes[0].state_dir, sorted((tmp_path / "traces").iterdir()), fleet.database)
    assert (report.different, report.equal) == (0, engines.steps)


def _experiment(calls: Calls, name: str) -> Experiment:
    request = GetExperimentRequest(name=name)
    return calls.experiments.GetExperiment(request, timeout=TIMEOUT).experiment  # type: ignore[no-any-return]


def _is_activated(calls: Calls, name: str, digest: str) -> bool:
    """Whether changes are made again; what refuses one is the database alone."""
    try:
        calls.activate(digest, name, seed=2)
    except grpc.RpcError as refused:
        is_database = reason_of(refused) == ("UNAVAILABLE", "DATABASE_UNAVAILABLE")
        if not is_database:
            raise
        return False
    return True


def test_shards_follow_what_another_server_changes(
    own_postgres: PostgresServer, tmp_path: Path, pack_dirs: dict[str, Path]
) -> None:
    url = own_postgres.new_database()
    with (
        FleetServers(url, tmp_path / "sharded", arguments=TWO_SHARDS) as fleet,
        Calls(fleet.targets[0]) as first,
        Calls(fleet.targets[1]) as second,
    ):
        first.create(first.upload(pack_dirs["composed"]), seed=42)
        stream = second.open(identity("e"), second.attach(identity("e")).incarnation)
        assert second.sample(identity("x"), [decode(0)])[0].generation == 1
        first.activate(first.upload(pack_dirs["hybrid"]))
        assert stream.receive().new_generation == 2
        assert second.sample(identity("x"), [decode(0)])[0].generation == 2
        stream.close()


def test_a_database_that_does_not_answer_at_the_start_is_said(tmp_path: Path) -> None:
    url = "postgresql://somebody:the-password@127.0.0.1:1/nothing"
    arguments = ("--database", str(file_of(url, tmp_path / "url")))
    with pytest.raises(OracleFailed, match="the database does not answer") as failed:
        OracleProcess(tmp_path / "state", arguments=arguments).start()
    assert "the-password" not in str(failed.value)


def test_a_second_server_without_shared_packs_is_refused(
    own_postgres: PostgresServer, tmp_path: Path, new_server: Callable[..., OracleProcess]
) -> None:
    file = file_of(own_postgres.new_database(), tmp_path / "url")
    new_server("alone", arguments=("--database", str(file)))
    with pytest.raises(OracleFailed, match="--pack-folder"):
        new_server("second", arguments=("--database", str(file)))
