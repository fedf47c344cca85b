"""What a server keeps: tenants, tokens, packs, experiments with their generations, engine incarnations.

The same statements for SQLite and PostgreSQL. Every change is one transaction, committed before the method returns, and
counts the `revision` of the database up by one: rows carry the revision they were last changed with, so whoever knows
the database as of one revision reads what is newer. Plain blocking calls: `Records` runs them on one thread.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from oracle_server.errors import ExperimentExists, GenerationConflict
from oracle_server.state.binding import Binding, decode, encode
from oracle_server.state.sqlite_database import SqliteDatabase

_GENERATIONS = (
    "SELECT generation, binding, create_time_ns, reason, principal, comment FROM generation "
    "WHERE tenant = ? AND experiment = ?"
)
_QUOTA = ("max_engines", "max_steps_per_second", "max_packs", "max_pack_bytes", "max_streams", "over_rate")
_TENANTS = f"SELECT tenant, {', '.join(_QUOTA)} FROM tenant"  # noqa: S608 - names
_TOKENS = "SELECT tenant, number, scope, secret_sha256, comment, create_time_ns, revoke_time_ns FROM token"
# Of what a query is asked for by name.
_AT_ONCE = 500
_PACKS = "SELECT tenant, digest, manifest, size_bytes, create_time_ns FROM pack"
_EXPERIMENTS = (
    "SELECT e.tenant, e.experiment, e.create_time_ns, g.generation, g.binding, g.create_time_ns, g.reason, "
    "g.principal, g.comment FROM experiment e JOIN generation g USING (tenant, experiment, generation) "
    "WHERE e.deleted = 0"
)

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


@dataclass(frozen=True, slots=True)
class EnginePlace:
    """Where an engine is, and who: `presence` is empty once it has gone for good (state/presence.py)."""

    tenant: str
    experiment: str
    engine_id: str
    incarnation: int
    accepted_digest: str
    server: str
    presence: bytes
    # With which it was last changed; nothing where it is to be written.
    revision: int = 0


@dataclass(frozen=True, slots=True)
class Changes:
    """What of a database is newer than a revision, as it is at `revision`."""

    revision: int
    tenants: tuple[TenantRow, ...] = ()
    deleted_tenants: tuple[str, ...] = ()
    # Revoked ones too.
    tokens: tuple[TokenRow, ...] = ()
    experiments: tuple[ExperimentRow, ...] = ()
    # (tenant, experiment)
    deleted_experiments: tuple[tuple[str, str], ...] = ()
    engines: tuple[EnginePlace, ...] = ()


class Database(Protocol):
    """A database as the store speaks to it. One thread at a time. Values stand for `?`.

    Raises StoreFailed where a statement is refused, DatabaseUnavailable where the database does not answer.
    """

    def rows(self, query: str, values: Sequence[object] = ()) -> list[Any]:
        """Read."""

    def execute(self, query: str, values: Sequence[object] = ()) -> list[Any]:
        """One statement of a transaction, and what it returns."""

    def execute_many(self, query: str, values: Iterable[Sequence[object]]) -> None:
        """The same statement for each of the values."""

    def transaction(self) -> AbstractContextManager[None]:
        """All of the block's statements or none; durable at the end."""

    def glimpse(self) -> AbstractContextManager[None]:
        """All that the block reads is of one moment."""

    def announce(self, revision: int) -> None:
        """Within a transaction: tell the other servers of the database, once it is committed."""

    def close(self) -> None:
        """End the connection."""


