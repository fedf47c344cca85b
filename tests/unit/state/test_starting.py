"""Before packs are mapped and kernels compiled every call is told to come again."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from oracle_server.errors import Starting
from oracle_server.rpc.tenant_service import TenantService
from oracle_server.state.node import Node
from step_oracle.v1 import tenant_pb2 as pb


async def test_a_node_that_is_not_open_answers_no_tenant(tmp_path: Path) -> None:
    node = Node(tmp_path / "state")
    try:
        with pytest.raises(Starting, match="retry"):
            await node.tenant("default")
        with pytest.raises(Starting, match="retry"):
            await node.tenant_of("tenants/default/experiments/default")
        await node.open()
        assert await node.tenant("default") is not None
    finally:
        await node.close()


async def test_a_node_that_is_not_open_lists_no_tenants(tmp_path: Path) -> None:
    """It did: who waited for the list waited for nothing."""
    node = Node(tmp_path / "state")
    service: Any = SimpleNamespace(node=node)
    list_tenants: Any = TenantService.ListTenants.__wrapped__  # type: ignore[attr-defined]
    try:
        with pytest.raises(Starting, match="retry"):
            await list_tenants(service, pb.ListTenantsRequest(), None)
        await node.open()
        listed = await list_tenants(service, pb.ListTenantsRequest(), None)
        assert [tenant.name for tenant in listed.tenants] == ["tenants/default"]
    finally:
        await node.close()
