"""Data-parallel ranks of a MoE model: one forward pass together, or none.

The rules are those of vLLM's DPEngineCoreProc (0.33.0, read). While a wave runs every turn of a rank's loop hands over
exactly one pass: a step of its scheduler, or a dummy batch where there was none. Nobody's pass k starts before all have
handed over theirs, for each contains the exchange of tokens, and all last as long as the longest. Whether the wave goes
on is agreed upon every so many passes only: after the last finish dummy batches run on until then. A request that
arrives in between starts all ranks again.
"""

from __future__ import annotations

from collections import ChainMap, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from profiler.replay.clock import VirtualClock, VirtualTime
from profiler.replay.job import Request
from profiler.replay.router import Router
from profiler.replay.times import RequestTimes

if TYPE_CHECKING:
    from profiler.replay.engine import ReplayEngine


# When a rank hands over a pass and how long it lasts by itself -> when all have and how long it lasts for all.
Meet = Callable[[int, int], tuple[int, int]]


@dataclass(frozen=True, slots=True)
class WaveRules:
    """How often ranks agree on going on: every so many passes, in newer versions after the first one too."""

    sync_interval: int = 32
    syncs_first: bool = False

    def syncs_after(self, passes: int) -> bool:
        return passes % self.sync_interval == 0 or (self.syncs_first and passes == 1)


@dataclass(slots=True)
class _Pass:
    """Pass k of all ranks: the latest hand-over and the longest latency so far."""

    dispatch_ns: int = 0
    latency_ns: int = 0


@dataclass(slots=True)
class _Rank:
    engine: ReplayEngine
    index: int
    # Passes handed over; turns begun.
    passes: int = 0
    turns: int = 0
    # Routed here, not yet looked at.
    inbox: deque[tuple[Request, int, int]] = field(default_factory=deque)

    def in_flight(self, time_ns: int) -> int:
        return len(self.inbox) + self.engine.in_flight(time_ns)


@dataclass(frozen=True)
class _Context:
    clock: VirtualClock
    times: ChainMap[str, RequestTimes]


class LockStepGroup:
    """Owns the ranks and their wave; towards the fleet it is one engine. One thread."""

    def __init__(
        self, engines: Sequence[ReplayEngine], router: str, virtual_time: VirtualTime, rules: WaveRules
    ) -> None:
        self.index = 0
        self.context = _Context(engines[0].context.clock, ChainMap(*[engine.context.times for engine in engines]))
        self._ranks = [_Rank(engine, i) for i, engine in enumerate(engines)]
        self._router = Router(router)
        self._virtual_time = virtual_time
        self._rules = rules
        for rank in self._ranks:
            rank.engine.executor.join(partial(self._meet, rank))
        self.begin_run()

    def begin_run(self) -> None:
        """No wave and nothing routed."""
        self._router.begin_run()
        self._is_running = False
        # Rounds of turns in this wave; a round is one turn of every rank.
        self._rounds = 0
        self._passes: dict[int, _Pass] = {}
        self._finished: list[RequestTimes] = []
        for rank in self._ranks:
            rank.passes = rank.turns = 0
            rank.inbox.clear()

    @property
    def now_ns(self) -> int:
        return max(rank.engine.now_ns for rank in self._ranks)

    @property
    def is_busy(self) -> bool:
        return self._is_running or any(rank.inbox or rank.engine.is_busy for rank in self._ranks)

    def in_flight(self, time_ns: int) -> int:
        return sum(rank.in_flight(time_ns) for rank in self._ranks)

    def add(self, request: Request, arrival_ns: int, ordinal: int) -> None:
        """Routes a request; a group at rest starts a wave at its arrival."""
        if not self._is_running:
            self._start_wave(arrival_ns)
        self._router.choose(self._ranks, arrival_ns).inbox.append((request, arrival_ns, ordinal))

    def step(self) -> list[RequestTimes]:
        """One round; the requests that finished in it."""
        target = max(rank.turns for rank in self._ranks) + 1
        for rank in self._ranks:
            if rank.turns < target:
                self._turn(rank)
        if self._is_running:
            self._rounds += 1
            if self._rules.syncs_after(self._rounds):
                self._agree()
        finished, self._finished = self._finished, []
        return finished

    def _start_wave(self, time_ns: int) -> None:
        """All ranks hear of it at once: the coordinator's message takes no time here."""
        self._is_running = True
        self._rounds = 0
        for rank in self._ranks:
            rank.engine.context.clock.wait_until(time_ns)

    def _agree(self) -> None:
        """An all-reduce between the hosts: it ends for all when the last one has come."""
        now_ns = self.now_ns
        for rank in self._ranks:
            rank.engine.context.clock.wait_until(now_ns)
        self._is_running = any(rank.engine.has_unfinished for rank in self._ranks)
        if not self._is_running and any(rank.inbox for rank in self._ranks):
            self._start_wave(now_ns)

    def _turn(self, rank: _Rank) -> None:
        """One turn of a rank's loop: take what has arrived, step, and hand over a dummy batch where no step ran."""
        rank.turns += 1
        engine, before = rank.engine, self._virtual_time.clock
        self._virtual_time.clock = engine.context.clock
        while rank.inbox and rank.inbox[0][1] <= engine.now_ns:
            engine.add(*rank.inbox.popleft())
        finished, executed = engine.turn()
        self._finished += finished
        if not executed and self._is_running:
            engine.executor.execute_dummy_batch()
        self._virtual_time.clock = before

    def _meet(self, rank: _Rank, dispatch_ns: int, latency_ns: int) -> tuple[int, int]:
        """When pass k of all ranks has been handed over, and how long it lasts.

        Called by a rank's executor in the middle of its turn: ranks that have not come so far take theirs first. Each
        turn hands over one pass, so they arrive, and what they do afterwards in it is later than their hand-over.
        """
        number = rank.passes
        rank.passes += 1
        common = self._passes.setdefault(number, _Pass())
        common.dispatch_ns = max(common.dispatch_ns, dispatch_ns)
        common.latency_ns = max(common.latency_ns, latency_ns)
        for other in self._ranks:
            if other.passes <= number:
                self._turn(other)
        # All calls of the pass before have returned: nobody begins a turn before all have ended theirs.
        self._passes.pop(number - 1, None)
        return common.dispatch_ns, common.latency_ns
