"""Tenants and their tokens over the wire."""

from __future__ import annotations

import secrets
from typing import Any

from oracle_server.errors import InvalidArgument
from oracle_server.rpc import pages, wire
from oracle_server.rpc.metrics import Metrics
from oracle_server.rpc.status import unary
from oracle_server.rpc.step_stream import Events
from oracle_server.state import names
from oracle_server.state.credentials import hash_of
from oracle_server.state.node import Node
from oracle_server.state.principal import CALLER
from step_oracle.v1 import tenant_pb2 as pb
from step_oracle.v1 import tenant_pb2_grpc

# So that a secret found in a log or a repository is known for what it is.
SECRET_PREFIX = "sto_"  # noqa: S105 - the beginning of each
_SECRET_BYTES = 32


class TenantService(tenant_pb2_grpc.TenantServiceServicer):
    """Who there is, what each may use, and who acts for it. Event loop only."""

    def __init__(self, node: Node, metrics: Metrics, events: Events) -> None:
        self.node = node
        self.metrics = metrics
        self._events = events

    @unary
    async def ListTenants(self, request: pb.ListTenantsRequest, context: Any) -> pb.ListTenantsResponse:
        """In the order of their names; a tenant sees itself."""
        size, after = pages.size_of(request.page_size), pages.key_of(request.page_token)
        own = CALLER.get().tenant
        self.node.check_ready()
        if own:
            rows = [await self.node.tenant(own)] if own > after else []
        else:
            rows = await self.node.tenants.page(after, size + 1)
        token = pages.token_after(rows[size - 1].tenant) if len(rows) > size else ""
        return pb.ListTenantsResponse(tenants=[wire.write_tenant(row) for row in rows[:size]], next_page_token=token)

    @unary
    async def GetTenant(self, request: pb.GetTenantRequest, context: Any) -> pb.GetTenantResponse:
        """One tenant; TENANT_NOT_FOUND."""
        row = await self.node.tenant(names.parse_tenant(request.name, "name"))
        return pb.GetTenantResponse(tenant=wire.write_tenant(row))

    @unary
    async def CreateTenant(self, request: pb.CreateTenantRequest, context: Any) -> pb.CreateTenantResponse:
        """TENANT_EXISTS, INVALID_ARGUMENT."""
        row = await self.node.tenants.create(wire.read_tenant(request.tenant_id, request.quota))
        self._say("tenant created", row.tenant)
        return pb.CreateTenantResponse(tenant=wire.write_tenant(row))

    @unary
    async def UpdateTenant(self, request: pb.UpdateTenantRequest, context: Any) -> pb.UpdateTenantResponse:
        """TENANT_NOT_FOUND, INVALID_ARGUMENT."""
        tenant = names.parse_tenant(request.name, "name")
        await self.node.tenant(tenant)
        row = await self.node.tenants.update(wire.read_tenant(tenant, request.quota))
        self._say("tenant updated", tenant)
        return pb.UpdateTenantResponse(tenant=wire.write_tenant(row))

    @unary
    async def DeleteTenant(self, request: pb.DeleteTenantRequest, context: Any) -> pb.DeleteTenantResponse:
        """TENANT_NOT_FOUND, TENANT_IN_USE."""
        tenant = names.parse_tenant(request.name, "name")
        await self.node.tenant(tenant)
        await self.node.tenants.delete(tenant)
        self._say("tenant deleted", tenant)
        return pb.DeleteTenantResponse()

    @unary
    async def IssueToken(self, request: pb.IssueTokenRequest, context: Any) -> pb.IssueTokenResponse:
        """TENANT_NOT_FOUND, QUOTA_EXCEEDED, INVALID_ARGUMENT."""
        tenant = names.parse_tenant(request.parent, "parent")
        await self.node.tenant(tenant)
        secret = SECRET_PREFIX + secrets.token_urlsafe(_SECRET_BYTES)
        scope = wire.read_scope(request.scope)
        row = await self.node.tenants.issue(tenant, scope, hash_of(secret), request.comment)
        self._say("token issued", tenant, token=names.token_name(tenant, row.number), scope=scope)
        return pb.IssueTokenResponse(token=wire.write_token(row), secret=secret)

    @unary
    async def ListTokens(self, request: pb.ListTokensRequest, context: Any) -> pb.ListTokensResponse:
        """Oldest first."""
        tenant = names.parse_tenant(request.parent, "parent")
        await self.node.tenant(tenant)
        size, key = pages.size_of(request.page_size), pages.key_of(request.page_token) or "0"
        if not (key.isdecimal() and len(key) < 19):
            raise InvalidArgument(
                "page_token is of another list; give next_page_token of the page before", field="page_token"
            )
        rows = await self.node.tenants.tokens(tenant, int(key), size + 1)
        token = pages.token_after(str(rows[size - 1].number)) if len(rows) > size else ""
        return pb.ListTokensResponse(tokens=[wire.write_token(row) for row in rows[:size]], next_page_token=token)

    @unary
    async def RevokeToken(self, request: pb.RevokeTokenRequest, context: Any) -> pb.RevokeTokenResponse:
        """TOKEN_NOT_FOUND."""
        tenant, number = names.parse_token(request.name, "name")
        await self.node.tenant(tenant)
        row = await self.node.tenants.revoke(tenant, number)
        self._say("token revoked", tenant, token=request.name)
        return pb.RevokeTokenResponse(token=wire.write_token(row))

    def _say(self, event: str, tenant: str, **values: str) -> None:
        self._events.info(event, tenant=tenant, by=CALLER.get().name, **values)
