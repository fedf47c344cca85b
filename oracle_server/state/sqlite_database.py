"""The database of one server: a file of SQLite in its state folder, one writer.

A commit is on disk before it returns (WAL, synchronous=FULL), so a crash at any point leaves the state before or after
a change, never a third.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from oracle_server.errors import StoreFailed
from oracle_server.state.migrations import SCHEMA_VERSION, SQLITE, statements

BUSY_SECONDS = 2.0


class SqliteDatabase:
    """Owns the connection. One thread at a time may call it."""

    def __init__(self, path: Path, *, read_only: bool = False) -> None:
        """Open or create the database; StoreFailed where it cannot be or belongs to a newer server."""
        self._path = path
        try:
            mode = "ro" if read_only else "rwc"
            self._db = sqlite3.connect(
                f"{path.absolute().as_uri()}?mode={mode}",
                uri=True,
                isolation_level=None,
                check_same_thread=False,
                timeout=BUSY_SECONDS,
            )
        except sqlite3.Error as error:
            raise StoreFailed(f"the database {path} cannot be opened: {error}") from error
        try:
            with self._failures("opened"):
                if not read_only:
                    self._db.execute("PRAGMA journal_mode = WAL")
                    self._db.execute("PRAGMA synchronous = FULL")
                    self._db.execute("PRAGMA foreign_keys = ON")
                    self._migrate()
                version = self._version()
            if version > SCHEMA_VERSION:
                raise StoreFailed(
                    f"the database {path} has schema version {version}, this server knows {SCHEMA_VERSION}; "
                    "use the server version that wrote it or another --state-dir"
                )
            if version < SCHEMA_VERSION:
                raise StoreFailed(
                    f"the database {path} has schema version {version} and is only read here; start a server of this "
                    f"version over it once, which brings it to {SCHEMA_VERSION}"
                )
        except StoreFailed:
            self._db.close()
            raise

    def rows(self, query: str, values: Sequence[object] = ()) -> list[Any]:
        """Read."""
        with self._failures("read"):
            return self._db.execute(query, values).fetchall()

    def execute(self, query: str, values: Sequence[object] = ()) -> list[Any]:
        """One statement of a transaction, and what it returns."""
        return self._db.execute(query, values).fetchall()

    def execute_many(self, query: str, values: Iterable[Sequence[object]]) -> None:
        """The same statement for each of the values."""
        self._db.executemany(query, values)

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """All of the block's statements or none; on disk at the end."""
        with self._failures("written"):
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise

    @contextmanager
    def glimpse(self) -> Iterator[None]:
        """All that the block reads is of one moment."""
        with self._failures("read"):
            self._db.execute("BEGIN")
            try:
                yield
            finally:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")

    def announce(self, revision: int) -> None:
        """Nobody else has this database open."""

    def close(self) -> None:
        """Close the connection; the WAL is folded into the file."""
        self._db.close()

    def _migrate(self) -> None:
        self._db.execute("BEGIN IMMEDIATE")
        try:
            known = self._db.execute("SELECT 1 FROM sqlite_master WHERE name = 'schema_version'").fetchone()
            for version, changes in statements(SQLITE, self._version() if known else 0):
                for statement in changes:
                    self._db.execute(statement)
                self._db.execute("UPDATE schema_version SET version = ?", (version,))
        except BaseException:
            self._db.execute("ROLLBACK")
            raise
        self._db.execute("COMMIT")

    def _version(self) -> int:
        return int(self._db.execute("SELECT version FROM schema_version").fetchone()[0])

    @contextmanager
    def _failures(self, verb: str) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise StoreFailed(
                f"the database {self._path.name} cannot be {verb}: {error}; nothing was changed"
            ) from error
