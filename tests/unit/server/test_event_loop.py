"""Messages of many engines gather; a lone one waits for nobody; no event is lost."""

from __future__ import annotations

import asyncio
import socket
import sys
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import grpc
import pytest
import uvloop

from oracle_server.event_loop import (
    BUSY_SHARE,
    CALM_SHARE,
    ENOUGH_EVENTS,
    LOOK_SECONDS,
    PERIOD_SECONDS,
    REST_SECONDS,
    SWITCH_INTERVAL_SECONDS,
    Gathering,
    GatheringLoop,
    is_grpc_reader,
    run,
    without_event_engine,
)


class Events:
    """Stands for grpc: a byte per event, a clock that moves while the loop sleeps, events that come meanwhile."""

    def __init__(self) -> None:
        self.receiver, self.sender = socket.socketpair()
        self.receiver.setblocking(False)
        self.seconds = 0.0
        self.slept: list[float] = []
        self.arriving = 0
        self.turns = 0
        # Of a core, used until now; as much of it from now on.
        self.used, self.share = 0.0, 1.0
        self.gathering = Gathering(self.receiver, self._read, lambda: self.seconds, self._sleep, lambda: self.used)
        self.turn(after=LOOK_SECONDS, waiting=0)

    def turn(self, *, after: float, waiting: int = 1, arriving: int = 0) -> None:
        """A turn `after` seconds; `waiting` events are there, `arriving` come if it sleeps."""
        self._pass(after)
        self.sender.send(bytes(waiting))
        self.arriving = arriving
        self.gathering()

    def left(self) -> int:
        """Bytes nobody has read."""
        try:
            return len(self.receiver.recv(1 << 16))
        except BlockingIOError:
            return 0

    def _read(self) -> None:
        # As grpc does: one byte, and then every event there is.
        assert len(self.receiver.recv(1)) == 1
        self.turns += 1

    def _sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self._pass(seconds)
        self.sender.send(bytes(self.arriving))

    def _pass(self, seconds: float) -> None:
        self.seconds += seconds
        self.used += self.share * seconds


@pytest.fixture
def events() -> Iterator[Events]:
    made = Events()
    yield made
    made.receiver.close()
    made.sender.close()


def sleeps(events: Events, share: float) -> int:
    """Sleeps of a stretch in which the process uses this share of a core, and of one as long after it."""
    events.share = share
    events.turn(after=LOOK_SECONDS)
    before = len(events.slept)
    for _ in range(10):
        events.turn(after=PERIOD_SECONDS / 4, arriving=ENOUGH_EVENTS)
    return len(events.slept) - before


def test_where_there_is_cpu_to_spare_nobody_waits(events: Events) -> None:
    assert sleeps(events, BUSY_SHARE + 0.01) == 10
    # What gathering saves does not end it.
    assert sleeps(events, CALM_SHARE + 0.01) == 10
    assert sleeps(events, CALM_SHARE - 0.01) == 0
    assert sleeps(events, BUSY_SHARE - 0.01) == 0
    assert sleeps(events, BUSY_SHARE + 0.01) == 10


def test_a_turn_after_a_pause_begins_at_once(events: Events) -> None:
    for _ in range(3):
        events.turn(after=PERIOD_SECONDS)
    assert (events.slept, events.turns) == ([], 3)


def test_a_turn_that_comes_soon_waits_for_the_others(events: Events) -> None:
    events.turn(after=1.0)
    events.turn(after=PERIOD_SECONDS / 4, arriving=ENOUGH_EVENTS)
    assert events.slept == [pytest.approx(PERIOD_SECONDS * 3 / 4)]
    # One turn took them all.
    assert (events.turns, events.left()) == (2, 0)


def test_turns_of_a_busy_fleet_begin_a_period_apart(events: Events) -> None:
    events.turn(after=1.0)
    begun = []
    for _ in range(20):
        events.turn(after=PERIOD_SECONDS / 3, arriving=ENOUGH_EVENTS)
        begun.append(events.seconds)
    assert [b - a for a, b in pairwise(begun)] == [pytest.approx(PERIOD_SECONDS)] * 19


def test_where_waiting_brings_nobody_the_loop_does_without_for_a_while(events: Events) -> None:
    events.turn(after=1.0)
    events.turn(after=PERIOD_SECONDS / 4)
    turns = int(REST_SECONDS / (PERIOD_SECONDS / 4)) - 1
    for _ in range(turns):
        events.turn(after=PERIOD_SECONDS / 4)
    assert len(events.slept) == 1
    events.turn(after=PERIOD_SECONDS / 4)
    events.turn(after=PERIOD_SECONDS / 4)
    assert len(events.slept) == 2


