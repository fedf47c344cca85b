"""A keeper of shards outlives whatever goes wrong with one."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from oracle_server.rpc.metrics import Metrics
from oracle_server.shards import pool
from oracle_server.shards.messages import ShardTask
from oracle_server.shards.pool import ShardPool


class Log:
    def __init__(self) -> None:
        self.ended: list[str] = []

    def info(self, event: str, **fields: Any) -> None:
        if event == "shard ended":
            self.ended.append(fields["why"])


def test_a_defect_costs_one_process_and_not_the_shard(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "DELAYS_SECONDS", (0.0,))

    async def run() -> None:
        log = Log()
        processes: list[int] = []
        enough = asyncio.Event()

        def task_of(shard: int, process: int) -> ShardTask:
            processes.append(process)
            if len(processes) == 3:
                enough.set()
            raise (OSError("no memory") if process == 2 else ValueError("a defect"))

        shards = ShardPool(1, task_of, log, Metrics())
        shards._healthy = True
        shards.start()
        await asyncio.wait((asyncio.create_task(enough.wait()), *shards._keepers), return_when="FIRST_COMPLETED")
        assert processes[:3] == [1, 2, 3]
        assert "ValueError" in log.ended[0]
        assert log.ended[1] == "it cannot be started: no memory"
        for keeper in shards._keepers:
            keeper.cancel()

    asyncio.run(run())
