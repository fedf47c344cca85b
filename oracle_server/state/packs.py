"""The packs of the tenants: rows in the database, files on the disk, in step."""

from __future__ import annotations

import asyncio
import logging
import weakref
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from oracle_server.errors import OracleError, PackInUse, PackNotFound, QuotaExceeded
from oracle_server.state import names
from oracle_server.state.experiments import Experiments
from oracle_server.state.pack_files import Upload
from oracle_server.state.pack_remote import PackRemote
from oracle_server.state.pack_supply import PackSupply
from oracle_server.state.records import Records
from oracle_server.state.store import PackRow

_T = TypeVar("_T")
_log = logging.getLogger("step_oracle.packs")

# Each upload may take MAX_PACK_BYTES of disk and one checking child.
MAX_UPLOADS = 4


class Packs:
    """Uploads, lists and deletes. Event loop only; disk work runs in threads, parsing in a child process.

    A pack is in its folder, and in the fleet's registry where there is one, before its row is inserted; the row goes
    first, then what the registry has, then the folder. The uploads and deletions of one digest run one after another,
    whoever's they are, so that no deletion falls into another tenant's upload.
    """

    def __init__(
        self, experiments: Experiments, records: Records, supply: PackSupply, *, now_ns: Callable[[], int]
    ) -> None:
        self._experiments = experiments
        self._records = records
        self._supply = supply
        self._files = supply.files
        self._now_ns = now_ns
        self._uploads = 0
        self._turns: weakref.WeakValueDictionary[str, asyncio.Lock] = weakref.WeakValueDictionary()
        # What goes on after its call has been answered, or has been given up.
        self._running: set[asyncio.Task[Any]] = set()

    @asynccontextmanager
    async def upload(self, tenant: str, manifest_json: bytes) -> AsyncIterator[Upload]:
        """A place for the files; removed at the end unless the pack was kept."""
        if self._uploads >= MAX_UPLOADS:
            raise QuotaExceeded(f"{self._uploads} uploads are under way; allowed: {MAX_UPLOADS}; try again later")
        self._uploads += 1
        beginning = asyncio.ensure_future(asyncio.to_thread(self._files.begin, manifest_json))
        try:
            upload = await _to_its_end(beginning)
            await self._check_quota(tenant, upload.size_bytes)
            yield upload
        finally:
            self._uploads -= 1
            if not beginning.exception():
                await _to_its_end(asyncio.ensure_future(asyncio.to_thread(beginning.result().abandon)))

    async def write(self, upload: Upload, name: str, data: bytes) -> None:
        """Append to the file whose turn it is; as Upload.write."""
        await _to_its_end(asyncio.ensure_future(asyncio.to_thread(upload.write, name, data)))

    async def keep(self, tenant: str, upload: Upload, *, check_only: bool) -> tuple[PackRow, tuple[str, ...], bool]:
        """(row, warnings, existed) of a complete upload; PackInvalid, PackDigestMismatch, StoreFailed."""
        return await _to_its_end(asyncio.ensure_future(self._keep(tenant, upload, check_only)))

    async def find(self, tenant: str, digest: str) -> PackRow | None:
        """The pack, if the tenant has it."""
        return await self._records.call(self._records.store.pack, tenant, digest)

    async def get(self, tenant: str, digest: str) -> PackRow:
        """The pack; PackNotFound."""
        row = await self.find(tenant, digest)
        if row is None:
            raise PackNotFound(f"{names.tenant_name(tenant)} has no pack {digest}; `step-oracle pack list` shows them")
        return row

    async def page(self, tenant: str, after: str, limit: int) -> list[PackRow]:
        """Packs in the order of their digests, those behind `after`."""
        return await self._records.call(self._records.store.packs, tenant, after, limit)

    async def read(self, tenant: str, digest: str) -> AsyncIterator[tuple[str, bytes]]:
        """(file name, bytes) of the pack, manifest first."""
        await self.get(tenant, digest)
        await self._supply.bring(digest)
        chunks = self._files.read(digest)
        while (chunk := await asyncio.to_thread(next, chunks, None)) is not None:
            yield chunk

    async def delete(self, tenant: str, digest: str) -> None:
        """PackNotFound; PackInUse while a current binding names it. A registry that is down is no reason to refuse."""
        deleted = asyncio.get_running_loop().create_future()
        deleting = self._start(self._delete_in_turn(tenant, digest, deleted))
        await asyncio.wait((deleting, deleted), return_when=asyncio.FIRST_COMPLETED)
        if not deleted.done():
            await deleting

    async def close(self) -> None:
        """Let deletions under way end."""
        if self._running:
            await asyncio.wait(list(self._running))

    async def _keep(self, tenant: str, upload: Upload, check_only: bool) -> tuple[PackRow, tuple[str, ...], bool]:
        await asyncio.to_thread(upload.finish)
        row = PackRow(tenant, upload.digest, upload.manifest_bytes, upload.size_bytes, self._now_ns())
        async with self._turn(upload.digest):
            known = await self.find(tenant, upload.digest)
            if known is not None and not check_only:
                return known, (), True
            async with self._supply.checking:
                # Bytes that are here already are checked again all the same: knowing a manifest is not having the pack.
                if check_only or (await self._is_held(upload.digest) and self._files.has(upload.digest)):
                    report = await asyncio.to_thread(self._files.check, upload)
                else:
                    report = await asyncio.to_thread(self._files.keep, upload.directory, upload.digest)
            if not check_only:
                await self._add(row)
        return row, tuple(report.warnings), False

    async def _add(self, row: PackRow) -> None:
        """Make a pack visible that lies in its folder; where that fails nothing of it stays."""
        pushed = False
        try:
            if self._supply.remote is not None:
                await self._supply.remote.push(row.digest, self._files.place(row.digest))
                pushed = True
            await self._records.change(self._insert(row))
        except OracleError:
            # A push that failed has left no tag, so there is nothing to ask a registry for that may be down.
            await self._clear(row.digest, self._supply.remote if pushed else None)
            raise

    async def _insert(self, row: PackRow) -> None:
        await self._check_quota(row.tenant, row.size_bytes)
        await self._records.call(self._records.store.add_pack, row)

    async def _check_quota(self, tenant: str, size_bytes: int) -> None:
        limits = self._experiments.tenant(tenant)
        count, total = await self._records.call(self._records.store.pack_totals, tenant)
        if limits.max_packs and count >= limits.max_packs:
            raise QuotaExceeded(
                f"{names.tenant_name(tenant)} has {count} packs; allowed: {limits.max_packs}; delete one"
            )
        if limits.max_pack_bytes and total + size_bytes > limits.max_pack_bytes:
            raise QuotaExceeded(
                f"{names.tenant_name(tenant)} has {total} bytes of packs and {size_bytes} would come; allowed: "
                f"{limits.max_pack_bytes}"
            )

    async def _delete_in_turn(self, tenant: str, digest: str, deleted: asyncio.Future[None]) -> None:
        async with self._turn(digest):
            if not await self._records.change(self._delete(tenant, digest)):
                return
            if self._supply.remote is not None:
                # A registry that hangs does not hold up the answer, only uploads of the same pack.
                deleted.set_result(None)
            await self._clear(digest, self._supply.remote)

    async def _delete(self, tenant: str, digest: str) -> bool:
        await self.get(tenant, digest)
        users = self._experiments.naming(tenant, digest)
        if users:
            raise PackInUse(f"{digest} answers for {', '.join(users[:5])}; activate another pack there first")
        return await self._records.call(self._records.store.delete_pack, tenant, digest)

    async def _clear(self, digest: str, remote: PackRemote | None) -> None:
        """Remove what lies of a pack that no tenant holds. In its turn. A snapshot that has it mapped goes on."""
        if await self._is_held(digest):
            return
        if remote is not None:
            try:
                await remote.delete(digest)
                if await self._is_held(digest):
                    # Stored through another server of the fleet, meanwhile.
                    await remote.push(digest, self._files.place(digest))
                    return
            except OracleError as error:
                _log.warning("the pack %s, which no tenant has any more, may be in the registry: %s", digest, error)
        await asyncio.to_thread(self._files.remove, digest)

    async def _is_held(self, digest: str) -> bool:
        return digest in await self._records.call(self._records.store.digests)

    def _turn(self, digest: str) -> asyncio.Lock:
        """Held by whoever stores or deletes the digest; it lives as long as somebody does."""
        lock = self._turns.get(digest)
        if lock is None:
            lock = self._turns[digest] = asyncio.Lock()
        return lock

    def _start(self, work: Coroutine[Any, Any, _T]) -> asyncio.Task[_T]:
        """Runs to its end, whatever becomes of the caller."""
        task = asyncio.create_task(work)
        self._running.add(task)
        task.add_done_callback(self._forget)
        return task

    def _forget(self, task: asyncio.Task[Any]) -> None:
        self._running.discard(task)
        if not task.cancelled():
            # Looked at here so that a failure whose caller has gone is not reported as forgotten.
            task.exception()


async def _to_its_end(task: asyncio.Future[_T]) -> _T:
    """Await a task that is not cancelled with its caller: the folder must not be removed under a thread or a child."""
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait([task])
        raise