def test_a_sparse_moment_of_a_busy_fleet_does_not_end_the_waiting(events: Events) -> None:
    events.turn(after=1.0)
    for _ in range(20):
        events.turn(after=PERIOD_SECONDS / 4, arriving=2 * ENOUGH_EVENTS)
    events.turn(after=PERIOD_SECONDS / 4)
    events.turn(after=PERIOD_SECONDS / 4)
    assert len(events.slept) == 22


def test_two_engines_that_wait_for_their_answers_are_kept_waiting_once(events: Events) -> None:
    """Their sends are over and their next messages there: four events."""
    events.turn(after=1.0)
    for _ in range(5):
        events.turn(after=PERIOD_SECONDS / 8, waiting=2, arriving=2)
    assert len(events.slept) == 1


def test_a_fleet_that_never_lets_the_loop_idle_is_never_kept_waiting(events: Events) -> None:
    for _ in range(10):
        events.turn(after=2 * PERIOD_SECONDS, waiting=64)
    assert (events.slept, events.turns, events.left()) == ([], 10, 0)


def test_more_events_than_one_turn_counts_are_left_for_the_next(events: Events) -> None:
    events.sender.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
    events.turn(after=1.0, waiting=5000)
    events.turn(after=1.0, waiting=0)
    assert (events.turns, events.left()) == (2, 0)


def test_a_turn_for_which_nothing_is_there_reads_nothing(events: Events) -> None:
    events.turn(after=1.0, waiting=0)
    assert events.turns == 0


def test_grpcs_reader_is_the_one_that_gathers(tmp_path: Path) -> None:
    """An upgrade of grpc that hands its events over in another way fails here."""
    readers: list[Callable[..., object]] = []

    class Loop(GatheringLoop):
        def add_reader(  # type: ignore[override]
            self, fd: Any, callback: Callable[..., object], *args: Any
        ) -> None:
            readers.append(callback)
            super().add_reader(fd, callback, *args)

    async def serve() -> None:
        grpc.aio.server()

    uvloop.run(serve(), loop_factory=Loop)
    assert [is_grpc_reader(reader) for reader in readers] == [True]


def test_every_message_of_many_streams_is_answered(tmp_path: Path) -> None:
    """Real streams over the loop, each with one message in flight, all at once."""
    streams, messages = 40, 25

    async def echo(request: Any, context: Any) -> None:
        while (message := await context.read()) is not grpc.aio.EOF:  # type: ignore[attr-defined]
            await context.write(message)

    async def ask(channel: Any, number: int) -> list[bytes]:
        call = channel.stream_stream("/echo/Echo")()
        answers = []
        for i in range(messages):
            await call.write(b"%d %d" % (number, i))
            answers.append(await call.read())
        await call.done_writing()
        assert await call.code() == grpc.StatusCode.OK
        return answers

    async def run() -> None:
        server = grpc.aio.server()
        handler = grpc.stream_stream_rpc_method_handler(echo)
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("echo", {"Echo": handler}),))
        address = f"unix:{tmp_path}/s"
        server.add_insecure_port(address)
        await server.start()
        async with asyncio.timeout(60), grpc.aio.insecure_channel(address) as channel:
            answers = await asyncio.gather(*(ask(channel, number) for number in range(streams)))
        await server.stop(1)
        assert answers == [[b"%d %d" % (number, i) for i in range(messages)] for number in range(streams)]

    uvloop.run(run(), loop_factory=GatheringLoop)


def test_threads_wait_half_a_millisecond_for_python() -> None:
    async def interval() -> float:
        assert isinstance(asyncio.get_running_loop(), GatheringLoop)
        return sys.getswitchinterval()

    before = sys.getswitchinterval()
    try:
        assert run(interval()) == pytest.approx(SWITCH_INTERVAL_SECONDS)
    finally:
        sys.setswitchinterval(before)


def test_whoever_has_set_grpcs_experiments_keeps_them() -> None:
    mine = {"GRPC_EXPERIMENTS": "event_engine_listener"}
    without_event_engine(mine)
    assert mine == {"GRPC_EXPERIMENTS": "event_engine_listener"}
