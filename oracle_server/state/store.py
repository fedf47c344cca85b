"""The database: tenants, tokens, packs, experiments with their generations, engine incarnations. SQLite, one writer.

A commit is on disk before the method returns (WAL, synchronous=FULL), so a crash at any point leaves the state before
or after a change, never a third. Every method is one transaction. Plain blocking calls: `Records` runs them on one
thread.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from oracle_server.errors import StoreFailed
from oracle_server.state.binding import Binding, decode, encode
from oracle_server.state.migrations import MIGRATIONS, SCHEMA_VERSION

BUSY_SECONDS = 2.0

# Version 1; the migrations bring every database, a new one too, from there to SCHEMA_VERSION.
_SCHEMA = """
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
-- A deleted experiment keeps its row: its name never counts generations from 1 again, so that (name, generation) means
-- one binding for ever and an engine never sees a generation go back.
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
-- accepted_digest: the pack whose cold fields this engine was last compared with and let pass.
CREATE TABLE engine (
  tenant TEXT NOT NULL, experiment TEXT NOT NULL, engine_id TEXT NOT NULL,
  incarnation INTEGER NOT NULL, accepted_digest TEXT NOT NULL,
  PRIMARY KEY (tenant, experiment, engine_id),
  FOREIGN KEY (tenant, experiment) REFERENCES experiment
) STRICT, WITHOUT ROWID;
"""

_GENERATIONS = (
    "SELECT generation, binding, create_time_ns, reason, principal, comment FROM generation "
    "WHERE tenant = ? AND experiment = ?"
)
_QUOTA = ("max_engines", "max_steps_per_second", "max_packs", "max_pack_bytes", "max_streams", "over_rate")
_TENANTS = f"SELECT tenant, {', '.join(_QUOTA)} FROM tenant WHERE NOT deleted"  # noqa: S608 - names
_TOKENS = "SELECT tenant, number, scope, secret_sha256, comment, create_time_ns, revoke_time_ns FROM token"

OVER_RATE_MARK = "mark"
OVER_RATE_DETACH = "detach"


@dataclass(frozen=True, slots=True)
class TenantRow:
    """A tenant and its limits; 0 means no limit."""

    tenant: str
    max_engines: int = 0
    max_steps_per_second: int = 0
    max_packs: int = 0
    max_pack_bytes: int = 0
    max_streams: int = 0
    over_rate: str = OVER_RATE_MARK


@dataclass(frozen=True, slots=True)
class TokenRow:
    """A token of a tenant; `revoke_time_ns` is 0 while it is valid."""

    tenant: str
    number: int
    scope: str
    secret_sha256: bytes
    comment: str
    create_time_ns: int
    revoke_time_ns: int = 0


@dataclass(frozen=True, slots=True)
class Author:
    """Who makes a change, and why."""

    principal: str = "local"
    comment: str = ""


LOCAL_AUTHOR = Author()


@dataclass(frozen=True, slots=True)
class PackRow:
    """A stored pack; `manifest` is manifest.json byte for byte, `size_bytes` the sum of its files."""

    tenant: str
    digest: str
    manifest: bytes
    size_bytes: int
    create_time_ns: int


@dataclass(frozen=True, slots=True)
class GenerationRow:
    """One generation of an experiment."""

    generation: int
    binding: Binding
    create_time_ns: int
    reason: str
    author: Author = LOCAL_AUTHOR


@dataclass(frozen=True, slots=True)
class ExperimentRow:
    """An experiment and its current generation."""

    tenant: str
    experiment: str
    create_time_ns: int
    current: GenerationRow


@dataclass(frozen=True, slots=True)
class EngineRow:
    """The last incarnation handed out for an engine id and the pack it was last let pass with."""

    incarnation: int
    accepted_digest: str


class Store:
    """Owns the connection. One thread at a time may call it; `Records` uses one for all."""

    def __init__(self, connection: sqlite3.Connection, path: Path) -> None:
        self._db = connection
        self._path = path

    @classmethod
    def open(cls, path: Path, *, read_only: bool = False) -> Store:
        """Open or create the database; StoreFailed where it cannot be or belongs to a newer server."""
        try:
            mode = "ro" if read_only else "rwc"
            db = sqlite3.connect(
                f"{path.absolute().as_uri()}?mode={mode}",
                uri=True,
                isolation_level=None,
                check_same_thread=False,
                timeout=BUSY_SECONDS,
            )
        except sqlite3.Error as error:
            raise StoreFailed(f"the database {path} cannot be opened: {error}") from error
        store = cls(db, path)
        try:
            with store._failures("opened"):
                if not read_only:
                    db.execute("PRAGMA journal_mode = WAL")
                    db.execute("PRAGMA synchronous = FULL")
                    db.execute("PRAGMA foreign_keys = ON")
                    store._create_schema()
                version = db.execute("SELECT version FROM schema_version").fetchone()[0]
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
            db.close()
            raise
        return store

    def close(self) -> None:
        """Close the connection; the WAL is folded into the file."""
        self._db.close()

    # Tenants

    def tenants(self, after: str, limit: int) -> list[TenantRow]:
        """In order of their names, those behind `after`."""
        with self._failures("read"):
            rows = self._db.execute(f"{_TENANTS} AND tenant > ? ORDER BY tenant LIMIT ?", (after, limit))
            return [TenantRow(*row) for row in rows]

    def tenant(self, tenant: str) -> TenantRow | None:
        """One tenant."""
        with self._failures("read"):
            row = self._db.execute(f"{_TENANTS} AND tenant = ?", (tenant,)).fetchone()
        return TenantRow(*row) if row else None

    def write_tenant(self, row: TenantRow) -> None:
        """A new tenant, a new life of a deleted one, or another quota of a living one."""
        values = (row.tenant, *(getattr(row, name) for name in _QUOTA))
        columns = ", ".join(f"{name} = excluded.{name}" for name in _QUOTA)
        with self._transaction():
            self._db.execute(
                f"INSERT INTO tenant (tenant, {', '.join(_QUOTA)}) VALUES (?, ?, ?, ?, ?, ?, ?) "  # noqa: S608 - names
                f"ON CONFLICT DO UPDATE SET {columns}, deleted = 0",
                values,
            )

    def delete_tenant(self, tenant: str, now_ns: int) -> None:
        """Forget a tenant without experiments and packs, not how far its names were counted; its tokens end."""
        with self._transaction():
            self._db.execute("UPDATE tenant SET deleted = 1 WHERE tenant = ?", (tenant,))
            self._db.execute(
                "UPDATE token SET revoke_time_ns = ? WHERE tenant = ? AND revoke_time_ns = 0", (now_ns, tenant)
            )

    # Tokens

    def valid_tokens(self) -> list[TokenRow]:
        """Those of every tenant that are not revoked."""
        with self._failures("read"):
            return [TokenRow(*row) for row in self._db.execute(f"{_TOKENS} WHERE revoke_time_ns = 0")]

    def tokens(self, tenant: str, after: int, limit: int) -> list[TokenRow]:
        """Oldest first, those behind number `after`."""
        query = f"{_TOKENS} WHERE tenant = ? AND number > ? ORDER BY number LIMIT ?"
        with self._failures("read"):
            return [TokenRow(*row) for row in self._db.execute(query, (tenant, after, limit))]

    def token(self, tenant: str, number: int) -> TokenRow | None:
        """One token of a tenant."""
        with self._failures("read"):
            row = self._db.execute(f"{_TOKENS} WHERE tenant = ? AND number = ?", (tenant, number)).fetchone()
        return TokenRow(*row) if row else None

    def add_token(self, tenant: str, scope: str, secret_sha256: bytes, comment: str, now_ns: int) -> TokenRow:
        """The next token of a tenant."""
        with self._transaction():
            query = "SELECT coalesce(max(number), 0) + 1 FROM token WHERE tenant = ?"
            number = self._db.execute(query, (tenant,)).fetchone()[0]
            row = TokenRow(tenant, number, scope, secret_sha256, comment, now_ns)
            self._db.execute(
                "INSERT INTO token VALUES (?, ?, ?, ?, ?, ?, ?)",
                (tenant, number, scope, secret_sha256, comment, now_ns, 0),
            )
        return row

    def revoke_token(self, tenant: str, number: int, now_ns: int) -> None:
        """End a token; nothing where it has ended."""
        with self._transaction():
            self._db.execute(
                "UPDATE token SET revoke_time_ns = ? WHERE tenant = ? AND number = ? AND revoke_time_ns = 0",
                (now_ns, tenant, number),
            )

    # Packs

    def packs(self, tenant: str, after: str, limit: int) -> list[PackRow]:
        """In order of their digests, those behind `after`."""
        query = "SELECT * FROM pack WHERE tenant = ? AND digest > ? ORDER BY digest LIMIT ?"
        with self._failures("read"):
            return [PackRow(*row) for row in self._db.execute(query, (tenant, after, limit))]

    def pack(self, tenant: str, digest: str) -> PackRow | None:
        """One pack of a tenant."""
        with self._failures("read"):
            row = self._db.execute("SELECT * FROM pack WHERE tenant = ? AND digest = ?", (tenant, digest)).fetchone()
        return PackRow(*row) if row else None

    def pack_totals(self, tenant: str) -> tuple[int, int]:
        """Number and bytes of a tenant's packs."""
        query = "SELECT count(*), coalesce(sum(size_bytes), 0) FROM pack WHERE tenant = ?"
        with self._failures("read"):
            count, size = self._db.execute(query, (tenant,)).fetchone()
        return count, size

    def digests(self) -> set[str]:
        """Every pack of every tenant."""
        with self._failures("read"):
            return {row[0] for row in self._db.execute("SELECT DISTINCT digest FROM pack")}

    def add_pack(self, row: PackRow) -> None:
        """Make a pack visible. Its directory is complete and synced before."""
        with self._transaction():
            self._db.execute(
                "INSERT INTO pack VALUES (?, ?, ?, ?, ?)",
                (row.tenant, row.digest, row.manifest, row.size_bytes, row.create_time_ns),
            )

    def delete_pack(self, tenant: str, digest: str) -> bool:
        """Forget a pack; true where no tenant has it any more, so that its directory may go."""
        with self._transaction():
            self._db.execute("DELETE FROM pack WHERE tenant = ? AND digest = ?", (tenant, digest))
            return self._db.execute("SELECT 1 FROM pack WHERE digest = ?", (digest,)).fetchone() is None

    # Experiments

    def experiments(self) -> list[ExperimentRow]:
        """Every living experiment with its current generation."""
        query = (
            "SELECT e.tenant, e.experiment, e.create_time_ns, g.generation, g.binding, g.create_time_ns, g.reason, "
            "g.principal, g.comment "
            "FROM experiment e JOIN generation g USING (tenant, experiment, generation) WHERE NOT e.deleted"
        )
        with self._failures("read"):
            return [ExperimentRow(r[0], r[1], r[2], _generation(r[3:])) for r in self._db.execute(query)]

    def create_experiment(
        self, tenant: str, experiment: str, binding: Binding, now_ns: int, author: Author = LOCAL_AUTHOR
    ) -> ExperimentRow:
        """A new experiment, or a new life of a deleted one, which goes on counting."""
        with self._transaction():
            key = (tenant, experiment)
            row = self._db.execute(
                "SELECT generation FROM experiment WHERE tenant = ? AND experiment = ?", key
            ).fetchone()
            generation = row[0] + 1 if row else 1
            self._db.execute(
                "INSERT INTO experiment VALUES (?, ?, ?, ?, 0) ON CONFLICT DO UPDATE SET "
                "generation = excluded.generation, create_time_ns = excluded.create_time_ns, deleted = 0",
                (*key, generation, now_ns),
            )
            record = GenerationRow(generation, binding, now_ns, "create", author)
            self._insert_generation(tenant, experiment, record)
        return ExperimentRow(tenant, experiment, now_ns, record)

    def add_generation(self, tenant: str, experiment: str, record: GenerationRow, accepted: Mapping[str, str]) -> None:
        """Make `record` the current generation; `accepted` gives the pack each checked engine was let pass with."""
        with self._transaction():
            self._insert_generation(tenant, experiment, record)
            self._db.execute(
                "UPDATE experiment SET generation = ? WHERE tenant = ? AND experiment = ?",
                (record.generation, tenant, experiment),
            )
            self._db.executemany(
                "UPDATE engine SET accepted_digest = ? WHERE tenant = ? AND experiment = ? AND engine_id = ?",
                [(digest, tenant, experiment, engine_id) for engine_id, digest in accepted.items()],
            )

    def generation(self, tenant: str, experiment: str, generation: int) -> GenerationRow | None:
        """One generation of an experiment."""
        query = f"{_GENERATIONS} AND generation = ?"
        rows = self._generations(query, (tenant, experiment, generation))
        return rows[0] if rows else None

    def generations_before(self, tenant: str, experiment: str, before: int, limit: int) -> list[GenerationRow]:
        """Newest first, those older than `before`."""
        query = f"{_GENERATIONS} AND generation < ? ORDER BY generation DESC LIMIT ?"
        return self._generations(query, (tenant, experiment, before, limit))

    def generations_after(self, tenant: str, experiment: str, after: int, limit: int) -> list[GenerationRow]:
        """Oldest first, those newer than `after`."""
        query = f"{_GENERATIONS} AND generation > ? ORDER BY generation LIMIT ?"
        return self._generations(query, (tenant, experiment, after, limit))

    def delete_experiment(self, tenant: str, experiment: str) -> None:
        """Forget an experiment and its generations, not how far they were counted."""
        with self._transaction():
            key = (tenant, experiment)
            self._db.execute("DELETE FROM generation WHERE tenant = ? AND experiment = ?", key)
            self._db.execute("UPDATE experiment SET deleted = 1 WHERE tenant = ? AND experiment = ?", key)

    # Engines

    def engine(self, tenant: str, experiment: str, engine_id: str) -> EngineRow | None:
        """What is remembered of an engine id."""
        query = "SELECT incarnation, accepted_digest FROM engine WHERE tenant = ? AND experiment = ? AND engine_id = ?"
        with self._failures("read"):
            row = self._db.execute(query, (tenant, experiment, engine_id)).fetchone()
        return EngineRow(*row) if row else None

    def attach_engine(self, tenant: str, experiment: str, engine_id: str, digest: str) -> int:
        """The next incarnation of an engine id, let pass with the pack `digest`."""
        with self._transaction():
            row = self._db.execute(
                "INSERT INTO engine VALUES (?, ?, ?, 1, ?) ON CONFLICT DO UPDATE SET "
                "incarnation = incarnation + 1, accepted_digest = excluded.accepted_digest RETURNING incarnation",
                (tenant, experiment, engine_id, digest),
            ).fetchone()
            return int(row[0])

    def accept_engine(self, tenant: str, experiment: str, engine_id: str, row: EngineRow) -> None:
        """Remember an engine that came back with its stream."""
        with self._transaction():
            self._db.execute(
                "INSERT INTO engine VALUES (?, ?, ?, ?, ?) ON CONFLICT DO UPDATE SET "
                "incarnation = excluded.incarnation, accepted_digest = excluded.accepted_digest",
                (tenant, experiment, engine_id, row.incarnation, row.accepted_digest),
            )

    # Below: how a transaction is made

    def _create_schema(self) -> None:
        self._db.execute("BEGIN IMMEDIATE")
        try:
            known = self._db.execute("SELECT 1 FROM sqlite_master WHERE name = 'schema_version'").fetchone()
            if not known:
                for statement in _SCHEMA.split(";"):
                    self._db.execute(statement)
                self._db.execute("INSERT INTO schema_version VALUES (1)")
                self._db.execute("INSERT INTO tenant VALUES ('default', 0, 0, 0, 0)")
            version = self._db.execute("SELECT version FROM schema_version").fetchone()[0]
            for next_version in range(version + 1, SCHEMA_VERSION + 1):
                for statement in MIGRATIONS[next_version].split(";"):
                    self._db.execute(statement)
                self._db.execute("UPDATE schema_version SET version = ?", (next_version,))
        except BaseException:
            self._db.execute("ROLLBACK")
            raise
        self._db.execute("COMMIT")

    def _insert_generation(self, tenant: str, experiment: str, record: GenerationRow) -> None:
        self._db.execute(
            "INSERT INTO generation VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            (
                tenant, experiment, record.generation, encode(record.binding), record.create_time_ns, record.reason,
                record.author.principal, record.author.comment,
            ),
        )  # fmt: skip

    def _generations(self, query: str, values: tuple[str | int, ...]) -> list[GenerationRow]:
        with self._failures("read"):
            rows = self._db.execute(query, values).fetchall()
        return [_generation(row) for row in rows]

    @contextmanager
    def _transaction(self) -> Iterator[None]:
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
    def _failures(self, verb: str) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise StoreFailed(
                f"the database {self._path.name} cannot be {verb}: {error}; nothing was changed"
            ) from error


def _generation(row: tuple[int, bytes, int, str, str, str]) -> GenerationRow:
    return GenerationRow(row[0], decode(row[1]), row[2], row[3], Author(row[4], row[5]))
