"""The streams of all shards, as the parent keeps them: it decides who may open one, so an engine id has one stream."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field, fields

from oracle_server.errors import Draining, OracleError, Unavailable
from oracle_server.shards.calls import Peer, write_failure
from oracle_server.shards.messages import END_STREAM, CatchUp, CloseStream, EndStream, OpenedStream, OpenStream
from oracle_server.state import names
from oracle_server.state.engines import EngineCounts, EngineRecord
from oracle_server.state.node import Node

END_SECONDS = 5.0


class ShardStream:
    """Stands for a stream at a shard where the state wants an EngineStream."""

    def __init__(self, shard: Peer, key: int) -> None:
        self._shard = shard
        self._key = key
        self._ending: asyncio.Task[None] | None = None

    def announce(self, generation: int) -> None:
        """Nothing: its shard has, when it followed."""

    def end(self, error: OracleError) -> None:
        """End the stream with the error, soon."""
        # At the end of the server each shard ends its own.
        if self._ending is None and not isinstance(error, Draining):
            self._ending = asyncio.create_task(self._end(error))

    async def _end(self, error: OracleError) -> None:
        try:
            await self._shard.call(END_STREAM, EndStream(self._key, write_failure(error)), END_SECONDS)
        except OracleError:
            # The shard has ended, and its streams with it.
            pass


@dataclass(slots=True)
class _Open:
    record: EngineRecord
    stream: ShardStream
    # What of the stream's counts is in those of the engine.
    counted: EngineCounts = field(default_factory=EngineCounts)


class ShardStreams:
    """The open streams by process and key. Event loop only."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._shards: dict[int, Peer] = {}
        self._open: dict[tuple[int, int], _Open] = {}
        # Closed before they were open here: the shard gave up waiting for consent, and the two calls may cross.
        self._given_up: set[tuple[int, int]] = set()
        # Steps answered without a stream, by process and experiment, that are in those of the experiment.
        self._sampled: dict[tuple[int, str], int] = {}

    def add_shard(self, process: int, shard: Peer) -> None:
        """Let a process open streams."""
        self._shards[process] = shard

    async def drop_shard(self, process: int) -> None:
        """Close every stream of a process that has ended."""
        self._shards.pop(process, None)
        self._sampled = {key: steps for key, steps in self._sampled.items() if key[0] != process}
        for place in [place for place in self._open if place[0] == process]:
            await self._close(place, by_engine=False)
        self._given_up = {place for place in self._given_up if place[0] != process}

    async def find_experiment(self, name: str) -> None:
        """As Node.tenant and Node.look_for; what is found has reached the shards."""
        await self._node.tenant(names.parse_experiment(name, "experiment")[0])
        await self._node.look_for(name)
        if name in self._node.experiments.behind:
            self._node.experiments.find(name)

    async def catch_up(self, request: CatchUp) -> None:
        """As Node.catch_up."""
        await self._node.catch_up(self._node.experiments.find(request.experiment), request.generation)

    async def open(self, request: OpenStream) -> OpenedStream:
        """As Attachments.open_stream."""
        shard = self._shards.get(request.process)
        if shard is None:
            raise Unavailable("this process is no shard of the server; retry")
        await self._node.tenant_of(request.identity.experiment)
        stream = ShardStream(shard, request.key)
        live, record = await self._node.attachments.open_stream(
            request.identity, request.facts, request.incarnation, request.allowed, stream
        )
        place = (request.process, request.key)
        self._open[place] = _Open(record, stream)
        if request.process not in self._shards or place in self._given_up:
            self._given_up.discard(place)
            await self._close(place, by_engine=False)
            raise Unavailable("the shard has ended, or given up, meanwhile; retry")
        return OpenedStream(record.incarnation, live.snapshot.generation, record.accepted_digest)

    async def close(self, request: CloseStream) -> None:
        """As Attachments.close_stream; may be said more than once."""
        place = (request.process, request.key)
        if place not in self._open:
            self._given_up.add(place)
            return
        self.count(request.process, {request.key: request.counts})
        await self._close(place, by_engine=request.by_engine)

    def count(self, process: int, counts: Mapping[int, EngineCounts]) -> None:
        """Bring the engines' records up to date, given what they did since their streams opened."""
        for key, now in counts.items():
            opened = self._open.get((process, key))
            if opened is None:
                continue
            total, before = opened.record.counts, opened.counted
            for name in _COUNTS:
                setattr(total, name, getattr(total, name) + getattr(now, name) - getattr(before, name))
            padded = (*before.lateness_buckets, *[0] * (len(now.lateness_buckets) - len(before.lateness_buckets)))
            total.add_lateness([new - old for new, old in zip(now.lateness_buckets, padded, strict=True)])
            opened.counted = now

    def count_sampled(self, process: int, sampled: Mapping[str, int]) -> None:
        """Bring the experiments up to date, given the steps answered without a stream since the process started."""
        living = {live.name: live for live in self._node.experiments.all()}
        for name in sampled.keys() & living.keys():
            before = self._sampled.get((process, name), 0)
            # Fewer than before: deleted and created anew meanwhile.
            living[name].sampled_steps += sampled[name] - (before if before <= sampled[name] else 0)
            self._sampled[process, name] = sampled[name]

    async def _close(self, place: tuple[int, int], *, by_engine: bool) -> None:
        opened = self._open.pop(place, None)
        if opened is not None:
            await self._node.attachments.close_stream(opened.record, opened.stream, by_engine=by_engine)


# All but the buckets, which are added one by one.
_COUNTS = tuple(f.name for f in fields(EngineCounts) if f.name != "lateness_buckets")
