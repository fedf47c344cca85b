"""The published measurements: the list, and fetching them from a mirror on this machine."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from oracle_server.errors import FailedPrecondition, InvalidArgument, Unavailable
from profiler import published_data
from profiler.cli import main
from profiler.published_data import fetch, files_below
from profiler.published_files import PUBLISHED_FILES, PublishedFile, Source

SOURCE = Source("somebody/something", "0123abc", "MIT")


class _Quiet(SimpleHTTPRequestHandler):
    def log_request(self, code: Any = "-", size: Any = "-") -> None:
        pass

    def log_error(self, *args: Any) -> None:
        pass


class _Elsewhere(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(302)
        self.send_header("Location", "http://192.0.2.1/stolen")
        self.end_headers()

    def log_request(self, code: Any = "-", size: Any = "-") -> None:
        pass

    def log_error(self, *args: Any) -> None:
        pass


def _serve(handler: Any) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def mirror_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "mirror"
    (folder / "a b").mkdir(parents=True)
    return folder


@pytest.fixture
def mirror(mirror_folder: Path) -> Iterator[str]:
    yield from _serve(partial(_Quiet, directory=str(mirror_folder)))


@pytest.fixture
def redirecting() -> Iterator[str]:
    yield from _serve(_Elsewhere)


def _publish(folder: Path, path: str, content: bytes) -> PublishedFile:
    (folder / path).write_bytes(content)
    return PublishedFile(path, len(content), hashlib.sha256(content).hexdigest(), SOURCE)


def test_every_file_is_listed_once_with_its_source_and_bytes() -> None:
    assert len({file.path for file in PUBLISHED_FILES}) == len(PUBLISHED_FILES) == 36
    for file in PUBLISHED_FILES:
        assert re.fullmatch(r"[0-9a-f]{64}", file.sha256)
        assert re.fullmatch(r"[0-9a-f]{7}|", file.source.commit)
        assert file.source.licence
        assert file.size_bytes > 0
        assert not Path(file.path).is_absolute()
        assert ".." not in file.path


def test_the_list_is_that_of_the_data_folder(data_folder: Path) -> None:
    found = {path.relative_to(data_folder).as_posix() for path in data_folder.rglob("*") if path.is_file()}
    assert {file.path for file in PUBLISHED_FILES} == found - {"SOURCES.md"}
    for file in PUBLISHED_FILES:
        content = (data_folder / file.path).read_bytes()
        assert (len(content), hashlib.sha256(content).hexdigest()) == (file.size_bytes, file.sha256), file.path


def test_files_come_from_the_mirror_once(mirror: str, mirror_folder: Path, tmp_path: Path) -> None:
    files = [_publish(mirror_folder, "a b/one.csv", b"1,2\n"), _publish(mirror_folder, "two.json", b"{}" * 700_000)]
    target = tmp_path / "data"
    assert list(fetch(files, mirror + "/", target)) == files
    assert (target / "a b" / "one.csv").read_bytes() == b"1,2\n"
    assert list(fetch(files, mirror, target)) == []
    assert {path.name for path in target.rglob("*") if path.is_file()} == {"one.csv", "two.json"}


@pytest.mark.parametrize("content", [b"other", b"published and more", b"publish"])
def test_other_bytes_than_were_published_leave_nothing(
    content: bytes, mirror: str, mirror_folder: Path, tmp_path: Path
) -> None:
    file = _publish(mirror_folder, "one.csv", b"published")
    (mirror_folder / "one.csv").write_bytes(content)
    with pytest.raises(FailedPrecondition, match="is not what was published"):
        list(fetch([file], mirror, tmp_path / "data"))
    assert list((tmp_path / "data").iterdir()) == []


def test_a_file_that_does_not_end_is_read_one_byte_beyond_its_size(tmp_path: Path) -> None:
    class Endless:
        taken = 0

        def read(self, size: int) -> bytes:
            self.taken += size
            return b"x" * size

    source = Endless()
    with (tmp_path / "target").open("wb") as target:
        published_data._copy(source, target, 10)  # type: ignore[arg-type]
    assert source.taken == 11


def test_somebodys_file_under_the_name_is_not_replaced(mirror: str, mirror_folder: Path, tmp_path: Path) -> None:
    file = _publish(mirror_folder, "one.csv", b"published")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "one.csv").write_bytes(b"mine")
    with pytest.raises(FailedPrecondition, match="move it away"):
        list(fetch([file], mirror, tmp_path / "data"))
    assert (tmp_path / "data" / "one.csv").read_bytes() == b"mine"


def test_a_mirror_without_the_file_is_named(mirror: str, tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match=r"/absent\.csv: 404"):
        list(fetch([PublishedFile("absent.csv", 1, "0" * 64, SOURCE)], mirror, tmp_path))


@pytest.mark.parametrize(
    "url", ["http://example.org/data", "ftp://example.org", "file:///etc", "data", "https://", "http://[::1", ""]
)
def test_only_https_or_this_machine_is_asked(url: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument):
        list(fetch([], url, tmp_path))


def test_a_redirect_away_from_https_is_not_followed(redirecting: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match=r"192\.0\.2\.1"):
        list(fetch([PublishedFile("one.csv", 1, "0" * 64, SOURCE)], redirecting, tmp_path))


def test_an_unknown_prefix_names_the_folders() -> None:
    with pytest.raises(InvalidArgument, match="folders are blis_steps, llm_emu_packs, llmservingsim, workloads"):
        files_below("nothing/")


def test_the_command_lists_and_fetches(
    mirror: str,
    mirror_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    file = _publish(mirror_folder, "one.csv", b"published")
    monkeypatch.setattr(published_data, "PUBLISHED_FILES", (file,))
    assert main(["data"]) == 0
    assert capsys.readouterr().out.split() == [file.sha256, "9", "one.csv", "somebody/something", "0123abc", "MIT"]
    assert main(["data", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["source"]["commit"] == "0123abc"
    target = tmp_path / "data"
    assert main(["data", "--base-url", mirror, "-o", str(target), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"folder": str(target), "fetched": ["one.csv"], "present": 0}
    assert main(["data", "--base-url", mirror, "-o", str(target)]) == 0
    assert "0 files fetched, 1 were there" in capsys.readouterr().out
    assert main(["data", "--base-url", "http://example.org"]) == 2
