"""The packs of this server as it answers from them: on its disk, else brought from where the fleet keeps them."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Iterable
from typing import Any

from oracle_server.errors import OracleError, PackInvalid, PackRegistryUnavailable, StoreFailed
from oracle_server.state.pack_files import PackFiles
from oracle_server.state.pack_remote import PackRemote
from oracle_server.state.snapshot import LoadedPack

# How long a start waits for packs that are on their way: many of them, or a registry that hangs, must not keep the
# experiments whose packs are here from being answered.
WAIT_SECONDS = 30.0


class PackSupply:
    """Owns the folder's way in and out of the fleet's registry; without one (None) it is the folder alone.

    Event loop only; disk work runs in threads, parsing in a child process.
    """

    def __init__(self, files: PackFiles, remote: PackRemote | None = None) -> None:
        self.files = files
        self.remote = remote
        # One checking child at a time: its memory limit is then the limit of all arriving packs together.
        self.checking = asyncio.Lock()
        # By digest: those on their way here, once each however many ask.
        self._coming: dict[str, asyncio.Task[None]] = {}

    async def load(self, digest: str) -> LoadedPack:
        """The pack mapped and warm; PackRegistryUnavailable, StoreFailed where it is not here and cannot be brought."""
        loaded = self.files.loaded(digest)
        if loaded is None:
            await self.bring(digest)
            loaded = await asyncio.to_thread(self.files.load, digest)
        return loaded

    async def load_all(self, digests: Iterable[str]) -> tuple[dict[str, LoadedPack], dict[str, OracleError]]:
        """(those that are here or come within WAIT_SECONDS, why the others are not here)."""
        loading = {digest: asyncio.create_task(self.load(digest)) for digest in digests}
        if loading:
            await asyncio.wait(loading.values(), timeout=None if self.remote is None else WAIT_SECONDS)
        missing: dict[str, OracleError] = {}
        for digest, task in loading.items():
            if not task.done():
                task.cancel()
                missing[digest] = PackRegistryUnavailable(f"the registry has not given it in {WAIT_SECONDS:g} s")
            elif isinstance(error := task.exception(), OracleError):
                missing[digest] = error
        if missing and self.remote is None:
            raise next(iter(missing.values()))
        return {digest: task.result() for digest, task in loading.items() if digest not in missing}, missing

    async def bring(self, digest: str) -> None:
        """Have the pack's files here, checked as those of an upload are."""
        if self.remote is None or await asyncio.to_thread(self.files.has, digest):
            return
        coming = self._coming.get(digest)
        if coming is None:
            coming = asyncio.create_task(self._bring(self.remote, digest))
            self._coming[digest] = coming
            coming.add_done_callback(lambda done: self._came(digest, done))
        # It runs to its end whoever gives up: its folder must not be removed under a thread or a child.
        await asyncio.shield(coming)

    async def close(self) -> None:
        """Let what is on its way end; whoever owns the remote has told it to."""
        if self._coming:
            await asyncio.wait(list(self._coming.values()))

    async def _bring(self, remote: PackRemote, digest: str) -> None:
        directory = await asyncio.to_thread(self.files.make_room)
        try:
            await remote.fetch(digest, directory)
            async with self.checking:
                # It may have been uploaded meanwhile, and be on its way from its folder to the registry.
                if not await asyncio.to_thread(self.files.has, digest):
                    await asyncio.to_thread(self.files.keep, directory, digest)
        except PackInvalid as error:
            raise StoreFailed(
                f"the registry's copy of the pack {digest} is refused: {error.message}; delete it there and push the "
                "pack again"
            ) from error
        finally:
            await asyncio.to_thread(shutil.rmtree, directory, ignore_errors=True)

    def _came(self, digest: str, done: asyncio.Task[Any]) -> None:
        self._coming.pop(digest, None)
        if not done.cancelled():
            # Looked at here so that a failure whose askers have gone is not reported as forgotten.
            done.exception()
