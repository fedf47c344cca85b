"""Tenants, read only: one exists from the start."""

from __future__ import annotations

from typing import Any

from oracle_server.rpc import pages, wire
from oracle_server.rpc.metrics import Metrics
from oracle_server.rpc.status import unary
from oracle_server.state import names
from oracle_server.state.node import Node
from step_oracle.v1 import tenant_pb2 as pb
from step_oracle.v1 import tenant_pb2_grpc


class TenantService(tenant_pb2_grpc.TenantServiceServicer):
    """Who there is."""

    def __init__(self, node: Node, metrics: Metrics) -> None:
        self.node = node
        self.metrics = metrics

    @unary
    async def ListTenants(self, request: pb.ListTenantsRequest, context: Any) -> pb.ListTenantsResponse:
        """In the order of their names."""
        size = pages.size_of(request.page_size)
        rows = await self.node.tenants(pages.key_of(request.page_token), size + 1)
        token = pages.token_after(rows[size - 1].tenant) if len(rows) > size else ""
        return pb.ListTenantsResponse(tenants=[wire.write_tenant(row) for row in rows[:size]], next_page_token=token)

    @unary
    async def GetTenant(self, request: pb.GetTenantRequest, context: Any) -> pb.GetTenantResponse:
        """One tenant; TENANT_NOT_FOUND."""
        row = await self.node.tenant(names.parse_tenant(request.name, "name"))
        return pb.GetTenantResponse(tenant=wire.write_tenant(row))
