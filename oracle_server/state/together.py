"""The shards of a server and the other servers of its fleet, as one."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from oracle_server.state.credentials import Admission
from oracle_server.state.experiments import Followers
from oracle_server.state.shadow import Comparison
from oracle_server.state.store import ExperimentRow


class Together:
    """Followers of both kinds. Event loop only."""

    def __init__(self, own: Followers, others: Followers) -> None:
        self._all: tuple[Followers, ...] = (own, others)

    async def prepare(self, digests: Sequence[str]) -> None:
        """As each."""
        await asyncio.gather(*(followers.prepare(digests) for followers in self._all))

    async def follow(self, row: ExperimentRow) -> None:
        """As each."""
        await asyncio.gather(*(followers.follow(row) for followers in self._all))

    async def forget(self, name: str) -> None:
        """As each."""
        await asyncio.gather(*(followers.forget(name) for followers in self._all))

    async def count(self) -> None:
        """As each."""
        await asyncio.gather(*(followers.count() for followers in self._all))

    async def admit(self, admission: Admission) -> None:
        """As each."""
        await asyncio.gather(*(followers.admit(admission) for followers in self._all))

    async def comparisons(self, name: str) -> Sequence[Sequence[Comparison]]:
        """Of all."""
        found = await asyncio.gather(*(followers.comparisons(name) for followers in self._all))
        return [comparisons for part in found for comparisons in part]
