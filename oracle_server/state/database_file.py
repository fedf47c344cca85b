"""The file that holds the database's URL: read at every connection, so that a changed password needs no restart."""

from __future__ import annotations

from pathlib import Path

from oracle_server.errors import InvalidArgument

_SCHEMES = ("postgresql://", "postgres://")


class DatabaseFile:
    """A file of one line: postgresql://USER:PASSWORD@HOST:PORT/DATABASE, as libpq takes it."""

    def __init__(self, path: Path) -> None:
        """InvalidArgument where the file cannot be used, or psycopg is not installed."""
        self._path = path
        try:
            import psycopg  # noqa: F401 - that it is there
        except ImportError as error:
            raise InvalidArgument(
                "--database needs psycopg, which is not here; install step-oracle with the extra `postgres`",
                field="database",
            ) from error
        self.url()

    def url(self) -> str:
        """The URL; InvalidArgument. It is a secret, so no message shows it."""
        try:
            text = self._path.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise InvalidArgument(
                f"the database file {self._path} cannot be read: {error}", field="database"
            ) from error
        if not text.startswith(_SCHEMES) or len(text.split()) != 1:
            raise InvalidArgument(
                f"the database file {self._path} does not hold one URL; allowed: "
                "postgresql://USER:PASSWORD@HOST/DATABASE on one line. Without --database the state "
                "is in a file of the server's own",
                field="database",
            )
        return text
