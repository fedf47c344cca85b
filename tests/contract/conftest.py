"""A real server, real packs, a real channel."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from builders import build_composed_pack, build_constant_pack, build_hybrid_pack, build_sampled_pack
from oracle_calls import TIMEOUT, Calls
from oracle_process import OracleProcess
from oracle_server.pack import Engine
from postgres_server import PostgresServer, file_of
from sharded_server import TWO_SHARDS, shard_pids, wait_for
from step_oracle.v1 import tenant_pb2


@pytest.fixture(scope="session")
def pack_dirs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of valid packs, by what is special about them."""
    folder = tmp_path_factory.mktemp("packs")
    build_composed_pack(folder / "composed", ratios=[0.9, 0.95, 1.0, 1.1])
    build_sampled_pack(folder / "sampled")
    build_hybrid_pack(folder / "hybrid", ratios=[0.9, 0.95, 1.0, 1.1])
    build_constant_pack(folder / "constant", latency_ns=10_000_000)
    build_constant_pack(folder / "constant20", latency_ns=20_000_000)
    build_constant_pack(folder / "tied", latency_ns=30_000_000, engine=Engine(max_num_seqs=128))
    return {path.name: path for path in folder.iterdir()}


@pytest.fixture
def new_server(tmp_path: Path) -> Iterator[Callable[..., OracleProcess]]:
    """Starts servers, each over a folder of its own unless one is given; they end with the test."""
    started: list[OracleProcess] = []

    def start(name: str = "state", **options: object) -> OracleProcess:
        process = OracleProcess(tmp_path / name, **options)  # type: ignore[arg-type]
        started.append(process)
        return process.start()

    yield start
    for process in started:
        process.stop()


@pytest.fixture
def server(request: pytest.FixtureRequest, new_server: Callable[..., OracleProcess], tmp_path: Path) -> OracleProcess:
    """A fresh server; with the parameter `postgres` (stores.BOTH_STORES) over a PostgreSQL."""
    if getattr(request, "param", "sqlite") == "sqlite":
        return new_server()
    postgres: PostgresServer = request.getfixturevalue("postgres")
    database = file_of(postgres.new_database(), tmp_path / "database")
    return new_server(arguments=("--database", str(database)))


@pytest.fixture
def calls(server: OracleProcess) -> Iterator[Calls]:
    """A connection to `server`."""
    with Calls(server.target) as connection:
        yield connection


@pytest.fixture(scope="module")
def shared_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OracleProcess]:
    """A server the tests of a module share."""
    with OracleProcess(tmp_path_factory.mktemp("shared") / "state", metrics="127.0.0.1:0") as process:
        yield process


@pytest.fixture(scope="module")
def shared(shared_server: OracleProcess, pack_dirs: dict[str, Path]) -> Iterator[Calls]:
    """A connection to `shared_server`, whose default experiment answers from the composed pack."""
    with Calls(shared_server.target) as connection:
        connection.create(connection.upload(pack_dirs["composed"]), seed=42)
        yield connection


@pytest.fixture(scope="session")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OracleProcess]:
    """Two shards the tests of several modules share; each test has an experiment of its own."""
    folder = tmp_path_factory.mktemp("sharded")
    listen = ("127.0.0.1:0", f"unix:{folder}/s")
    with OracleProcess(folder / "state", listen=listen, metrics="127.0.0.1:0", arguments=TWO_SHARDS) as process:
        yield process


@pytest.fixture
def shards(sharded: OracleProcess) -> Iterator[tuple[Calls, Calls]]:
    """A connection to each of the two."""
    wait_for(lambda: len(shard_pids(sharded)) == 2)
    with Calls(sharded.targets[1]) as first, Calls(sharded.targets[2]) as second:
        for calls in (first, second):
            calls.tenants.ListTenants(tenant_pb2.ListTenantsRequest(), timeout=TIMEOUT, wait_for_ready=True)
        yield first, second
