"""What is particular to PostgreSQL: turns, lost connections, a schema that several servers bring up to date at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import psycopg
import pytest

from oracle_server.errors import DatabaseUnavailable, StoreFailed
from oracle_server.state import postgres_database
from oracle_server.state.migrations import POSTGRES, SCHEMA_VERSION
from oracle_server.state.postgres_database import CHANNEL, PostgresDatabase
from oracle_server.state.store import Store, TenantRow
from postgres_server import PostgresServer

Open = Callable[[], PostgresDatabase]


@pytest.fixture
def url(postgres: PostgresServer) -> str:
    return postgres.new_database()


@pytest.fixture
def connect(url: str) -> Iterator[Open]:
    """Connections of different servers to one database."""
    opened: list[PostgresDatabase] = []

    def connect_one() -> PostgresDatabase:
        opened.append(PostgresDatabase(lambda: url, alone=False))
        return opened[-1]

    yield connect_one
    for database in opened:
        database.close()


def backend_of(database: PostgresDatabase) -> int:
    return int(database.rows("SELECT pg_backend_pid()")[0][0])


def end_backend(url: str, pid: int) -> None:
    """As an administrator, or a crash, ends a connection; returns once it has ended."""
    with psycopg.connect(url, autocommit=True) as db:
        db.execute("SELECT pg_terminate_backend(%s, 5000)", (pid,))


def announce_and_fail(database: PostgresDatabase) -> None:
    with database.transaction():
        database.announce(5)
        raise ZeroDivisionError


def version_of(url: str) -> int:
    with psycopg.connect(url) as db:
        row = db.execute("SELECT version FROM schema_version").fetchone()
    assert row is not None
    return int(row[0])


def test_one_has_the_turn_at_a_time(connect: Open) -> None:
    first, second = connect(), connect()
    assert first.try_turn() == 0
    assert second.try_turn() is None
    Store(first).write_tenant(TenantRow("a"))
    first.end_turn()
    assert second.try_turn() == 1
    second.end_turn()


def test_a_connection_that_is_lost_in_a_turn_loses_the_turn_and_the_rest_of_the_change(connect: Open, url: str) -> None:
    first, second = connect(), connect()
    assert first.try_turn() == 0
    end_backend(url, backend_of(first))
    with pytest.raises(DatabaseUnavailable):
        Store(first).write_tenant(TenantRow("a"))
    # Not on a new connection: somebody else may have the turn by now.
    with pytest.raises(DatabaseUnavailable, match="in the middle of a change"):
        Store(first).write_tenant(TenantRow("a"))
    assert second.try_turn() == 0
    second.end_turn()
    first.end_turn()
    Store(first).write_tenant(TenantRow("a"))
    assert Store(second).tenant("a") == TenantRow("a")


def test_a_commit_whose_answer_is_lost_is_said_to_be_unknown(connect: Open) -> None:
    database = connect()

    def change() -> None:
        with database.transaction():
            database.execute("UPDATE revision SET revision = 7")
            database.interrupt()

    with pytest.raises(DatabaseUnavailable, match="whether it was made is not known"):
        change()
    assert database.rows("SELECT revision FROM revision")[0][0] in (0, 7)


def test_a_call_that_hangs_is_ended_from_another_thread_and_the_next_one_connects_anew(connect: Open) -> None:
    database = connect()
    before = backend_of(database)
    with ThreadPoolExecutor(1) as thread:
        hanging = thread.submit(database.rows, "SELECT pg_sleep(8)")
        while not hanging.running():
            pass
        database.interrupt()
        with pytest.raises(DatabaseUnavailable, match="does not answer"):
            hanging.result(5)
    assert backend_of(database) != before


def test_a_refused_statement_is_no_lost_connection(connect: Open) -> None:
    database = connect()
    before = backend_of(database)
    with pytest.raises(StoreFailed, match=r"cannot be read: .*no_such_table.*nothing was changed"):
        database.rows("SELECT * FROM no_such_table")
    assert backend_of(database) == before


def test_others_hear_of_a_change_once_it_is_committed(connect: Open, url: str) -> None:
    database = connect()
    with psycopg.connect(url, autocommit=True) as listening:
        listening.execute(f"LISTEN {CHANNEL}")
        with pytest.raises(ZeroDivisionError):
            announce_and_fail(database)
        Store(database).write_tenant(TenantRow("a"))
        assert [notice.payload for notice in listening.notifies(timeout=10, stop_after=1)] == ["changed 1"]


def test_servers_that_start_at_once_over_an_empty_database_make_one_schema(url: str) -> None:
    with ThreadPoolExecutor(4) as threads:
        opened = list(threads.map(lambda _: PostgresDatabase(lambda: url, alone=False), range(4)))
    assert [Store(database).tenants("", 9) for database in opened] == [[TenantRow("default")]] * 4
    for database in opened:
        database.close()
    assert version_of(url) == SCHEMA_VERSION


def test_a_newer_server_migrates_whole_or_not_at_all_and_then_an_older_one_is_refused(
    connect: Open, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(connect())
    store.write_tenant(TenantRow("a"))
    newer = SCHEMA_VERSION + 1
    step = "ALTER TABLE tenant ADD COLUMN more BIGINT NOT NULL DEFAULT 3"
    monkeypatch.setattr(postgres_database, "SCHEMA_VERSION", newer)
    monkeypatch.setattr(postgres_database, "POSTGRES", POSTGRES | {newer: f"{step}; DROP TABLE no_such_table"})
    with pytest.raises(StoreFailed, match="no_such_table"):
        connect()
    assert version_of(url) == SCHEMA_VERSION

    monkeypatch.setattr(postgres_database, "POSTGRES", POSTGRES | {newer: step})
    assert connect().rows("SELECT tenant, more FROM tenant WHERE tenant = 'a'") == [("a", 3)]
    assert version_of(url) == newer
    monkeypatch.undo()
    with pytest.raises(StoreFailed, match=f"has schema version {newer}, this server knows {SCHEMA_VERSION}"):
        connect()


def test_an_older_postgresql_is_refused(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(postgres_database, "OLDEST_SERVER", 990000)
    with pytest.raises(StoreFailed, match=r"is PostgreSQL \d+; allowed: 99 and newer"):
        PostgresDatabase(lambda: url, alone=False)
