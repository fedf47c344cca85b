"""The packs in a server's folder, and those that come there from where the packs of its fleet lie."""

from __future__ import annotations

import asyncio
import shutil

from oracle_server.state.pack_files import PackFiles
from oracle_server.state.pack_remote import PackRemote
from oracle_server.state.snapshot import LoadedPack


class PackCache:
    """Without a remote the folder alone. Event loop only; disk work runs in threads, parsing in a child process."""

    def __init__(self, files: PackFiles, remote: PackRemote | None) -> None:
        self._files = files
        self.remote = remote
        # One at a time: a checking child has a limit of memory, and the second for a digest finds it there.
        self._fetching = asyncio.Lock()

    async def load(self, digest: str) -> LoadedPack:
        """The pack mapped and warm; StoreFailed, Unavailable and PackInvalid where it cannot be had."""
        await self.ensure(digest)
        return await asyncio.to_thread(self._files.load, digest)

    async def ensure(self, digest: str) -> None:
        """Have the pack in the folder."""
        if self.remote is None or await asyncio.to_thread(self._files.has, digest):
            return
        async with self._fetching:
            if await asyncio.to_thread(self._files.has, digest):
                return
            directory = await asyncio.to_thread(self._files.arriving)
            try:
                await self.remote.fetch(digest, directory)
                await asyncio.to_thread(self._files.take, digest, directory)
            finally:
                await asyncio.to_thread(shutil.rmtree, directory, ignore_errors=True)

    async def push(self, digest: str) -> None:
        """Let the other servers have a pack of the folder."""
        if self.remote is not None:
            await self.remote.push(digest, self._files.place(digest))

    async def delete(self, digest: str) -> None:
        """No tenant has it any more."""
        if self.remote is not None:
            await self.remote.delete(digest)
