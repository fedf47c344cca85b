"""The schema: what makes a new database, and what brings one of an older server to this version.

A database is opened by running the statements of every version after its own, one after another, in one transaction;
a new one as well. So a migrated database and a new one have the same schema. SQLite knows all versions; PostgreSQL
began with version 3.
"""

from __future__ import annotations

SCHEMA_VERSION = 3

# Of SQLite. Version 1 is what a new database begins with.
SQLITE = {
    1: """
CREATE TABLE schema_version (version INTEGER NOT NULL) STRICT;
INSERT INTO schema_version VALUES (1);
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
INSERT INTO tenant VALUES ('default', 0, 0, 0, 0)
""",
    # A deleted tenant keeps its row, as an experiment does: its experiments go on counting generations, its tokens
    # their numbers. The servers of version 1 asked for no credentials, so who made a generation was `local`.
    2: """
ALTER TABLE tenant ADD COLUMN max_streams INTEGER NOT NULL DEFAULT 0;
ALTER TABLE tenant ADD COLUMN over_rate TEXT NOT NULL DEFAULT 'mark';
ALTER TABLE tenant ADD COLUMN deleted INTEGER NOT NULL DEFAULT 0;
ALTER TABLE generation ADD COLUMN principal TEXT NOT NULL DEFAULT 'local';
ALTER TABLE generation ADD COLUMN comment TEXT NOT NULL DEFAULT '';
CREATE TABLE token (
  tenant TEXT NOT NULL REFERENCES tenant, number INTEGER NOT NULL, scope TEXT NOT NULL,
  secret_sha256 BLOB NOT NULL UNIQUE, comment TEXT NOT NULL,
  create_time_ns INTEGER NOT NULL, revoke_time_ns INTEGER NOT NULL,
  PRIMARY KEY (tenant, number)
) STRICT, WITHOUT ROWID
""",
    # `revision` counts the changes of what servers keep in memory; a row has the one it was last changed with. Which
    # server an engine is at (`server`), and who it is (`presence`), is kept where several share a database.
    3: """
CREATE TABLE revision (revision INTEGER NOT NULL) STRICT;
INSERT INTO revision VALUES (0);
ALTER TABLE tenant ADD COLUMN revision INTEGER NOT NULL DEFAULT 0;
ALTER TABLE token ADD COLUMN revision INTEGER NOT NULL DEFAULT 0;
ALTER TABLE experiment ADD COLUMN revision INTEGER NOT NULL DEFAULT 0;
ALTER TABLE engine ADD COLUMN revision INTEGER NOT NULL DEFAULT 0;
ALTER TABLE engine ADD COLUMN server TEXT NOT NULL DEFAULT '';
ALTER TABLE engine ADD COLUMN presence BLOB NOT NULL DEFAULT x''
""",
}

# Of PostgreSQL. Names are compared byte by byte, as SQLite does.
POSTGRES = {
    3: """
CREATE TABLE schema_version (version BIGINT NOT NULL);
INSERT INTO schema_version VALUES (3);
CREATE TABLE revision (revision BIGINT NOT NULL);
INSERT INTO revision VALUES (0);
CREATE TABLE tenant (
  tenant TEXT COLLATE "C" NOT NULL PRIMARY KEY,
  max_engines BIGINT NOT NULL, max_steps_per_second BIGINT NOT NULL,
  max_packs BIGINT NOT NULL, max_pack_bytes BIGINT NOT NULL,
  max_streams BIGINT NOT NULL DEFAULT 0, over_rate TEXT NOT NULL DEFAULT 'mark', deleted BIGINT NOT NULL DEFAULT 0,
  revision BIGINT NOT NULL DEFAULT 0
);
CREATE TABLE pack (
  tenant TEXT COLLATE "C" NOT NULL REFERENCES tenant, digest TEXT COLLATE "C" NOT NULL,
  manifest BYTEA NOT NULL, size_bytes BIGINT NOT NULL, create_time_ns BIGINT NOT NULL,
  PRIMARY KEY (tenant, digest)
);
CREATE TABLE experiment (
  tenant TEXT COLLATE "C" NOT NULL REFERENCES tenant, experiment TEXT COLLATE "C" NOT NULL,
  generation BIGINT NOT NULL, create_time_ns BIGINT NOT NULL, deleted BIGINT NOT NULL DEFAULT 0,
  revision BIGINT NOT NULL DEFAULT 0,
  PRIMARY KEY (tenant, experiment)
);
CREATE TABLE generation (
  tenant TEXT COLLATE "C" NOT NULL, experiment TEXT COLLATE "C" NOT NULL, generation BIGINT NOT NULL,
  binding BYTEA NOT NULL, create_time_ns BIGINT NOT NULL, reason TEXT NOT NULL,
  principal TEXT NOT NULL DEFAULT 'local', comment TEXT NOT NULL DEFAULT '',
  PRIMARY KEY (tenant, experiment, generation),
  FOREIGN KEY (tenant, experiment) REFERENCES experiment
);
CREATE TABLE engine (
  tenant TEXT COLLATE "C" NOT NULL, experiment TEXT COLLATE "C" NOT NULL, engine_id TEXT COLLATE "C" NOT NULL,
  incarnation BIGINT NOT NULL, accepted_digest TEXT NOT NULL,
  revision BIGINT NOT NULL DEFAULT 0, server TEXT NOT NULL DEFAULT '', presence BYTEA NOT NULL DEFAULT '',
  PRIMARY KEY (tenant, experiment, engine_id),
  FOREIGN KEY (tenant, experiment) REFERENCES experiment
);
CREATE INDEX engine_revision ON engine (revision);
CREATE TABLE token (
  tenant TEXT COLLATE "C" NOT NULL REFERENCES tenant, number BIGINT NOT NULL, scope TEXT NOT NULL,
  secret_sha256 BYTEA NOT NULL UNIQUE, comment TEXT NOT NULL,
  create_time_ns BIGINT NOT NULL, revoke_time_ns BIGINT NOT NULL,
  revision BIGINT NOT NULL DEFAULT 0,
  PRIMARY KEY (tenant, number)
);
-- Which servers run now, and what the engines at each have done: nothing that has to outlive a crash of the database.
CREATE UNLOGGED TABLE server (server TEXT NOT NULL PRIMARY KEY, seen TIMESTAMPTZ NOT NULL, counts BYTEA NOT NULL);
INSERT INTO tenant (tenant, max_engines, max_steps_per_second, max_packs, max_pack_bytes)
VALUES ('default', 0, 0, 0, 0)
""",
}


def statements(versions: dict[int, str], after: int) -> list[tuple[int, list[str]]]:
    """What has to run over a database of version `after` (0: a new one): (version it leads to, its statements)."""
    return [(version, versions[version].split(";")) for version in sorted(versions) if version > after]
