"""The database of a fleet: PostgreSQL, shared by several servers.

Servers change it in turns: whoever changes something holds one advisory lock from before it looks at the state until
after its change is committed. The lock is of the session, and every statement of the change is made in that session:
when the connection is lost, the lock and the rest of the change are lost with it.
"""

from __future__ import annotations

import contextlib
import functools
import os
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import psycopg

from oracle_server.errors import DatabaseUnavailable, InvalidArgument, StoreFailed
from oracle_server.state.migrations import POSTGRES, SCHEMA_VERSION, statements

CONNECT_SECONDS = 3
# A server that stops in the middle of its turn loses it, with its connection, after this time.
TURN_SECONDS = 30
STATEMENT_SECONDS = 10
LOCK_SECONDS = 5
ENTER_SECONDS = 1.0
OLDEST_SERVER = 140000
CHANNEL = "step_oracle"

# Advisory locks of the database; any numbers that others are unlikely to use.
_TURN, _MIGRATION, _SERVERS = 0x57E90AC1, 0x57E90AC2, 0x57E90AC3
_NOT_KNOWN = (
    "the connection was lost while a change was committed: whether it was made is not known; read it again and decide "
    "anew"
)


class PostgresDatabase:
    """Owns one connection, which it makes anew when it was lost. One thread at a time; `interrupt` on any."""

    def __init__(self, url: Callable[[], str], *, alone: bool | None) -> None:
        """Connect, and bring the schema to this version.

        `url` is asked at each connection. `alone`: no other server may use the database at the same time; False: none
        that has to be alone; None: this is no server, whoever else is there.

        Raises InvalidArgument, StoreFailed, DatabaseUnavailable.
        """
        self._url = url
        self._alone = alone
        self._db: psycopg.Connection[Any] | None = None
        # Held while the connection is put into its place or taken out, so that `interrupt` never meets another file.
        self._placing = threading.Lock()
        self._in_turn = False
        try:
            with self._failures("opened"):
                self._migrate(self._connection())
        except BaseException:
            self._drop()
            raise

    def rows(self, query: str, values: Sequence[object] = ()) -> list[Any]:
        """Read."""
        with self._failures("read"):
            return self.execute(query, values)

    def execute(self, query: str, values: Sequence[object] = ()) -> list[Any]:
        """One statement of a transaction, and what it returns."""
        cursor = self._connection().execute(_numbered(query), values)
        return cursor.fetchall() if cursor.description else []

    def execute_many(self, query: str, values: Iterable[Sequence[object]]) -> None:
        """The same statement for each of the values."""
        with self._connection().cursor() as cursor:
            cursor.executemany(_numbered(query), values)

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """All of the block's statements or none; durable at the end."""
        with self._failures("written"):
            db = self._connection()
            db.execute("BEGIN")
            try:
                yield
            except BaseException:
                self._roll_back(db)
                raise
            try:
                db.execute("COMMIT")
            except psycopg.Error as error:
                if not db.closed:
                    raise
                self._drop()
                raise DatabaseUnavailable(_NOT_KNOWN) from error

    @contextmanager
    def glimpse(self) -> Iterator[None]:
        """All that the block reads is of one moment."""
        with self._failures("read"):
            db = self._connection()
            db.execute("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY")
            try:
                yield
            finally:
                self._roll_back(db)

    def announce(self, revision: int) -> None:
        """Within a transaction: tell the other servers, once it is committed."""
        self.execute("SELECT pg_notify(?, ?)", (CHANNEL, f"changed {revision}"))

    def notify(self, text: str) -> None:
        """Tell the other servers something, now."""
        self.rows("SELECT pg_notify(?, ?)", (CHANNEL, text))

    def try_turn(self) -> int | None:
        """Take the turn: the present revision; None while another server has it."""
        if not self.rows("SELECT pg_try_advisory_lock(?)", (_TURN,))[0][0]:
            return None
        self._in_turn = True
        query = "SELECT revision, set_config('idle_session_timeout', ?, false) FROM revision"
        return int(self.rows(query, (f"{TURN_SECONDS}s",))[0][0])

    def end_turn(self) -> None:
        """Let others change; nothing where the turn was lost with the connection."""
        self._in_turn = False
        if self._db is not None:
            self.rows("SELECT pg_advisory_unlock(?), set_config('idle_session_timeout', '0', false)", (_TURN,))

    def interrupt(self) -> None:
        """End the connection under a call that does not end by itself: it raises DatabaseUnavailable."""
        with self._placing:
            if self._db is not None:
                cut(self._db)

    def close(self) -> None:
        """End the connection."""
        self._drop()

    # Below: the connection

    def _connection(self) -> psycopg.Connection[Any]:
        if self._db is not None:
            return self._db
        if self._in_turn:
            raise DatabaseUnavailable("the connection to the database was lost in the middle of a change; retry")
        db = connect(self._url)
        try:
            db.execute(f"SET lock_timeout = '{LOCK_SECONDS}s'")
            db.execute(f"SET statement_timeout = '{STATEMENT_SECONDS}s'")
            allowed = self._enter(db)
        except psycopg.Error:
            db.close()
            raise
        if not allowed:
            db.close()
            raise DatabaseUnavailable(
                "other servers use the database, and this one, or one of them, has its packs for itself; give every "
                "server of the fleet the same --pack-registry or --pack-folder, or start one alone"
            )
        with self._placing:
            self._db = db
        return db

    def _enter(self, db: psycopg.Connection[Any]) -> bool:
        """Whether this server may use the database beside those that do."""
        if self._alone is None:
            return True
        kind = "" if self._alone else "_shared"
        end = time.monotonic() + ENTER_SECONDS
        while True:
            row = db.execute(f"SELECT pg_try_advisory_lock{kind}(%s)", (_SERVERS,)).fetchone()
            if row is not None and row[0]:
                return True
            # The connection of one that was killed ends a moment later.
            if time.monotonic() > end:
                return False
            time.sleep(0.05)

    def _drop(self) -> None:
        with self._placing:
            db, self._db = self._db, None
        if db is not None:
            db.close()

    def _roll_back(self, db: psycopg.Connection[Any]) -> None:
        try:
            if not db.closed:
                db.execute("ROLLBACK")
        except psycopg.Error:
            # The connection has ended, and the transaction with it; what led here is raised.
            self._drop()

    def _migrate(self, db: psycopg.Connection[Any]) -> None:
        with self.transaction():
            db.execute("SELECT pg_advisory_xact_lock(%s)", (_MIGRATION,))
            known = self.execute("SELECT to_regclass('schema_version')")[0][0] is not None
            version = int(self.execute("SELECT version FROM schema_version")[0][0]) if known else 0
            if version > SCHEMA_VERSION:
                raise StoreFailed(
                    f"the database has schema version {version}, this server knows {SCHEMA_VERSION}; use the server "
                    "version that wrote it or another database"
                )
            for next_version, changes in statements(POSTGRES, version):
                for statement in changes:
                    self.execute(statement)
                self.execute("UPDATE schema_version SET version = ?", (next_version,))

    @contextmanager
    def _failures(self, verb: str) -> Iterator[None]:
        """Turns the library's errors into ours; drops a connection that is of no use any more."""
        try:
            yield
        except psycopg.errors.ReadOnlySqlTransaction as error:
            # It has become a standby: another of the URL's hosts is the primary now.
            self._drop()
            raise DatabaseUnavailable(f"the database cannot be {verb}: {_first_line(error)}; retry") from error
        except psycopg.Error as error:
            if self._db is None or self._db.closed:
                self._drop()
                raise DatabaseUnavailable(f"the database does not answer: {_first_line(error)}; retry") from error
            raise StoreFailed(f"the database cannot be {verb}: {_first_line(error)}; nothing was changed") from error


