"""A server's state over a folder, with clocks that tests move."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from oracle_server.state.binding import Binding
from oracle_server.state.database_file import DatabaseFile
from oracle_server.state.node import Node
from postgres_server import PostgresServer, file_of
from stored_packs import store_pack


@dataclass
class Clock:
    """Seconds that pass when a test says so."""

    seconds: float = 1000.0

    def __call__(self) -> float:
        return self.seconds


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture(params=["sqlite", "postgres"])
async def node(request: pytest.FixtureRequest, tmp_path: Path, clock: Clock) -> AsyncIterator[Node]:
    """An empty server's state, ready: over a file, or over a PostgreSQL."""
    database = None
    if request.param == "postgres":
        server: PostgresServer = request.getfixturevalue("postgres")
        database = DatabaseFile(file_of(server.new_database(), tmp_path / "database"))
    opened = Node(tmp_path / "state", monotonic=clock, now_ns=lambda: int(clock() * 1e9), database=database)
    await opened.open()
    yield opened
    await opened.close()


@pytest.fixture
def add_pack(node: Node, tmp_path: Path) -> Callable[..., object]:
    """Builds a constant pack and stores it; awaits to its digest."""

    async def add(latency_ns: int = 10_000_000, **overrides: Any) -> str:
        return await store_pack(node, tmp_path / f"pack-{latency_ns}", latency_ns, **overrides)

    return add


@pytest.fixture
async def digest(node: Node, add_pack: Callable[..., object]) -> str:
    """A stored pack that the experiment `default` answers from."""
    stored = str(await add_pack())  # type: ignore[misc]
    await node.experiments.create("default", "default", Binding(default_pack_digest=stored))
    return stored
