"""Packs in a server's state, without a server around it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from builders import build_constant_pack
from oracle_server.state.node import Node


async def store_pack(node: Node, directory: Path, latency_ns: int, **overrides: Any) -> str:
    """Build a constant pack in a folder and store it; its digest."""
    build_constant_pack(directory, latency_ns=latency_ns, **overrides)
    async with node.packs.upload("default", (directory / "manifest.json").read_bytes()) as upload:
        for entry in upload.manifest.files:
            await node.packs.write(upload, entry.name, (directory / entry.name).read_bytes())
        row, _, _ = await node.packs.keep("default", upload, check_only=False)
    return row.digest
