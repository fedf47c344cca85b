"""All shards: starts them, keeps them alive and lets none answer from an older generation than was acknowledged.

A change reaches them in two steps. `prepare`: each maps the packs and says so, before anything is written. `follow`,
once the change is on disk and under the lock of all changes: each flips and says so. Streams open under the same lock,
so an engine that moves from shard to shard finds its generation, or a newer one, at each. A shard that does not answer
in time is killed before the change is acknowledged; the one in its place begins with everything as it is then.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import count
from typing import Any

from oracle_server.errors import OracleError, StoreFailed, Unavailable
from oracle_server.rpc.metrics import PRESENT, Metrics
from oracle_server.rpc.status import internal
from oracle_server.rpc.step_stream import Events
from oracle_server.shards.counts import add_counts, counts_of
from oracle_server.shards.messages import (
    ADMIT,
    COMPARISONS,
    COUNT,
    DRAIN,
    FOLLOW,
    FORGET,
    PREPARE,
    SERVE,
    SET_HEALTHY,
    Report,
    Serve,
    ShardTask,
)
from oracle_server.shards.process import ShardProcess
from oracle_server.shards.streams import ShardStreams
from oracle_server.state.credentials import Admission
from oracle_server.state.node import Node
from oracle_server.state.shadow import Comparison
from oracle_server.state.store import ExperimentRow

# The first Prepare compiles the kernels where numba's cache is empty.
JOIN_SECONDS = 120.0
PREPARE_SECONDS = 10.0
FOLLOW_SECONDS = 5.0
COUNT_SECONDS = 2.0
# How often a shard is asked for its counts, and how many questions it may leave unanswered: a shard that hangs is
# replaced within 8 s, before the engines' budgets (10 s) are spent. One that is only busy answers sooner: an engine has
# a step or two under way, so what waits at a shard is short.
WATCH_SECONDS = 1.5
MISSES = 3
END_SECONDS = 3.0
REASON_SECONDS = 0.2
# A shard that lived shorter is started again with growing delay.
STEADY_SECONDS = 5.0
DELAYS_SECONDS = (0.0, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)


class ShardPool:
    """Owns the shards; the Followers of a Node. Event loop only."""

    # Given by `join`, before any shard is let in.
    _node: Node
    _streams: ShardStreams

    def __init__(self, number: int, task_of: Callable[[int, int], ShardTask], events: Events, metrics: Metrics) -> None:
        self._number = number
        self._task_of = task_of
        self._events = events
        self._metrics = metrics
        self._processes = count(1)
        self._shards: dict[int, ShardProcess] = {}
        self._keepers: list[asyncio.Task[None]] = []
        self._may_join = asyncio.Event()
        self._joined = asyncio.Event()
        self._healthy = False
        self._draining = asyncio.Event()
        self._retired = Metrics()

    def start(self) -> None:
        """Start the processes; they are ready for `join` while the node opens."""
        self._keepers = [asyncio.create_task(self._keep(shard)) for shard in range(self._number)]

    async def join(self, node: Node, streams: ShardStreams) -> tuple[str, ...]:
        """Let all take connections; their addresses. StoreFailed where one cannot."""
        self._node, self._streams = node, streams
        self._may_join.set()
        while len(serving := self._serving()) < self._number:
            joined = asyncio.create_task(self._joined.wait())
            await asyncio.wait((joined, *self._keepers), return_when=asyncio.FIRST_COMPLETED)
            joined.cancel()
            self._joined.clear()
            for keeper in self._keepers:
                if keeper.done():
                    keeper.result()
        self._healthy = True
        await asyncio.gather(*(self._tell(shard, SET_HEALTHY, None) for shard in serving))
        return tuple(dict.fromkeys(address for shard in serving for address in shard.addresses))

    async def drain(self, drain_seconds: float) -> None:
        """End the shards: no new calls, streams told, calls under way finished."""
        self._draining.set()
        await asyncio.gather(*(self._drain(shard, drain_seconds) for shard in self._shards.values()))
        for keeper in self._keepers:
            keeper.cancel()
        await asyncio.gather(*self._keepers, return_exceptions=True)

    def add_to(self, total: Metrics) -> None:
        """Add the counts of the shards as of the last `count`, those that have ended included."""
        add_counts(total, counts_of(self._retired))
        for shard in self._shards.values():
            add_counts(total, shard.report.metrics)

    # Followers

    async def prepare(self, digests: Sequence[str]) -> None:
        """As Followers.prepare; a shard that does not answer is no reason to refuse."""

        async def ask(shard: ShardProcess) -> None:
            with suppress(Unavailable):
                await shard.peer.call(PREPARE, tuple(digests), PREPARE_SECONDS)

        await asyncio.gather(*(ask(shard) for shard in self._serving()))

    async def follow(self, row: ExperimentRow) -> None:
        """As Followers.follow."""
        await asyncio.gather(*(self._tell(shard, FOLLOW, row) for shard in self._serving()))

    async def forget(self, name: str) -> None:
        """As Followers.forget."""
        await asyncio.gather(*(self._tell(shard, FORGET, name) for shard in self._serving()))

    async def count(self) -> None:
        """As Followers.count, and the shards' own counts with it."""
        await asyncio.gather(*(self._count(shard) for shard in self._serving()))

    async def admit(self, admission: Admission) -> None:
        """As Followers.admit."""
        await asyncio.gather(*(self._tell(shard, ADMIT, admission) for shard in self._serving()))

    async def comparisons(self, name: str) -> list[list[Comparison]]:
        """As Followers.comparisons; Unavailable where a shard does not answer: half would look like the whole."""
        return list(
            await asyncio.gather(
                *(shard.peer.call(COMPARISONS, name, COUNT_SECONDS) for shard in self._serving()),
            )
        )

    # Below: one shard

    def _serving(self) -> list[ShardProcess]:
        return [self._shards[shard] for shard in sorted(self._shards) if self._shards[shard].serving]

    async def _keep(self, shard: int) -> None:
        """Start a shard again each time it ends; before the server is ready its end is an error."""
        loop = asyncio.get_running_loop()
        quick = 0
        while not self._draining.is_set():
            began = loop.time()
            pid, why = await self._live(shard)
            if self._draining.is_set():
                return
            if not self._healthy:
                raise StoreFailed(f"shard {shard} ended before it was ready: {why}")
            self._metrics.shard_restarts += 1
            self._events.info("shard ended", shard=shard, pid=pid, why=why)
            quick = quick + 1 if loop.time() - began < STEADY_SECONDS else 0
            await asyncio.sleep(DELAYS_SECONDS[min(quick, len(DELAYS_SECONDS) - 1)])

    async def _live(self, shard: int) -> tuple[int, str]:
        """From the start of a shard's process to its end: its id, and why it ended. Whatever fails, it is no more."""
        pid = 0
        try:
            process = self._shards[shard] = ShardProcess(self._task_of(shard, next(self._processes)))
            pid = process.pid
            try:
                return pid, await self._run(process)
            finally:
                process.kill()
                await self._bury(process)
        except OSError as error:
            return pid, f"it cannot be started: {error}"
        except Exception as error:  # noqa: BLE001 - its keeper goes on: nobody else would start the shard again
            return pid, internal(f"shard {shard}", error).message

    async def _run(self, process: ShardProcess) -> str:
        """Why a shard has ended, once it has."""
        ending = asyncio.create_task(process.ended())
        joining = asyncio.create_task(self._join_and_watch(process))
        try:
            await asyncio.wait((ending, joining), return_when=asyncio.FIRST_COMPLETED)
            if not ending.done() and joining.exception() is not None:
                process.kill()
            status = await ending
            # Where it was killed for it, the reason is about to come.
            await asyncio.wait((joining,), timeout=REASON_SECONDS)
            error = joining.exception() if joining.done() else None
            return f"its exit status is {status}" + (f": {error}" if error else "")
        finally:
            joining.cancel()
            ending.cancel()

    async def _join_and_watch(self, process: ShardProcess) -> None:
        await self._join(process)
        await self._watch(process)

    async def _watch(self, process: ShardProcess) -> None:
        """Ask a shard for its counts now and then; Unavailable where it answers no more."""
        misses = 0
        while not self._draining.is_set():
            try:
                await self._ask_counts(process, wait=True)
            except OracleError as error:
                misses += 1
                if misses == MISSES:
                    raise Unavailable(f"it hangs: {MISSES} questions in turn had no answer ({error})") from error
            else:
                misses = 0
                await asyncio.sleep(WATCH_SECONDS)

    async def _join(self, process: ShardProcess) -> None:
        """Bring a shard to the present state and let it take connections."""
        await self._may_join.wait()
        digests = {digest for live in self._node.experiments.all() for digest in live.snapshot.packs}
        # Before the lock is taken: streams open and engines attach at the other shards meanwhile.
        await process.peer.call(PREPARE, tuple(sorted(digests)), JOIN_SECONDS, wait=True)
        await self._node.experiments.join(lambda rows: self._let_serve(process, rows))
        self._events.info("shard ready", shard=process.shard, pid=process.pid, listen=list(process.addresses))
        self._joined.set()

    async def _let_serve(self, process: ShardProcess, rows: list[ExperimentRow]) -> None:
        try:
            for row in rows:
                await process.peer.call(FOLLOW, row, FOLLOW_SECONDS)
            await process.peer.call(ADMIT, self._node.tenants.admission(), FOLLOW_SECONDS)
            self._streams.add_shard(process.number, process.peer)
            serving = await process.peer.call(SERVE, Serve(self._healthy), FOLLOW_SECONDS)
        except OracleError:
            # It may take connections already: it must not outlive the lock of all changes.
            process.kill()
            await process.ended()
            raise
        process.addresses, process.serving = serving.addresses, True

    async def _tell(self, shard: ShardProcess, method: Any, value: object) -> None:
        try:
            await shard.peer.call(method, value, FOLLOW_SECONDS)
        except OracleError as error:
            self._events.info("shard killed", shard=shard.shard, pid=shard.pid, why=error.message)
            shard.serving = False
            shard.kill()
            await shard.ended()

    async def _count(self, shard: ShardProcess) -> None:
        with suppress(OracleError):
            await self._ask_counts(shard)

    async def _ask_counts(self, shard: ShardProcess, *, wait: bool = False) -> None:
        report = await shard.peer.call(COUNT, None, COUNT_SECONDS, wait=wait)
        shard.report = report
        self._streams.count(shard.number, report.streams)
        self._streams.count_sampled(shard.number, report.sampled)

    async def _drain(self, shard: ShardProcess, drain_seconds: float) -> None:
        if shard.serving:
            with suppress(OracleError):
                shard.report = await shard.peer.call(DRAIN, drain_seconds, drain_seconds + END_SECONDS)
        await shard.end(END_SECONDS)

    async def _bury(self, process: ShardProcess) -> None:
        """What a process leaves: its streams are closed, its counts kept."""
        process.serving = False
        add_counts(self._retired, {**process.report.metrics, **dict.fromkeys(PRESENT, 0)})
        process.report = Report({}, {})
        if self._may_join.is_set():
            await self._streams.drop_shard(process.number)
        await process.peer.close()
