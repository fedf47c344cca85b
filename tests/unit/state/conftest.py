"""A server's state over a folder, with clocks that tests move."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from builders import build_constant_pack
from oracle_server.state.binding import Binding
from oracle_server.state.node import Node


@dataclass
class Clock:
    """Seconds that pass when a test says so."""

    seconds: float = 1000.0

    def __call__(self) -> float:
        return self.seconds


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
async def node(tmp_path: Path, clock: Clock) -> AsyncIterator[Node]:
    """An empty server's state, ready."""
    opened = Node(tmp_path / "state", monotonic=clock, now_ns=lambda: int(clock() * 1e9))
    await opened.open()
    yield opened
    await opened.close()


@pytest.fixture
def add_pack(node: Node, tmp_path: Path) -> Callable[..., object]:
    """Builds a constant pack and stores it; awaits to its digest."""

    async def add(latency_ns: int = 10_000_000, **overrides: Any) -> str:
        directory = tmp_path / f"pack-{latency_ns}"
        build_constant_pack(directory, latency_ns=latency_ns, **overrides)
        manifest_json = (directory / "manifest.json").read_bytes()
        async with node.packs.upload("default", manifest_json) as upload:
            for entry in upload.manifest.files:
                await node.packs.write(upload, entry.name, (directory / entry.name).read_bytes())
            row, _, _ = await node.packs.keep("default", upload, check_only=False)
        return row.digest

    return add


@pytest.fixture
async def digest(node: Node, add_pack: Callable[..., object]) -> str:
    """A stored pack that the experiment `default` answers from."""
    stored = str(await add_pack())  # type: ignore[misc]
    await node.experiments.create("default", "default", Binding(default_pack_digest=stored))
    return stored
