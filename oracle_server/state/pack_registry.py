"""A PackRemote over an OCI registry. Its requests block, so they run on threads of their own."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from oras.container import Container

from oracle_server.errors import PackDigestMismatch, PackRegistryUnavailable
from oracle_server.state import pack_artifact
from oracle_server.state.pack_artifact import Pushed
from oracle_server.state.registry_transport import Transport

_T = TypeVar("_T")

# Not asyncio's own threads: a registry that hangs must not keep packs that are here from being mapped.
THREADS = 4


class PackRegistry:
    """Packs in one repository of a registry, as pack_artifact.py lays them out.

    `authority` is HOST:PORT, with TLS unless `plaintext`; `credentials` the file of one line USER:PASSWORD and `ca` a
    PEM bundle, both read at each use, so a rotation needs no restart. Any task may call it.
    """

    def __init__(
        self,
        authority: str,
        repository: str,
        *,
        plaintext: bool = False,
        credentials: Path | None = None,
        ca: Path | None = None,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self.place = f"{authority}/{repository}"
        self._authority = authority
        self._plaintext = plaintext
        self._credentials = credentials
        self._ca = ca
        self._monotonic = monotonic
        self._closing = threading.Event()
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="pack-registry")
        # oras takes the first part of a name for a host only with a dot or a port in it; `place` always has its port.
        self._container = Container(self.place)

    async def push(self, digest: str, folder: Path) -> None:
        """As PackRemote.push; PackDigestMismatch where the folder holds another pack."""
        pushed = await self.push_as(folder)
        if pushed.digest != digest:
            raise PackDigestMismatch(f"the folder {folder} holds the pack {pushed.digest}, not {digest}")

    async def fetch(self, digest: str, folder: Path) -> None:
        """As PackRemote.fetch."""
        await self.fetch_as(pack_artifact.tag_of(digest), folder, digest)

    async def delete(self, digest: str) -> None:
        """As PackRemote.delete; StoreFailed where the registry does not allow it."""
        await self._run(lambda transport: pack_artifact.delete(transport, self._container, digest))

    async def push_as(self, folder: Path, alias: str = "") -> Pushed:
        """Write a pack under its digest, and under the tag `alias` too."""
        return await self._run(lambda transport: pack_artifact.push(transport, self._container, folder, alias))

    async def fetch_as(self, reference: str, folder: Path, digest: str = "") -> Pushed:
        """Read the pack a tag or the digest of an image manifest names; `digest`: which one it has to be."""
        return await self._run(
            lambda transport: pack_artifact.fetch(transport, self._container, reference, folder, digest)
        )

    def check_files(self) -> None:
        """PackRegistryUnavailable where the credentials or the CA cannot be read; asks the registry nothing."""
        self._work(lambda _: None)

    def close(self) -> None:
        """Let requests under way end at their next piece, and begin no more."""
        self._closing.set()
        self._threads.shutdown(wait=False)

    async def _run(self, work: Callable[[Transport], _T]) -> _T:
        if self._closing.is_set():
            raise PackRegistryUnavailable(f"the registry {self._authority} is asked no more, the server is stopping")
        return await asyncio.get_running_loop().run_in_executor(self._threads, self._work, work)

    def _work(self, work: Callable[[Transport], _T]) -> _T:
        transport = Transport(
            self._authority,
            plaintext=self._plaintext,
            credentials=self._credentials,
            ca=self._ca,
            monotonic=self._monotonic,
            is_closing=self._closing.is_set,
        )
        with transport:
            return work(transport)
