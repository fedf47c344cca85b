"""A folder of packs that servers share: whole packs or none, whoever is quicker."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path

import pytest

from builders import build_constant_pack
from oracle_server.errors import InvalidArgument, StoreFailed
from oracle_server.pack import digest_of
from oracle_server.state.pack_folder import PackFolder


@pytest.fixture
def pack(tmp_path: Path) -> Path:
    build_constant_pack(tmp_path / "pack", latency_ns=10_000_000)
    return tmp_path / "pack"


@pytest.fixture
def digest(pack: Path) -> str:
    return digest_of((pack / "manifest.json").read_bytes())


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


async def test_what_one_server_pushes_another_fetches_byte_for_byte(tmp_path: Path, pack: Path, digest: str) -> None:
    shared = tmp_path / "shared"
    # Both have been given the same upload.
    await asyncio.gather(PackFolder(shared).push(digest, pack), PackFolder(shared).push(digest, pack))
    await PackFolder(shared).push(digest, pack)
    (tmp_path / "here").mkdir()
    await PackFolder(shared).fetch(digest, tmp_path / "here")
    assert contents(tmp_path / "here") == contents(pack)
    assert [path.name for path in shared.iterdir()] == [digest.removeprefix("sha256:")]


async def test_a_push_that_fails_leaves_nothing_that_would_be_fetched(
    tmp_path: Path, pack: Path, digest: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = PackFolder(tmp_path / "shared")
    copy = shutil.copyfile
    copied: list[Path] = []

    def full(source: Path, target: Path) -> Path:
        if copied:
            raise OSError(28, "No space left on device")
        copied.append(target)
        return copy(source, target)

    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(StoreFailed, match="No space left on device; nothing was changed"):
        await folder.push(digest, pack)
    monkeypatch.undo()
    assert list((tmp_path / "shared").iterdir()) == []
    with pytest.raises(StoreFailed, match=f"does not give {digest}"):
        await folder.fetch(digest, tmp_path)


async def test_what_is_deleted_is_gone_and_once_more_is_no_error(tmp_path: Path, pack: Path, digest: str) -> None:
    folder = PackFolder(tmp_path / "shared")
    await folder.push(digest, pack)
    await folder.delete(digest)
    await folder.delete(digest)
    assert list((tmp_path / "shared").iterdir()) == []


def test_a_path_that_cannot_be_a_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InvalidArgument, match="cannot be written to"):
        PackFolder(tmp_path / "file")
