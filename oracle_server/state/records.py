"""The database as the event loop sees it: one thread for blocking calls; a change once begun runs to its end."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from oracle_server.state.store import Store

_T = TypeVar("_T")


class Records:
    """Owns the store and its thread. `changing` is held by whoever changes experiments, engines or packs."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.changing = asyncio.Lock()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="store")
        self._running: set[asyncio.Task[Any]] = set()

    async def call(self, function: Callable[..., _T], *arguments: object) -> _T:
        """Run one of the store's methods on its thread."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, function, *arguments)

    async def change(self, change: Coroutine[Any, Any, _T]) -> _T:
        """Run a change under the lock and to its end, even when the caller is cancelled.

        A client that hangs up between the commit and the flip of the snapshot would otherwise leave memory behind disk.
        """
        task = asyncio.create_task(self._locked(change))
        self._running.add(task)
        task.add_done_callback(self._forget)
        return await asyncio.shield(task)

    async def close(self) -> None:
        """Let the changes under way end, then close the database."""
        if self._running:
            await asyncio.wait(self._running)
        await self.call(self.store.close)
        self._thread.shutdown()

    async def _locked(self, change: Coroutine[Any, Any, _T]) -> _T:
        async with self.changing:
            return await change

    def _forget(self, task: asyncio.Task[Any]) -> None:
        self._running.discard(task)
        if not task.cancelled():
            # Looked at here so that a failure whose caller has gone is not reported as forgotten.
            task.exception()
