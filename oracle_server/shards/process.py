"""One shard as its parent sees it: a process, the way to call it, what it last counted."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from contextlib import suppress

import msgspec

from oracle_server.shards.calls import Peer
from oracle_server.shards.messages import Report, ShardTask


class ShardProcess:
    """Owned by the pool; event loop only. The pipe to its standard input is its life line: it ends when that is cut."""

    def __init__(self, task: ShardTask) -> None:
        """Start it; it answers calls some time later."""
        self.shard = task.shard
        self.number = task.process
        self.peer = Peer(task.control)
        # True from its first connection to its end.
        self.serving = False
        self.addresses: tuple[str, ...] = ()
        self.report = Report({}, {})
        # subprocess spawns by vfork; uvloop's fork() would run gRPC's fork handlers beside its threads (grpcio 1.85).
        command = (sys.executable, "-m", "oracle_server.shards", msgspec.json.encode(task).decode())
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE)
        self._ended = asyncio.Event()
        loop = asyncio.get_running_loop()
        threading.Thread(target=self._wait, args=(loop,), name=f"shard-{task.shard}", daemon=True).start()

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    async def ended(self) -> int:
        """Wait for its end; the exit status, negative for a signal."""
        await self._ended.wait()
        return self._process.wait()

    def kill(self) -> None:
        """kill -9; nothing where it has ended."""
        self._process.kill()

    async def end(self, timeout_seconds: float) -> None:
        """Cut its life line and wait for its end."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        try:
            await asyncio.wait_for(self._ended.wait(), timeout_seconds)
        except TimeoutError:
            self.kill()
            await self._ended.wait()

    def _wait(self, loop: asyncio.AbstractEventLoop) -> None:
        self._process.wait()
        # The loop is closed where the parent ends first.
        with suppress(RuntimeError):
            loop.call_soon_threadsafe(self._ended.set)
