"""An engine's id is free in the end, whatever becomes of the calls between a shard and its parent."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import pytest

from oracle_server.errors import EngineIdTaken, OracleError, Unavailable
from oracle_server.pack import EngineFacts
from oracle_server.shards import mirror
from oracle_server.shards.calls import Peer
from oracle_server.shards.messages import CloseStream, OpenedStream, OpenStream
from oracle_server.shards.mirror import MirroredExperiments, MirroredStreams
from oracle_server.shards.streams import ShardStreams
from oracle_server.state.engines import EngineCounts, EngineRecord, EngineStream
from oracle_server.state.identity import EngineIdentity
from oracle_server.state.node import Node

ENGINE = EngineIdentity("tenants/default/experiments/default", "e", {}, "", 0)
FACTS = EngineFacts()


class Parent:
    """Answers the calls of a shard with what it is told to."""

    def __init__(self, *answers: OpenedStream | OracleError | None) -> None:
        self.answers = list(answers)
        self.asked: list[object] = []

    async def call(self, method: object, request: object, timeout_seconds: float, *, wait: bool = False) -> object:
        self.asked.append(request)
        answer = self.answers.pop(0)
        if isinstance(answer, OracleError):
            raise answer
        return answer


class Stream:
    def announce(self, generation: int) -> None: ...

    def end(self, error: OracleError) -> None: ...


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mirror, "RETRY_SECONDS", (0.0,))


def streams_of(parent: Parent) -> MirroredStreams:
    return MirroredStreams(MirroredExperiments(), cast(Peer, parent), 3)


async def settle() -> None:
    """Let every task run as far as it can."""
    for _ in range(50):
        await asyncio.sleep(0)


def test_a_close_is_said_until_the_parent_has_heard_it() -> None:
    async def run() -> None:
        parent = Parent(Unavailable("paused"), Unavailable("paused"), None)
        streams, stream = streams_of(parent), cast(EngineStream, Stream())
        record = EngineRecord(ENGINE, FACTS, 1, "", frozenset(), since=0.0, stream=stream)
        streams._key_of[stream], streams._records[7] = 7, record
        await streams.close_stream(record, stream, by_engine=True)
        assert parent.asked == [CloseStream(3, 7, True, record.counts)] * 3

    asyncio.run(run())


def test_an_opening_without_an_answer_is_closed() -> None:
    async def run() -> None:
        parent = Parent(Unavailable("too late"), Unavailable("paused"), None)
        with pytest.raises(Unavailable, match="too late"):
            await streams_of(parent).open_stream(ENGINE, FACTS, 1, frozenset(), cast(EngineStream, Stream()))
        await settle()
        assert parent.asked[1:] == [CloseStream(3, 1, False, EngineCounts())] * 2

    asyncio.run(run())


def test_a_refused_opening_leaves_nothing_to_close() -> None:
    async def run() -> None:
        parent = Parent(EngineIdTaken("taken"))
        with pytest.raises(EngineIdTaken):
            await streams_of(parent).open_stream(ENGINE, FACTS, 1, frozenset(), cast(EngineStream, Stream()))
        await settle()
        assert len(parent.asked) == 1

    asyncio.run(run())


class Attachments:
    """Opens when it may."""

    def __init__(self) -> None:
        self.may_open = asyncio.Event()
        self.closed = 0

    async def open_stream(self, identity: Any, facts: Any, incarnation: int, allowed: Any, stream: Any) -> Any:
        await self.may_open.wait()

        class Live:
            class snapshot:  # noqa: N801 - an attribute
                generation = 1

        return Live, EngineRecord(identity, facts, incarnation, "", allowed, since=0.0, stream=stream)

    async def close_stream(self, record: Any, stream: Any, *, by_engine: bool) -> None:
        self.closed += 1


class FakeNode:
    def __init__(self) -> None:
        self.attachments = Attachments()

    async def tenant_of(self, name: str) -> None: ...


@pytest.mark.parametrize("order", ["before", "while", "after"])
def test_a_close_ends_the_stream_whenever_it_comes(order: str) -> None:
    async def run() -> None:
        node = FakeNode()
        streams = ShardStreams(cast(Node, node))
        streams.add_shard(3, cast(Peer, Parent()))
        close = CloseStream(3, 1, False, EngineCounts())
        if order == "before":
            await streams.close(close)
        opening = asyncio.create_task(streams.open(OpenStream(3, 1, ENGINE, FACTS, 1, frozenset())))
        await settle()
        if order == "while":
            await streams.close(close)
        node.attachments.may_open.set()
        (opened,) = await asyncio.gather(opening, return_exceptions=True)
        if order == "after":
            await streams.close(close)
        assert isinstance(opened, OpenedStream) == (order == "after")
        assert node.attachments.closed == 1
        await streams.close(close)
        assert node.attachments.closed == 1

    asyncio.run(run())


def test_what_was_given_up_is_forgotten_with_its_process() -> None:
    async def run() -> None:
        streams = ShardStreams(cast(Node, FakeNode()))
        streams.add_shard(3, cast(Peer, Parent()))
        await streams.close(CloseStream(3, 1, False, EngineCounts()))
        await streams.drop_shard(3)
        assert not streams._given_up

    asyncio.run(run())
