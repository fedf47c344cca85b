"""How a process that answers steps runs: one event loop that lets the messages of many engines gather.

grpc.aio (1.85) hands its events, two per message, from a thread of its own to the loop through a socket, one byte each,
and reads one byte a turn. Where engines are paced and not in phase, each message finds the loop asleep, and waking it
up costs more than answering. So where the process uses most of a core (BUSY_SHARE) a turn that comes soon after the
one before first sleeps until PERIOD_SECONDS have passed since that one began, and takes all that came meanwhile. Where
there is CPU to spare nobody waits, and whoever comes alone does not either: a turn after a pause begins at once, and
where waits bring too little together (one or two engines that ask as fast as they are answered) the loop does without
for REST_SECONDS.
"""

from __future__ import annotations

import functools
import socket
import sys
import time
from collections.abc import Callable, Coroutine, MutableMapping
from typing import Any, TypeVar

import uvloop

_T = TypeVar("_T")

# What a message waits at most. Long enough for ten of 100 engines with 50 steps/s, short enough for any step an engine
# holds: its shim has the latency of the whole step to hear of it.
PERIOD_SECONDS = 0.002
REST_SECONDS = 0.1
# Share of a core above which messages gather, and below which they do not any more (gathering lowers it), of stretches
# of so many seconds.
BUSY_SHARE = 0.7
CALM_SHARE = 0.35
LOOK_SECONDS = 0.1
# What waits have to bring together on average: more than the events of two engines that wait for their answers.
ENOUGH_EVENTS = 5
# A busy fleet's sparse moment does not end the waiting: so many events are remembered.
_CREDIT = 40
_MOST_EVENTS = 4096
# gRPC's event engine passes each message through three threads of a pool of its own before the thread that hands it to
# the loop gets it. Without it that thread reads the sockets itself.
GRPC_EXPERIMENTS = "-event_engine_client,-event_engine_listener"
# A thread that wants to run Python (the store's, one that maps a pack) waits for a busy loop this long at each of its
# pieces; Python's own 5 ms would add up over a change.
SWITCH_INTERVAL_SECONDS = 0.0005


def without_event_engine(environ: MutableMapping[str, str]) -> None:
    """Turn gRPC's event engine off in this process, where grpc has not been imported yet, and in its children.

    Whoever has set GRPC_EXPERIMENTS has a reason.
    """
    environ.setdefault("GRPC_EXPERIMENTS", GRPC_EXPERIMENTS)


def run(main: Coroutine[Any, Any, _T]) -> _T:
    """Run `main` to its end on a loop for steps."""
    sys.setswitchinterval(SWITCH_INTERVAL_SECONDS)
    return uvloop.run(main, loop_factory=GatheringLoop)


class GatheringLoop(uvloop.Loop):
    """uvloop, but for the one reader through which grpc.aio hands over its events."""

    def add_reader(  # type: ignore[override]  # typeshed's *args are a TypeVarTuple
        self, fd: Any, callback: Callable[..., object], *args: Any
    ) -> None:
        """As every loop's."""
        if isinstance(fd, socket.socket) and is_grpc_reader(callback):
            callback, args = Gathering(fd, functools.partial(callback, *args)), ()
        super().add_reader(fd, callback, *args)


class Gathering:
    """Calls grpc's reader, at most once a period while many events come. Owned by the loop, called in its turns.

    `monotonic` and `cpu`, the process's CPU time, in seconds; `sleep` blocks, for seconds.
    """

    def __init__(
        self,
        events: socket.socket,
        read: Callable[[], object],
        monotonic: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], object] = time.sleep,
        cpu: Callable[[], float] = time.process_time,
    ) -> None:
        self._events = events
        self._read = read
        self._monotonic = monotonic
        self._sleep = sleep
        self._cpu = cpu
        self._is_busy = False
        # When the share of a core was looked at last, and what had been used by then.
        self._looked = monotonic(), cpu()
        self._buffer = bytearray(_MOST_EVENTS)
        self._begun = self._rest_until = float("-inf")
        # Events that waits have brought beyond what they had to.
        self._credit = 0

    def __call__(self) -> None:
        """One turn."""
        now = self._monotonic()
        if now - self._looked[0] >= LOOK_SECONDS:
            self._look(now)
        wait = self._begun + PERIOD_SECONDS - now
        waits = self._is_busy and wait > 0.0 and now >= self._rest_until
        if waits:
            self._sleep(wait)
            now = self._monotonic()
        self._begun = now
        events = self._take()
        if waits:
            self._credit = min(_CREDIT, self._credit + events - ENOUGH_EVENTS)
            if self._credit < 0:
                self._credit = 0
                self._rest_until = now + REST_SECONDS
        if events:
            self._read()

    def _look(self, now: float) -> None:
        """How much of a core the process has used since the last look."""
        (seconds, before), used = self._looked, self._cpu()
        share = (used - before) / (now - seconds)
        self._is_busy = share > (CALM_SHARE if self._is_busy else BUSY_SHARE)
        self._looked = now, used

    def _take(self) -> int:
        """How many events wait to be read; all but one byte are taken.

        The reader takes that one and then every event there is. The other bytes would be turns with nothing to do.
        """
        try:
            events = self._events.recv_into(self._buffer, 0, socket.MSG_PEEK)
            return self._events.recv_into(self._buffer, events - 1) + 1 if events > 1 else events
        except BlockingIOError:
            return 0


def is_grpc_reader(callback: Callable[..., object]) -> bool:
    """True for what grpc.aio's completion queue hands to `add_reader`."""
    owner = getattr(getattr(callback, "func", callback), "__self__", None)
    return type(owner).__name__ == "PollerCompletionQueue"
