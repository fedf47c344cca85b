"""The packs of the tenants: rows in the database, files on the disk, in step."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import TypeVar

from oracle_server.errors import PackInUse, PackNotFound, QuotaExceeded
from oracle_server.state import names
from oracle_server.state.experiments import Experiments
from oracle_server.state.pack_cache import PackCache
from oracle_server.state.pack_files import PackFiles, Upload
from oracle_server.state.records import Records
from oracle_server.state.store import PackRow

_T = TypeVar("_T")

# Each upload may take MAX_PACK_BYTES of disk and one checking child.
MAX_UPLOADS = 4


class Packs:
    """Uploads, lists and deletes. Event loop only; disk work runs in threads, parsing in a child process."""

    def __init__(
        self,
        experiments: Experiments,
        records: Records,
        files: PackFiles,
        cache: PackCache,
        *,
        now_ns: Callable[[], int],
    ) -> None:
        self._experiments = experiments
        self._records = records
        self._files = files
        self._cache = cache
        self._now_ns = now_ns
        self._uploads = 0
        # One checking child at a time: its memory limit is then the limit of all uploads together.
        self._checking = asyncio.Lock()

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
        await self._cache.ensure(digest)
        chunks = self._files.read(digest)
        while (chunk := await asyncio.to_thread(next, chunks, None)) is not None:
            yield chunk

    async def delete(self, tenant: str, digest: str) -> None:
        """PackNotFound; PackInUse while a current binding names it."""
        await self._records.change(self._delete(tenant, digest))

    async def _keep(self, tenant: str, upload: Upload, check_only: bool) -> tuple[PackRow, tuple[str, ...], bool]:
        await asyncio.to_thread(upload.finish)
        row = PackRow(tenant, upload.digest, upload.manifest_bytes, upload.size_bytes, self._now_ns())
        async with self._checking:
            known = await self.find(tenant, upload.digest)
            if known is not None and not check_only:
                return known, (), True
            stored = upload.digest in await self._records.call(self._records.store.digests)
            # Bytes another tenant has stored are checked again all the same: knowing a manifest is not having the pack.
            work = self._files.check if check_only or stored else self._files.keep
            report = await asyncio.to_thread(work, upload)
            if not check_only and not stored:
                await self._cache.push(upload.digest)
            if not check_only:
                await self._records.change(self._add(row, upload, stored))
        return row, tuple(report.warnings), False

    async def _add(self, row: PackRow, upload: Upload, stored: bool) -> None:
        await self._check_quota(row.tenant, row.size_bytes)
        if stored and row.digest not in await self._records.call(self._records.store.digests):
            # The tenant that had it has deleted it meanwhile, and its files with it.
            await asyncio.to_thread(self._files.keep, upload)
        # Again: another server of the fleet may have deleted it meanwhile. Nothing is sent where it lies already.
        if not stored or self._files.has(row.digest):
            await self._cache.push(row.digest)
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

    async def _delete(self, tenant: str, digest: str) -> None:
        await self.get(tenant, digest)
        users = self._experiments.naming(tenant, digest)
        if users:
            raise PackInUse(f"{digest} answers for {', '.join(users[:5])}; activate another pack there first")
        if await self._records.call(self._records.store.delete_pack, tenant, digest):
            await self._cache.delete(digest)
            await asyncio.to_thread(self._files.remove, digest)


async def _to_its_end(task: asyncio.Future[_T]) -> _T:
    """Await a task that is not cancelled with its caller: the folder must not be removed under a thread or a child."""
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait([task])
        raise
