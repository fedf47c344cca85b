"""Packs of a fleet in a folder that all its servers have mounted."""

from __future__ import annotations

import asyncio
import os
import shutil
import uuid
from pathlib import Path

from oracle_server.errors import InvalidArgument, StoreFailed
from oracle_server.state.pack_files import folder_of


class PackFolder:
    """A PackRemote: `<hex>/` for each pack, put there whole by a rename. Any number of servers at once."""

    def __init__(self, path: Path) -> None:
        """InvalidArgument where it is no folder that can be written to."""
        self._path = path
        try:
            path.mkdir(parents=True, exist_ok=True)
            probe = path / f".{uuid.uuid4().hex}"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise InvalidArgument(
                f"the pack folder {path} cannot be written to: {error}; give one that every server has mounted",
                field="pack_folder",
            ) from error

    async def push(self, digest: str, folder: Path) -> None:
        """As PackRemote.push."""
        await asyncio.to_thread(self._push, digest, folder)

    async def fetch(self, digest: str, folder: Path) -> None:
        """As PackRemote.fetch."""
        await asyncio.to_thread(self._fetch, digest, folder)

    async def delete(self, digest: str) -> None:
        """As PackRemote.delete."""
        await asyncio.to_thread(self._delete, digest)

    def _push(self, digest: str, folder: Path) -> None:
        place = self._path / folder_of(digest)
        if place.is_dir():
            return
        arriving = self._path / f".{uuid.uuid4().hex}"
        try:
            arriving.mkdir()
            for file in folder.iterdir():
                _copy(file, arriving / file.name)
            _sync(arriving)
            try:
                arriving.rename(place)
            except OSError:
                # Another server was quicker: the same digest, the same bytes.
                if not place.is_dir():
                    raise
            _sync(self._path)
        except OSError as error:
            raise StoreFailed(f"the pack folder {self._path} refused {digest}: {error}; nothing was changed") from error
        finally:
            shutil.rmtree(arriving, ignore_errors=True)

    def _fetch(self, digest: str, folder: Path) -> None:
        try:
            for file in (self._path / folder_of(digest)).iterdir():
                shutil.copyfile(file, folder / file.name)
        except OSError as error:
            raise StoreFailed(f"the pack folder {self._path} does not give {digest}: {error}") from error

    def _delete(self, digest: str) -> None:
        # Moved away first: a folder that is half there would be taken for the pack.
        going = self._path / f".{uuid.uuid4().hex}"
        try:
            (self._path / folder_of(digest)).rename(going)
            shutil.rmtree(going)
        except FileNotFoundError:
            return
        except OSError as error:
            raise StoreFailed(f"the pack folder {self._path} does not let go of {digest}: {error}") from error


def _copy(source: Path, target: Path) -> None:
    shutil.copyfile(source, target)
    descriptor = os.open(target, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
