"""Several servers over one PostgreSQL change it as one would, and follow each other."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest

from oracle_server.errors import (
    DatabaseUnavailable,
    EngineIdTaken,
    EngineMismatch,
    ExperimentExists,
    ExperimentInUse,
    GenerationConflict,
    OracleError,
    QuotaExceeded,
    StaleGeneration,
    Unauthenticated,
)
from oracle_server.pack import EngineFacts
from oracle_server.state.binding import Binding
from oracle_server.state.credentials import hash_of
from oracle_server.state.database_file import DatabaseFile
from oracle_server.state.experiments import Activation
from oracle_server.state.identity import EngineIdentity
from oracle_server.state.node import Node
from oracle_server.state.pack_folder import PackFolder
from oracle_server.state.store import TenantRow
from postgres_server import PostgresServer, file_of
from stored_packs import store_pack

NAME = "tenants/default/experiments/default"
SECONDS = 10.0

StartNode = Callable[[str], Awaitable[Node]]


class Stream:
    def __init__(self) -> None:
        self.announced: list[int] = []
        self.ended: list[OracleError] = []

    def announce(self, generation: int) -> None:
        self.announced.append(generation)

    def end(self, error: OracleError) -> None:
        self.ended.append(error)


@pytest.fixture
def database(postgres: PostgresServer, tmp_path: Path) -> DatabaseFile:
    """An empty one."""
    return DatabaseFile(file_of(postgres.new_database(), tmp_path / "database"))


@pytest.fixture
async def start(database: DatabaseFile, tmp_path: Path) -> AsyncIterator[StartNode]:
    """Starts servers of one fleet, each over a folder of its own; those that are not closed end with the test."""
    started: list[Node] = []

    async def start_one(name: str) -> Node:
        node = Node(tmp_path / name, database=database, pack_remote=PackFolder(tmp_path / "packs"))
        started.append(node)
        await node.open()
        return node

    yield start_one
    for node in started:
        if not node._records._thread._shutdown:
            await node.close()


@pytest.fixture
async def fleet(start: StartNode) -> tuple[Node, Node]:
    """Two servers that know of each other."""
    first, second = await start("a"), await start("b")
    await until(lambda: first.replicas is not None and bool(first.replicas._others))
    await until(lambda: second.replicas is not None and bool(second.replicas._others))
    return first, second


@pytest.fixture
async def digest(fleet: tuple[Node, Node], tmp_path: Path) -> str:
    """A pack stored at the first server, from which the experiment `default` answers at both."""
    first, _ = fleet
    stored = await store_pack(first, tmp_path / "pack", 10_000_000)
    await first.experiments.create("default", "default", Binding(default_pack_digest=stored))
    return stored


async def until(condition: Callable[[], bool]) -> None:
    """Let the servers work until it holds; AssertionError after a while."""
    async with asyncio.timeout(SECONDS):
        while not condition():  # noqa: ASYNC110 - what is waited for is in many places
            await asyncio.sleep(0.005)


def engine(engine_id: str = "x") -> EngineIdentity:
    return EngineIdentity(NAME, engine_id, {}, "m", 1)


async def attach(node: Node, engine_id: str = "x", **facts: int) -> int:
    attached = await node.attachments.attach(engine(engine_id), EngineFacts(**facts), 0, frozenset())  # type: ignore[arg-type]
    return attached.incarnation


async def open_stream(node: Node, incarnation: int, engine_id: str = "x") -> Stream:
    stream = Stream()
    await node.attachments.open_stream(engine(engine_id), EngineFacts(), incarnation, frozenset(), stream)
    return stream


async def activate(node: Node, digest: str, seed: int = 0, expected: int = 0) -> Activation:
    binding = Binding(default_pack_digest=digest, seed=seed)
    return await node.experiments.activate(NAME, binding, expected, frozenset(), validate_only=False)


async def outcomes(*work: Awaitable[object]) -> tuple[list[object], list[BaseException]]:
    """(what came of those that were done, the errors of the others)."""
    done = await asyncio.gather(*work, return_exceptions=True)
    return [r for r in done if not isinstance(r, BaseException)], [r for r in done if isinstance(r, BaseException)]


async def test_what_one_changed_every_other_answers_at_its_return(
    fleet: tuple[Node, Node], digest: str, tmp_path: Path
) -> None:
    first, second = fleet
    assert second.experiments.find(NAME).snapshot.generation == 1
    other = await store_pack(second, tmp_path / "other", 20_000_000)
    stream = await open_stream(second, await attach(second))

    await activate(first, other)
    live = second.experiments.find(NAME)
    assert (live.snapshot.generation, set(live.snapshot.packs)) == (2, {other})
    assert stream.announced == [2]
    await activate(second, digest)
    assert first.experiments.find(NAME).current == second.experiments.find(NAME).current

    with pytest.raises(ExperimentInUse, match="1 engines are attached"):
        await first.experiments.delete(NAME)
    live, record = second.experiments.find(NAME), second.experiments.find(NAME).engines["x"]
    await second.attachments.close_stream(record, stream, by_engine=True)
    await until(lambda: first.experiments.find(NAME).engines["x"].closed)
    await first.experiments.delete(NAME)
    assert second.experiments.get(NAME) is None
    assert live.deleted


async def test_two_servers_that_activate_at_once_count_one_after_the_other(
    fleet: tuple[Node, Node], digest: str
) -> None:
    first, _second = fleet
    work = [activate(node, digest, seed) for seed in range(8) for node in fleet]
    done, errors = await outcomes(*work)

    assert not errors
    generations = sorted(activation.record.generation for activation in done if isinstance(activation, Activation))
    assert generations == list(range(2, 18))
    history = await first.experiments.generations(NAME, 99, 99)
    assert [row.generation for row in history] == list(range(17, 0, -1))
    await until(lambda: all(node.experiments.find(NAME).current == history[0] for node in fleet))


async def test_of_two_changes_that_expect_the_same_generation_one_is_made(
    fleet: tuple[Node, Node], digest: str
) -> None:
    done, errors = await outcomes(*[activate(node, digest, seed, 1) for seed, node in enumerate((*fleet, *fleet))])

    assert len(done) == 1
    assert [type(error) for error in errors] == [GenerationConflict] * 3
    done, errors = await outcomes(
        *[node.experiments.create("default", "new", Binding(default_pack_digest=digest)) for node in fleet]
    )
    assert (len(done), [type(error) for error in errors]) == (1, [ExperimentExists])


async def test_an_engine_id_is_given_once_and_its_incarnations_are_counted_over_all_servers(
    fleet: tuple[Node, Node], digest: str
) -> None:
    first, second = fleet
    done, errors = await outcomes(attach(first), attach(second))

    assert (done, [type(error) for error in errors]) == ([1], [EngineIdTaken])
    stream = await open_stream(second, 1)
    # Not that it is attached there alone.
    await until(lambda: first.experiments.find(NAME).engines["x"].stream is not None)
    with pytest.raises(EngineIdTaken, match="has an open stream"):
        await attach(first)
    record = second.experiments.find(NAME).engines["x"]
    await second.attachments.close_stream(record, stream, by_engine=True)
    await until(lambda: first.experiments.find(NAME).engines["x"].closed)
    assert await attach(first) == 2
    with pytest.raises(EngineIdTaken, match="attached again since"):
        await open_stream(second, 1)


async def test_quotas_and_tokens_are_those_of_the_fleet(fleet: tuple[Node, Node], digest: str) -> None:
    first, second = fleet
    await first.tenants.update(TenantRow("default", max_engines=1))
    assert (await second.tenant("default")).max_engines == 1
    done, errors = await outcomes(attach(first, "x"), attach(second, "y"))
    assert (len(done), [type(error) for error in errors]) == (1, [QuotaExceeded])

    issued = [node.tenants.issue("default", "engine", hash_of(str(i)), "") for i, node in enumerate((*fleet, first))]
    done, errors = await outcomes(*issued)
    assert (len(done), [type(error) for error in errors]) == (2, [QuotaExceeded])
    (one, other) = await first.tenants.tokens("default", 0, 9)
    assert {one.number, other.number} == {1, 2}
    secret = next(str(i) for i in range(3) if hash_of(str(i)) == one.secret_sha256)
    assert second.credentials.find(f"Bearer {secret}").name == f"tenants/default/tokens/{one.number}"
    await first.tenants.revoke("default", one.number)
    with pytest.raises(Unauthenticated):
        second.credentials.find(f"Bearer {secret}")


async def test_a_stream_that_moves_is_ended_where_it_was_and_only_there(fleet: tuple[Node, Node], digest: str) -> None:
    first, second = fleet
    incarnation = await attach(first)
    old = await open_stream(first, incarnation)
    # A server that is slow to follow is not waited for by the attach.
    await until(lambda: all("x" in node.experiments.find(NAME).engines for node in fleet))
    records = [node.experiments.find(NAME).engines["x"] for node in fleet]
    await until(lambda: records[1].elsewhere != "" and records[1].stream is not None)

    new = await open_stream(second, incarnation)
    await until(lambda: bool(old.ended))
    assert isinstance(old.ended[0], EngineIdTaken)
    # The old one ends late, by the word of its server.
    await first.attachments.close_stream(records[0], old, by_engine=False)
    back = await open_stream(first, incarnation)
    await until(lambda: bool(new.ended))
    await second.attachments.close_stream(records[1], new, by_engine=False)
    await activate(second, digest, 5)
    assert not back.ended
    assert back.announced == [2]
    assert records[1].elsewhere != ""
    assert records[1].is_live(1e9)


async def test_an_activation_must_fit_the_engines_of_every_server(
    fleet: tuple[Node, Node], digest: str, tmp_path: Path
) -> None:
    first, second = fleet
    await open_stream(second, await attach(second, block_size=16))
    other = await store_pack(first, tmp_path / "other", 20_000_000, kv_blocks=5)
    with pytest.raises(EngineMismatch, match="num_kv_blocks: the pack has 5, the engine 10000"):
        await activate(first, other)
    assert second.experiments.find(NAME).snapshot.generation == 1


async def test_a_server_that_lags_reads_what_an_engine_has_seen_and_else_refuses_it(
    fleet: tuple[Node, Node], digest: str, tmp_path: Path
) -> None:
    first, second = fleet
    assert second.replicas is not None
    for task in list(second.replicas._tasks):
        task.cancel()
    await activate(first, digest, 7)
    live = second.experiments.find(NAME)
    assert live.snapshot.generation == 1

    await second.catch_up(live, 2)
    assert live.snapshot.generation == 2
    with pytest.raises(StaleGeneration, match="at generation 2 here, the engine has seen 3"):
        await second.catch_up(live, 3)
    await first.experiments.create("default", "late", Binding(default_pack_digest=digest))
    assert second.experiments.get("tenants/default/experiments/late") is None
    await second.look_for("tenants/default/experiments/late")
    assert second.experiments.find("tenants/default/experiments/late").current.generation == 1


async def test_a_server_that_cannot_have_a_pack_stays_behind_until_it_can(
    fleet: tuple[Node, Node], digest: str, tmp_path: Path
) -> None:
    first, second = fleet
    other = await store_pack(first, tmp_path / "other", 20_000_000)
    place = tmp_path / "packs" / other.removeprefix("sha256:")
    place.rename(tmp_path / "hidden")
    await activate(first, other)
    live = second.experiments.find(NAME)

    assert live.snapshot.generation == 1
    with pytest.raises(StaleGeneration):
        await second.catch_up(live, 2)
    await first.experiments.create("default", "late", Binding(default_pack_digest=other))
    with pytest.raises(StaleGeneration, match="has not got the packs"):
        second.experiments.find("tenants/default/experiments/late")
    with pytest.raises(GenerationConflict):
        await activate(second, digest)
    (tmp_path / "hidden").rename(place)
    await until(lambda: live.snapshot.generation == 2 and not second.experiments.behind)
    assert second.experiments.find("tenants/default/experiments/late").current.generation == 1


async def test_what_a_pack_folder_gives_is_checked(fleet: tuple[Node, Node], digest: str, tmp_path: Path) -> None:
    first, second = fleet
    other = await store_pack(first, tmp_path / "other", 20_000_000)
    place = tmp_path / "packs" / other.removeprefix("sha256:")
    shutil.rmtree(place)
    shutil.copytree(tmp_path / "packs" / digest.removeprefix("sha256:"), place)
    await activate(first, other)
    with pytest.raises(StaleGeneration):
        await second.catch_up(second.experiments.find(NAME), 2)
    assert second.experiments.find(NAME).snapshot.generation == 1


async def test_a_server_that_starts_later_has_everything_and_one_that_ends_leaves_its_engines(
    fleet: tuple[Node, Node], digest: str, start: StartNode
) -> None:
    _first, second = fleet
    await open_stream(second, await attach(second))
    third = await start("c")
    live = third.experiments.find(NAME)
    assert (live.snapshot.generation, live.engines["x"].stream is not None) == (1, True)
    with pytest.raises(EngineIdTaken, match="has an open stream"):
        await attach(third)

    assert second.replicas is not None
    second.experiments.drain()
    record = second.experiments.find(NAME).engines["x"]
    assert record.stream is not None
    await second.attachments.close_stream(record, record.stream, by_engine=False)
    await second.close()
    await until(lambda: live.engines["x"].stream is None)
    # It comes back, to any of those that are left.
    await open_stream(third, 1)
    assert live.engines["x"].elsewhere == ""


async def test_servers_that_share_no_packs_do_not_share_a_database(database: DatabaseFile, tmp_path: Path) -> None:
    alone = Node(tmp_path / "alone", database=database)
    with pytest.raises(DatabaseUnavailable, match="--pack-folder"):
        Node(tmp_path / "second", database=database)
    with pytest.raises(DatabaseUnavailable, match="--pack-folder"):
        Node(tmp_path / "third", database=database, pack_remote=PackFolder(tmp_path / "packs"))
    await alone.close()
    again = Node(tmp_path / "second", database=database)
    await again.open()
    await again.close()
