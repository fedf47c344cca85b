"""Before packs are mapped and kernels compiled every call is told to come again."""

from pathlib import Path

import pytest

from oracle_server.errors import Starting
from oracle_server.state.node import Node


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
