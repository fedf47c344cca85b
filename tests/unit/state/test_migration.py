"""A database of schema version 1 becomes one of this version, whole or not at all."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from oracle_server.errors import StoreFailed
from oracle_server.state import sqlite_database
from oracle_server.state.binding import Binding, encode
from oracle_server.state.migrations import SCHEMA_VERSION, SQLITE
from oracle_server.state.store import Author, EngineRow, GenerationRow, PackRow, Store, TenantRow

# As the servers of version 1 made it.
VERSION_1 = """
CREATE TABLE schema_version (version INTEGER NOT NULL) STRICT;
CREATE TABLE tenant (
  tenant TEXT NOT NULL PRIMARY KEY,
  max_engines INTEGER NOT NULL, max_steps_per_second INTEGER NOT NULL,
  max_packs INTEGER NOT NULL, max_pack_bytes INTEGER NOT NULL
) STRICT, WITHOUT ROWID;
CREATE TABLE pack (
  tenant TEXT NOT NULL REFERENCES tenant, digest TEXT NOT NULL,
  manifest BLOB NOT NULL, size_bytes INTEGER NOT NULL, create_time_ns INTEGER NOT NULL,
  PRIMARY KEY (tenant, digest)
) STRICT, WITHOUT ROWID;
CREATE TABLE experiment (
  tenant TEXT NOT NULL REFERENCES tenant, experiment TEXT NOT NULL,
  generation INTEGER NOT NULL, create_time_ns INTEGER NOT NULL, deleted INTEGER NOT NULL DEFAULT 0,
  PRIMARY KEY (tenant, experiment)
) STRICT, WITHOUT ROWID;
CREATE TABLE generation (
  tenant TEXT NOT NULL, experiment TEXT NOT NULL, generation INTEGER NOT NULL,
  binding BLOB NOT NULL, create_time_ns INTEGER NOT NULL, reason TEXT NOT NULL,
  PRIMARY KEY (tenant, experiment, generation),
  FOREIGN KEY (tenant, experiment) REFERENCES experiment
) STRICT;
CREATE TABLE engine (
  tenant TEXT NOT NULL, experiment TEXT NOT NULL, engine_id TEXT NOT NULL,
  incarnation INTEGER NOT NULL, accepted_digest TEXT NOT NULL,
  PRIMARY KEY (tenant, experiment, engine_id),
  FOREIGN KEY (tenant, experiment) REFERENCES experiment
) STRICT, WITHOUT ROWID;
INSERT INTO schema_version VALUES (1);
INSERT INTO tenant VALUES ('default', 7, 0, 3, 1000);
INSERT INTO pack VALUES ('default', 'sha256:a', x'7b7d', 17, 5);
INSERT INTO experiment VALUES ('default', 'e', 2, 6, 0), ('default', 'gone', 4, 6, 1);
INSERT INTO engine VALUES ('default', 'e', 'x', 9, 'sha256:a');
"""
BINDING = Binding(default_pack_digest="sha256:a", seed=3)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A database of version 1 with something of everything."""
    path = tmp_path / "oracle.db"
    with closing(sqlite3.connect(path)) as db, db:
        db.executescript(VERSION_1)
        for generation, reason in ((1, "create"), (2, "activate")):
            row = ("default", "e", generation, encode(BINDING), generation, reason)
            db.execute("INSERT INTO generation VALUES (?, ?, ?, ?, ?, ?)", row)
    return path


def columns(path: Path) -> dict[str, set[tuple[object, ...]]]:
    """Columns of every table, in any order."""
    with closing(sqlite3.connect(path)) as db:
        tables = [row[0] for row in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        query = "SELECT name, type, [notnull], dflt_value, pk FROM pragma_table_info(?)"
        return {table: set(db.execute(query, (table,))) for table in tables}


def version_of(path: Path) -> int:
    with closing(sqlite3.connect(path)) as db:
        return int(db.execute("SELECT version FROM schema_version").fetchone()[0])


def test_everything_of_version_1_is_there_and_who_did_it_was_local(path: Path) -> None:
    store = Store.open(path)

    assert version_of(path) == SCHEMA_VERSION == 3
    assert store.tenants("", 10) == [TenantRow("default", 7, 0, 3, 1000, max_streams=0, over_rate="mark")]
    assert store.packs("default", "", 10) == [PackRow("default", "sha256:a", b"{}", 17, 5)]
    assert store.engine("default", "e", "x") == EngineRow(9, "sha256:a")
    assert store.generations_before("default", "e", 9, 9) == [
        GenerationRow(2, BINDING, 2, "activate", Author("local", "")),
        GenerationRow(1, BINDING, 1, "create", Author("local", "")),
    ]
    assert store.valid_tokens() == []
    assert store.create_experiment("default", "gone", BINDING, 7).current.generation == 5
    assert store.add_token("default", "engine", b"h", "", 8).number == 1
    store.close()


def test_a_migrated_database_and_a_new_one_have_the_same_schema(path: Path, tmp_path: Path) -> None:
    Store.open(path).close()
    Store.open(tmp_path / "new.db").close()

    assert columns(path) == columns(tmp_path / "new.db")


def test_a_migration_that_fails_half_way_leaves_version_1(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = columns(path)
    broken = SQLITE | {2: f"{SQLITE[2]}; DROP TABLE no_such_table"}
    monkeypatch.setattr(sqlite_database, "SQLITE", broken)
    with pytest.raises(StoreFailed, match="no_such_table"):
        Store.open(path)

    assert (columns(path), version_of(path)) == (before, 1)
    monkeypatch.undo()
    Store.open(path).close()
    assert version_of(path) == SCHEMA_VERSION


def test_a_database_that_is_only_read_is_not_migrated(path: Path) -> None:
    with pytest.raises(StoreFailed, match="start a server of this version over it once"):
        Store.open(path, read_only=True)
    assert version_of(path) == 1


def test_a_database_of_a_newer_server_is_refused(path: Path) -> None:
    with closing(sqlite3.connect(path)) as db, db:
        db.execute("UPDATE schema_version SET version = 4")
    with pytest.raises(StoreFailed, match="has schema version 4, this server knows 3"):
        Store.open(path)