class Store:
    """Owns the database's connection. One thread at a time may call it; `Records` uses one for all."""

    def __init__(self, database: Database) -> None:
        self._db = database
        # Of the last change that was made here.
        self.last_revision = 0

    @classmethod
    def open(cls, path: Path, *, read_only: bool = False) -> Store:
        """Over a file of SQLite; StoreFailed where it cannot be used."""
        return cls(SqliteDatabase(path, read_only=read_only))

    def close(self) -> None:
        """End the connection."""
        self._db.close()

    # Changes

    def revision(self) -> int:
        """How many changes there were."""
        return int(self._db.rows("SELECT revision FROM revision")[0][0])

    def changes_after(self, revision: int) -> Changes:
        """Everything that was changed since, as it is now; -1: everything there is."""
        since = (revision,)
        with self._db.glimpse():
            now = int(self._db.execute("SELECT revision FROM revision")[0][0])
            if now == revision:
                return Changes(now)
            tenants = self._db.execute(f"{_TENANTS} WHERE deleted = 0 AND revision > ?", since)
            gone = self._db.execute("SELECT tenant FROM tenant WHERE deleted <> 0 AND revision > ?", since)
            tokens = self._db.execute(f"{_TOKENS} WHERE revision > ?", since)
            experiments = self._db.execute(f"{_EXPERIMENTS} AND e.revision > ?", since)
            deleted = self._db.execute(
                "SELECT tenant, experiment FROM experiment WHERE deleted <> 0 AND revision > ?", since
            )
            engines = self._db.execute(
                "SELECT tenant, experiment, engine_id, incarnation, accepted_digest, server, presence, revision "
                "FROM engine WHERE revision > ?",
                since,
            )
        return Changes(
            now,
            tuple(TenantRow(*row) for row in tenants),
            tuple(row[0] for row in gone),
            tuple(TokenRow(*row) for row in tokens),
            tuple(_experiment(row) for row in experiments),
            tuple((row[0], row[1]) for row in deleted),
            tuple(EnginePlace(*row) for row in engines),
        )

    # Tenants

    def tenants(self, after: str, limit: int) -> list[TenantRow]:
        """In order of their names, those behind `after`."""
        rows = self._db.rows(f"{_TENANTS} WHERE deleted = 0 AND tenant > ? ORDER BY tenant LIMIT ?", (after, limit))
        return [TenantRow(*row) for row in rows]

    def tenant(self, tenant: str) -> TenantRow | None:
        """One tenant."""
        rows = self._db.rows(f"{_TENANTS} WHERE deleted = 0 AND tenant = ?", (tenant,))
        return TenantRow(*rows[0]) if rows else None

    def write_tenant(self, row: TenantRow) -> None:
        """A new tenant, a new life of a deleted one, or another quota of a living one."""
        values = (row.tenant, *(getattr(row, name) for name in _QUOTA))
        columns = ", ".join(f"{name} = excluded.{name}" for name in _QUOTA)
        with self._change() as revision:
            self._db.execute(
                f"INSERT INTO tenant (tenant, {', '.join(_QUOTA)}, revision) "  # noqa: S608 - names
                f"VALUES (?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (tenant) DO UPDATE SET {columns}, deleted = 0, "
                "revision = excluded.revision",
                (*values, revision),
            )

    def delete_tenant(self, tenant: str, now_ns: int) -> None:
        """Forget a tenant without experiments and packs, not how far its names were counted; its tokens end."""
        with self._change() as revision:
            self._db.execute("UPDATE tenant SET deleted = 1, revision = ? WHERE tenant = ?", (revision, tenant))
            self._db.execute(
                "UPDATE token SET revoke_time_ns = ?, revision = ? WHERE tenant = ? AND revoke_time_ns = 0",
                (now_ns, revision, tenant),
            )

    # Tokens

    def valid_tokens(self) -> list[TokenRow]:
        """Those of every tenant that are not revoked."""
        return [TokenRow(*row) for row in self._db.rows(f"{_TOKENS} WHERE revoke_time_ns = 0")]

    def tokens(self, tenant: str, after: int, limit: int) -> list[TokenRow]:
        """Oldest first, those behind number `after`."""
        query = f"{_TOKENS} WHERE tenant = ? AND number > ? ORDER BY number LIMIT ?"
        return [TokenRow(*row) for row in self._db.rows(query, (tenant, after, limit))]

    def token(self, tenant: str, number: int) -> TokenRow | None:
        """One token of a tenant."""
        rows = self._db.rows(f"{_TOKENS} WHERE tenant = ? AND number = ?", (tenant, number))
        return TokenRow(*rows[0]) if rows else None

    def add_token(self, tenant: str, scope: str, secret_sha256: bytes, comment: str, now_ns: int) -> TokenRow:
        """The next token of a tenant."""
        with self._change() as revision:
            query = "SELECT coalesce(max(number), 0) + 1 FROM token WHERE tenant = ?"
            number = int(self._db.execute(query, (tenant,))[0][0])
            row = TokenRow(tenant, number, scope, secret_sha256, comment, now_ns)
            self._db.execute(
                "INSERT INTO token (tenant, number, scope, secret_sha256, comment, create_time_ns, revoke_time_ns, "
                "revision) VALUES (?, ?, ?, ?, ?, ?, 0, ?)",
                (tenant, number, scope, secret_sha256, comment, now_ns, revision),
            )
        return row

    def revoke_token(self, tenant: str, number: int, now_ns: int) -> None:
        """End a token; nothing where it has ended."""
        with self._change() as revision:
            self._db.execute(
                "UPDATE token SET revoke_time_ns = ?, revision = ? "
                "WHERE tenant = ? AND number = ? AND revoke_time_ns = 0",
                (now_ns, revision, tenant, number),
            )

    # Packs: nothing that servers keep in memory, so they count no revision.

    def packs(self, tenant: str, after: str, limit: int) -> list[PackRow]:
        """In order of their digests, those behind `after`."""
        query = f"{_PACKS} WHERE tenant = ? AND digest > ? ORDER BY digest LIMIT ?"
        return [PackRow(*row) for row in self._db.rows(query, (tenant, after, limit))]

    def pack(self, tenant: str, digest: str) -> PackRow | None:
        """One pack of a tenant."""
        rows = self._db.rows(f"{_PACKS} WHERE tenant = ? AND digest = ?", (tenant, digest))
        return PackRow(*rows[0]) if rows else None

    def lacking(self, tenant: str, digests: Sequence[str]) -> list[str]:
        """Those that the tenant has no pack of."""
        found: set[str] = set()
        for begin in range(0, len(digests), _AT_ONCE):
            part = digests[begin : begin + _AT_ONCE]
            marks = ", ".join("?" * len(part))
            query = f"SELECT digest FROM pack WHERE tenant = ? AND digest IN ({marks})"  # noqa: S608 - marks alone
            found.update(row[0] for row in self._db.rows(query, (tenant, *part)))
        return [digest for digest in digests if digest not in found]

    def pack_totals(self, tenant: str) -> tuple[int, int]:
        """Number and bytes of a tenant's packs."""
        query = "SELECT count(*), coalesce(sum(size_bytes), 0) FROM pack WHERE tenant = ?"
        count, size = self._db.rows(query, (tenant,))[0]
        return int(count), int(size)

    def digests(self) -> set[str]:
        """Every pack of every tenant."""
        return {row[0] for row in self._db.rows("SELECT DISTINCT digest FROM pack")}

    def add_pack(self, row: PackRow) -> None:
        """Make a pack visible. Its directory is complete and synced before."""
        with self._db.transaction():
            self._db.execute(
                "INSERT INTO pack (tenant, digest, manifest, size_bytes, create_time_ns) VALUES (?, ?, ?, ?, ?)",
                (row.tenant, row.digest, row.manifest, row.size_bytes, row.create_time_ns),
            )

    def delete_pack(self, tenant: str, digest: str) -> bool:
        """Forget a pack; true where no tenant has it any more, so that its directory may go."""
        with self._db.transaction():
            self._db.execute("DELETE FROM pack WHERE tenant = ? AND digest = ?", (tenant, digest))
            return not self._db.execute("SELECT 1 FROM pack WHERE digest = ?", (digest,))

    # Experiments

    def experiments(self) -> list[ExperimentRow]:
        """Every living experiment with its current generation."""
        return [_experiment(row) for row in self._db.rows(_EXPERIMENTS)]

    def create_experiment(
        self, tenant: str, experiment: str, binding: Binding, now_ns: int, author: Author = LOCAL_AUTHOR
    ) -> ExperimentRow:
        """A new experiment, or a new life of a deleted one, which goes on counting; ExperimentExists."""
        with self._change() as revision:
            key = (tenant, experiment)
            rows = self._db.execute(
                "SELECT generation, deleted FROM experiment WHERE tenant = ? AND experiment = ?", key
            )
            if rows and not rows[0][1]:
                raise ExperimentExists(
                    f"the experiment tenants/{tenant}/experiments/{experiment} exists; `step-oracle experiment "
                    "activate` changes what it answers"
                )
            generation = int(rows[0][0]) + 1 if rows else 1
            self._db.execute(
                "INSERT INTO experiment (tenant, experiment, generation, create_time_ns, deleted, revision) "
                "VALUES (?, ?, ?, ?, 0, ?) ON CONFLICT (tenant, experiment) DO UPDATE SET "
                "generation = excluded.generation, create_time_ns = excluded.create_time_ns, deleted = 0, "
                "revision = excluded.revision",
                (*key, generation, now_ns, revision),
            )
            record = GenerationRow(generation, binding, now_ns, "create", author)
            self._insert_generation(tenant, experiment, record)
        return ExperimentRow(tenant, experiment, now_ns, record)

    def add_generation(self, tenant: str, experiment: str, record: GenerationRow, accepted: Mapping[str, str]) -> None:
        """Make `record` the current generation; `accepted` gives the pack each checked engine was let pass with.

        GenerationConflict unless it follows the one that is current in the database.
        """
        with self._change() as revision:
            followed = self._db.execute(
                "UPDATE experiment SET generation = ?, revision = ? "
                "WHERE tenant = ? AND experiment = ? AND deleted = 0 AND generation = ? RETURNING generation",
                (record.generation, revision, tenant, experiment, record.generation - 1),
            )
            if not followed:
                raise GenerationConflict(
                    f"the generation before {record.generation} is not the current one of tenants/{tenant}/experiments/"
                    f"{experiment} any more; read it again and decide anew"
                )
            self._insert_generation(tenant, experiment, record)
            self._accept(tenant, experiment, accepted, revision)

    def _accept(self, tenant: str, experiment: str, accepted: Mapping[str, str], revision: int) -> None:
        """A statement for many engines at once: each one lets other threads in, and back only in their turn."""
        engines_of: dict[str, list[str]] = {}
        for engine_id, digest in accepted.items():
            engines_of.setdefault(digest, []).append(engine_id)
        for digest, engines in engines_of.items():
            for begin in range(0, len(engines), _AT_ONCE):
                some = engines[begin : begin + _AT_ONCE]
                marks = ", ".join("?" * len(some))
                self._db.execute(
                    "UPDATE engine SET accepted_digest = ?, revision = ? "  # noqa: S608 - marks alone
                    f"WHERE tenant = ? AND experiment = ? AND engine_id IN ({marks})",
                    (digest, revision, tenant, experiment, *some),
                )

    def generation(self, tenant: str, experiment: str, generation: int) -> GenerationRow | None:
        """One generation of an experiment."""
        rows = self._db.rows(f"{_GENERATIONS} AND generation = ?", (tenant, experiment, generation))
        return _generation(rows[0]) if rows else None

    def generations_before(self, tenant: str, experiment: str, before: int, limit: int) -> list[GenerationRow]:
        """Newest first, those older than `before`."""
        query = f"{_GENERATIONS} AND generation < ? ORDER BY generation DESC LIMIT ?"
        return [_generation(row) for row in self._db.rows(query, (tenant, experiment, before, limit))]

    def generations_after(self, tenant: str, experiment: str, after: int, limit: int) -> list[GenerationRow]:
        """Oldest first, those newer than `after`."""
        query = f"{_GENERATIONS} AND generation > ? ORDER BY generation LIMIT ?"
        return [_generation(row) for row in self._db.rows(query, (tenant, experiment, after, limit))]

    def delete_experiment(self, tenant: str, experiment: str) -> None:
        """Forget an experiment and its generations, not how far they were counted."""
        with self._change() as revision:
            key = (tenant, experiment)
            self._db.execute("DELETE FROM generation WHERE tenant = ? AND experiment = ?", key)
            self._db.execute(
                "UPDATE experiment SET deleted = 1, revision = ? WHERE tenant = ? AND experiment = ?", (revision, *key)
            )

    # Engines

    def engine(self, tenant: str, experiment: str, engine_id: str) -> EngineRow | None:
        """What is remembered of an engine id."""
        query = "SELECT incarnation, accepted_digest FROM engine WHERE tenant = ? AND experiment = ? AND engine_id = ?"
        rows = self._db.rows(query, (tenant, experiment, engine_id))
        return EngineRow(*rows[0]) if rows else None

    def attach_engine(
        self, tenant: str, experiment: str, engine_id: str, digest: str, server: str = "", presence: bytes = b""
    ) -> int:
        """The next incarnation of an engine id, let pass with the pack `digest`; at which server it is, and who."""
        with self._change() as revision:
            rows = self._db.execute(
                "INSERT INTO engine (tenant, experiment, engine_id, incarnation, accepted_digest, revision, server, "
                "presence) VALUES (?, ?, ?, 1, ?, ?, ?, ?) ON CONFLICT (tenant, experiment, engine_id) DO UPDATE SET "
                "incarnation = engine.incarnation + 1, accepted_digest = excluded.accepted_digest, "
                "revision = excluded.revision, server = excluded.server, presence = excluded.presence "
                "RETURNING incarnation",
                (tenant, experiment, engine_id, digest, revision, server, presence),
            )
            return int(rows[0][0])

    def accept_engine(self, tenant: str, experiment: str, engine_id: str, row: EngineRow) -> None:
        """Remember an engine that came back with its stream; nothing where it was attached again since."""
        with self._change() as revision:
            self._db.execute(
                "INSERT INTO engine (tenant, experiment, engine_id, incarnation, accepted_digest, revision) "
                "VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT (tenant, experiment, engine_id) DO UPDATE SET "
                "incarnation = excluded.incarnation, accepted_digest = excluded.accepted_digest, "
                "revision = excluded.revision WHERE engine.incarnation <= excluded.incarnation",
                (tenant, experiment, engine_id, row.incarnation, row.accepted_digest, revision),
            )

    def place_engines(self, here: Sequence[EnginePlace], not_here: Sequence[EnginePlace]) -> int:
        """Say which engines have a stream at a server, and which have it no more; the revision.

        Nothing of those that were attached again since, nor of those that are at another server by now.
        """
        query = (
            "UPDATE engine SET server = ?, presence = ?, revision = ? "
            "WHERE tenant = ? AND experiment = ? AND engine_id = ? AND incarnation = ?"
        )
        with self._change() as revision:

            def values(place: EnginePlace) -> tuple[object, ...]:
                key = (place.tenant, place.experiment, place.engine_id, place.incarnation)
                return (place.server, place.presence, revision, *key)

            self._db.execute_many(query, [values(place) for place in here])
            self._db.execute_many(f"{query} AND server = ?", [(*values(place), place.server) for place in not_here])
        return revision

    # Below: how a change is made

    @contextmanager
    def _change(self) -> Iterator[int]:
        """A transaction of the revision that is given. Its first statement makes those of other servers wait."""
        with self._db.transaction():
            revision = int(self._db.execute("UPDATE revision SET revision = revision + 1 RETURNING revision")[0][0])
            yield revision
            self._db.announce(revision)
        self.last_revision = revision

    def _insert_generation(self, tenant: str, experiment: str, record: GenerationRow) -> None:
        self._db.execute(
            "INSERT INTO generation (tenant, experiment, generation, binding, create_time_ns, reason, principal, "
            "comment) VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            (
                tenant, experiment, record.generation, encode(record.binding), record.create_time_ns, record.reason,
                record.author.principal, record.author.comment,
            ),
        )  # fmt: skip


def _experiment(row: Sequence[Any]) -> ExperimentRow:
    return ExperimentRow(row[0], row[1], row[2], _generation(row[3:]))


def _generation(row: Sequence[Any]) -> GenerationRow:
    return GenerationRow(row[0], decode(row[1]), row[2], row[3], Author(row[4], row[5]))
