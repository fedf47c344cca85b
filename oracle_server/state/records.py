"""The database as the event loop sees it: one thread for blocking calls; a change once begun runs to its end."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol, TypeVar

from oracle_server.errors import DatabaseUnavailable
from oracle_server.state.store import Store

_T = TypeVar("_T")

# A call of a shared database that takes longer is ended, with its connection: engines that wait for a change to end, to
# open their streams, have a budget of 10 s.
CALL_SECONDS = 4.0


class Turns(Protocol):
    """Other servers that change the same database."""

    def check(self) -> None:
        """DatabaseUnavailable where it is known that the database does not answer."""

    def interrupt(self) -> None:
        """End the connection under a call that takes too long."""

    def lost(self, why: str) -> None:
        """A call has found that the database does not answer."""

    async def begin(self) -> None:
        """Wait until nobody else changes anything; memory is then as the database is. DatabaseUnavailable."""

    async def end(self, *, made: bool) -> None:
        """Let the others change; `made`: the change is committed and in memory."""


class Records:
    """Owns the store and its thread. `changing` is held by whoever changes experiments, engines or packs in memory.

    Where several servers share the database, `turns` says whose turn it is to change it.
    """

    def __init__(self, store: Store) -> None:
        self.store = store
        self.changing = asyncio.Lock()
        self.turns: Turns | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="store")
        self._running: set[asyncio.Task[Any]] = set()

    async def call(self, function: Callable[..., _T], *arguments: object, always: bool = False) -> _T:
        """Run one of the store's methods on its thread.

        A shared database that is known to be down is not asked, unless `always`. DatabaseUnavailable.
        """
        turns = self.turns
        if turns is None:
            return await asyncio.get_running_loop().run_in_executor(self._thread, function, *arguments)
        if not always:
            turns.check()
        running = asyncio.get_running_loop().run_in_executor(self._thread, function, *arguments)
        done, _ = await asyncio.wait({running}, timeout=CALL_SECONDS)
        if not done:
            turns.interrupt()
        try:
            return await running
        except DatabaseUnavailable as error:
            turns.lost(error.message)
            raise

    async def change(self, change: Coroutine[Any, Any, _T], *, in_turn: bool = True) -> _T:
        """Run a change under the lock and to its end, even when the caller is cancelled.

        A client that hangs up between the commit and the flip of the snapshot would otherwise leave memory behind disk.
        Without `in_turn` other servers of the database may change it meanwhile.
        """
        run = self._locked(change) if self.turns is None or not in_turn else self._in_turn(self.turns, change)
        task = asyncio.create_task(run)
        self._running.add(task)
        task.add_done_callback(self._forget)
        return await asyncio.shield(task)

    async def close(self) -> None:
        """Let the changes under way end, then close the database."""
        if self._running:
            await asyncio.wait(self._running)
        await asyncio.get_running_loop().run_in_executor(self._thread, self.store.close)
        self._thread.shutdown()

    async def _in_turn(self, turns: Turns, change: Coroutine[Any, Any, _T]) -> _T:
        try:
            await turns.begin()
        except BaseException:
            change.close()
            raise
        made = False
        try:
            result = await self._locked(change)
            made = True
        finally:
            await turns.end(made=made)
        return result

    async def _locked(self, change: Coroutine[Any, Any, _T]) -> _T:
        async with self.changing:
            return await change

    def _forget(self, task: asyncio.Task[Any]) -> None:
        self._running.discard(task)
        if not task.cancelled():
            # Looked at here so that a failure whose caller has gone is not reported as forgotten.
            task.exception()
