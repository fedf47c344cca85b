"""Engines behind a router, on one timeline.

Every engine has its own position in time, for a wait inside vLLM moves it to the deadline of a step. The engine that is
furthest behind acts next, and a request is routed once no engine is behind its arrival: nothing happens in the past.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from oracle_server.errors import FailedPrecondition
from profiler.replay.clock import VirtualTime
from profiler.replay.job import Request
from profiler.replay.router import Router
from profiler.replay.times import RequestTimes

if TYPE_CHECKING:
    from profiler.replay.engine import ReplayEngine
    from profiler.replay.lock_step import LockStepGroup

Progress = Callable[[int, int], None]


class Fleet:
    """Owns the engines of a process, or a group of them that acts as one. One thread."""

    def __init__(
        self, engines: Sequence[ReplayEngine] | Sequence[LockStepGroup], router: str, virtual_time: VirtualTime
    ) -> None:
        self._engines: Sequence[ReplayEngine | LockStepGroup] = engines
        self._router = Router(router)
        self._virtual_time = virtual_time

    def run(self, requests: Sequence[Request], users: int, progress: Progress) -> list[RequestTimes]:
        """All requests to their end; in the order of `requests`.

        `users` above 0: a closed loop in which each user sends the next request when the one before has ended. Progress
        is told the requests that ended and the time, at every one that ends.
        """
        self._router.begin_run()
        # (when, ordinal); a closed loop begins with all its users at once, and whoever sends takes the next request.
        arrivals = [(0, i) for i in range(min(users, len(requests)))]
        arrivals = arrivals or [(request.arrival_ns, i) for i, request in enumerate(requests)]
        heapq.heapify(arrivals)
        sent = len(arrivals)
        done: list[RequestTimes] = []
        while True:
            engine = min((e for e in self._engines if e.is_busy), key=lambda e: (e.now_ns, e.index), default=None)
            if arrivals and (engine is None or arrivals[0][0] <= engine.now_ns):
                arrival_ns, ordinal = heapq.heappop(arrivals)
                ordinal = self._router.routed if users else ordinal
                chosen = self._router.choose(self._engines, arrival_ns)
                self._virtual_time.clock = chosen.context.clock
                chosen.add(requests[ordinal], arrival_ns, ordinal)
                continue
            if engine is None:
                break
            self._virtual_time.clock = engine.context.clock
            for times in engine.step():
                done.append(times)
                progress(len(done), times.last_token_ns)
                if sent < len(requests):
                    heapq.heappush(arrivals, (times.last_token_ns, sent))
                    sent += 1
        return self._in_order(requests)

    def run_by_step(self, requests: Sequence[Request], progress: Progress) -> list[RequestTimes]:
        """One engine, each request admitted before the step of the index recorded for it."""
        engine = self._engines[0]
        if len(self._engines) != 1 or not hasattr(engine, "executor"):
            raise FailedPrecondition("admissions recorded by step index are those of one engine; take --engines 1")
        self._virtual_time.clock = engine.context.clock
        ended = admitted = 0
        while True:
            while admitted < len(requests) and requests[admitted].admit_step <= engine.executor.next_step_index:
                engine.add(requests[admitted], engine.now_ns, admitted)
                admitted += 1
            if not engine.is_busy:
                if admitted == len(requests):
                    break
                raise FailedPrecondition(
                    f"the engine is idle at step {engine.executor.next_step_index}, but the next request was admitted "
                    f"before step {requests[admitted].admit_step}: the record is of another engine configuration"
                )
            for times in engine.step():
                ended += 1
                progress(ended, times.last_token_ns)
        return self._in_order(requests)

    def _in_order(self, requests: Sequence[Request]) -> list[RequestTimes]:
        found = {key: times for engine in self._engines for key, times in engine.context.times.items()}
        return [found[request.request_id] for request in requests]
