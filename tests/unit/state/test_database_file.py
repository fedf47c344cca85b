"""The file of the database's URL: one line, read again at each connection, never shown."""

from __future__ import annotations

from pathlib import Path

import pytest

from oracle_server.errors import InvalidArgument
from oracle_server.state.database_file import DatabaseFile
from oracle_server.state.postgres_database import connect


def test_a_changed_file_holds_from_the_next_connection_on(tmp_path: Path) -> None:
    path = tmp_path / "url"
    path.write_text("postgresql://a:old@h/d\n")
    file = DatabaseFile(path)
    path.write_text("postgres://a:new@h/d")
    assert file.url() == "postgres://a:new@h/d"


@pytest.mark.parametrize("text", ["", "mysql://a:secret@h/d", "host=h password=secret", "postgresql://a b:secret@h/d"])
def test_what_is_no_url_is_refused_and_not_shown(text: str, tmp_path: Path) -> None:
    path = tmp_path / "url"
    path.write_text(text)
    with pytest.raises(InvalidArgument, match="does not hold one URL; allowed: postgresql://") as refused:
        DatabaseFile(path)
    assert "secret" not in refused.value.message
    with pytest.raises(InvalidArgument, match="cannot be read"):
        DatabaseFile(tmp_path / "none")


def test_a_url_that_libpq_does_not_take_is_refused_and_not_shown() -> None:
    with pytest.raises(InvalidArgument, match="libpq") as refused:
        connect(lambda: "postgresql://a:secret@h/d?no_such_option=1")
    assert "secret" not in refused.value.message
