"""Profile packs over the wire: uploads arrive in pieces and are kept whole or not at all."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from grpc.aio import EOF  # type: ignore[attr-defined]

from oracle_server.errors import InvalidArgument, PackDigestMismatch
from oracle_server.rpc import pages, wire
from oracle_server.rpc.metrics import Metrics
from oracle_server.rpc.status import streaming, unary
from oracle_server.rpc.step_stream import Events
from oracle_server.state import names
from oracle_server.state.node import Node
from step_oracle.v1 import pack_pb2 as pb
from step_oracle.v1 import pack_pb2_grpc


class ProfilePackService(pack_pb2_grpc.ProfilePackServiceServicer):
    """Packs come and go. Event loop only."""

    def __init__(self, node: Node, metrics: Metrics, events: Events) -> None:
        self.node = node
        self.metrics = metrics
        self._events = events

    @unary
    async def UploadPack(
        self, request_iterator: AsyncIterator[pb.UploadPackRequest], context: Any
    ) -> pb.UploadPackResponse:
        """PACK_INVALID, PACK_DIGEST_MISMATCH, QUOTA_EXCEEDED, STORE_FAILED."""
        first = await context.read()
        if first is EOF or not first.HasField("begin"):
            raise InvalidArgument("the first message of an upload carries `begin`", field="begin")
        begin = first.begin
        tenant = names.parse_tenant(begin.parent, "begin.parent")
        await self.node.tenant(tenant)
        if begin.expected_digest:
            names.check_digest(begin.expected_digest, "begin.expected_digest")
        async with self.node.packs.upload(tenant, begin.manifest_json) as upload:
            if begin.expected_digest not in ("", upload.digest):
                raise PackDigestMismatch(
                    f"the manifest has the digest {upload.digest}, {begin.expected_digest} was expected",
                    where="manifest.json",
                )
            known = await self.node.packs.find(tenant, upload.digest)
            if known is not None:
                return pb.UploadPackResponse(pack=wire.write_pack(known), existed=True)
            while (message := await context.read()) is not EOF:
                if not message.HasField("chunk"):
                    raise InvalidArgument("`begin` belongs to the first message of an upload only", field="begin")
                await self.node.packs.write(upload, message.chunk.file, message.chunk.data)
            row, warnings, existed = await self.node.packs.keep(tenant, upload, check_only=begin.validate_only)
        if not begin.validate_only and not existed:
            self._events.info("uploaded", tenant=tenant, pack=row.digest, bytes=row.size_bytes)
        return pb.UploadPackResponse(pack=wire.write_pack(row), existed=existed, warnings=warnings)

    @unary
    async def ListPacks(self, request: pb.ListPacksRequest, context: Any) -> pb.ListPacksResponse:
        """Packs of a tenant in the order of their digests."""
        tenant = names.parse_tenant(request.parent, "parent")
        await self.node.tenant(tenant)
        rows = await self.node.packs.page(
            tenant, pages.key_of(request.page_token), pages.size_of(request.page_size) + 1
        )
        page = pages.fill(map(wire.write_pack, rows), request.page_size)
        token = pages.token_after(rows[len(page) - 1].digest) if len(page) < len(rows) else ""
        return pb.ListPacksResponse(packs=page, next_page_token=token)

    @unary
    async def GetPack(self, request: pb.GetPackRequest, context: Any) -> pb.GetPackResponse:
        """PACK_NOT_FOUND."""
        tenant, digest = names.parse_pack(request.name, "name")
        await self.node.tenant(tenant)
        return pb.GetPackResponse(pack=wire.write_pack(await self.node.packs.get(tenant, digest)))

    @streaming
    async def DownloadPack(
        self, request: pb.DownloadPackRequest, context: Any
    ) -> AsyncIterator[pb.DownloadPackResponse]:
        """The files of a pack, manifest first."""
        tenant, digest = names.parse_pack(request.name, "name")
        await self.node.tenant(tenant)
        async for name, data in self.node.packs.read(tenant, digest):
            yield pb.DownloadPackResponse(file=name, data=data)

    @unary
    async def DeletePack(self, request: pb.DeletePackRequest, context: Any) -> pb.DeletePackResponse:
        """PACK_NOT_FOUND, PACK_IN_USE."""
        tenant, digest = names.parse_pack(request.name, "name")
        await self.node.tenant(tenant)
        await self.node.packs.delete(tenant, digest)
        self._events.info("deleted", tenant=tenant, pack=digest)
        return pb.DeletePackResponse()