def connect(url: Callable[[], str]) -> psycopg.Connection[Any]:
    """A new connection; DatabaseUnavailable, InvalidArgument where the URL is none, StoreFailed of an old server."""
    try:
        # A network that swallows packets is noticed by the kernel; a server that takes them and stays silent is not.
        db = psycopg.connect(
            url(),
            autocommit=True,
            connect_timeout=CONNECT_SECONDS,
            application_name="step-oracle",
            keepalives_idle=5,
            keepalives_interval=2,
            keepalives_count=3,
            tcp_user_timeout=10_000,
        )
    except psycopg.ProgrammingError as error:
        # Its message may hold the URL, and with it the password.
        raise InvalidArgument(
            "the database file holds no URL that libpq understands; give postgresql://USER:PASSWORD@HOST/DATABASE",
            field="database",
        ) from error
    except psycopg.Error as error:
        raise DatabaseUnavailable(f"the database does not answer: {_first_line(error)}; retry") from error
    if db.info.server_version < OLDEST_SERVER:
        version = db.info.server_version // 10000
        db.close()
        raise StoreFailed(f"the database is PostgreSQL {version}; allowed: {OLDEST_SERVER // 10000} and newer")
    return db


def cut(db: psycopg.Connection[Any]) -> None:
    """End a connection from another thread than the one that waits for it."""
    with contextlib.suppress(OSError, psycopg.Error), socket.socket(fileno=os.dup(db.fileno())) as end:
        end.shutdown(socket.SHUT_RDWR)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@functools.cache
def _numbered(query: str) -> bytes:
    """The statement with psycopg's placeholders; none of ours has a question mark or a percent sign in its text."""
    return query.replace("?", "%s").encode()
