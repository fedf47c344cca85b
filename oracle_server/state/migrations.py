"""What brings a database of an older server to the schema of this one: statements by the version they lead to.

`Store.open` runs them one after another in one transaction, over a new database as well, so a migrated database and a
new one have the same schema.
"""

from __future__ import annotations

SCHEMA_VERSION = 2

MIGRATIONS = {
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
}
