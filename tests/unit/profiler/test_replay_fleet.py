"""The order of events: engines that are behind act first, and nothing is routed into the past."""

from __future__ import annotations

from typing import Any

import pytest

from oracle_server.errors import FailedPrecondition
from profiler.replay.clock import VirtualClock, VirtualTime
from profiler.replay.fleet import Fleet
from profiler.replay.job import Request
from profiler.replay.times import RequestTimes


class Context:
    def __init__(self) -> None:
        self.clock = VirtualClock()
        self.times: dict[str, RequestTimes] = {}


class Executor:
    next_step_index = 0


class FakeEngine:
    """Serves one request at a time, `output_tokens` nanoseconds each; looks at its clock as the real one does."""

    def __init__(self, index: int) -> None:
        self.index = index
        self.context = Context()
        self.executor = Executor()
        self.queue: list[Request] = []
        self.finish_ns: list[int] = []

    @property
    def now_ns(self) -> int:
        return self.context.clock.now_ns()

    @property
    def is_busy(self) -> bool:
        return bool(self.queue)

    def in_flight(self, time_ns: int) -> int:
        return len(self.queue) + sum(finish > time_ns for finish in self.finish_ns)

    def add(self, request: Request, arrival_ns: int, ordinal: int) -> None:
        if not self.is_busy:
            self.context.clock.wait_until(arrival_ns)
        assert self.now_ns >= arrival_ns
        self.queue.append(request)
        times = RequestTimes(request.request_id, self.index, arrival_ns, 1, queued_ns=self.now_ns)
        self.context.times[request.request_id] = times

    def step(self) -> list[RequestTimes]:
        request = self.queue.pop(0)
        self.executor.next_step_index += 1
        self.context.clock.wait_until(self.now_ns + request.output_tokens)
        self.finish_ns.append(self.now_ns)
        times = self.context.times[request.request_id]
        times.first_token_ns = times.last_token_ns = self.now_ns
        return [times]


def fleet(count: int, router: str = "round_robin") -> Fleet:
    engines: list[Any] = [FakeEngine(i) for i in range(count)]
    return Fleet(engines, router, VirtualTime(engines[0].context.clock))


def requests(*entries: tuple[int, int]) -> list[Request]:
    """(arrival ns, service ns)."""
    return [Request(str(i), 1, service, arrival) for i, (arrival, service) in enumerate(entries)]


def ignore(ended: int, time_ns: int) -> None:
    pass


def test_round_robin_takes_turns_and_least_requests_knows_only_what_has_ended_by_then() -> None:
    # Engine 0 is still at work for 100 ns when the others arrive; engine 1 has ended by 30.
    load = requests((0, 100), (10, 20), (40, 5), (50, 5))

    turns = fleet(2).run(load, 0, ignore)
    least = fleet(2, "least_requests").run(load, 0, ignore)

    assert [times.engine for times in turns] == [0, 1, 0, 1]
    assert [times.engine for times in least] == [0, 1, 1, 1]
    assert [times.last_token_ns for times in least] == [100, 30, 45, 55]


def test_an_engine_that_is_ahead_does_not_hold_up_one_that_is_behind() -> None:
    done: list[tuple[int, int]] = []

    fleet(2).run(requests((0, 1000), (0, 10), (0, 1), (20, 7)), 0, lambda ended, time: done.append((ended, time)))

    assert sorted(time for _, time in done) == [10, 27, 1000, 1001]
    assert [ended for ended, _ in done] == [1, 2, 3, 4]


def test_an_idle_fleet_jumps_to_the_next_arrival() -> None:
    times = fleet(1).run(requests((5, 1), (1_000_000, 1)), 0, ignore)

    assert [entry.queued_ns for entry in times] == [5, 1_000_000]


def test_a_user_of_a_closed_loop_sends_the_next_request_when_the_last_one_ended() -> None:
    times = fleet(2).run(requests(*[(0, 10), (0, 25), (0, 10), (0, 10), (0, 10)]), 2, ignore)

    assert [entry.arrival_ns for entry in times] == [0, 0, 10, 20, 25]
    assert max(entry.last_token_ns for entry in times) == 35


def test_recorded_admissions_are_those_of_one_engine_and_fit_its_steps() -> None:
    recorded = [Request("a", 1, 3, admit_step=0), Request("b", 1, 3, admit_step=1)]

    assert len(fleet(1).run_by_step(recorded, ignore)) == 2
    with pytest.raises(FailedPrecondition, match="take --engines 1"):
        fleet(2).run_by_step(recorded, ignore)
    with pytest.raises(FailedPrecondition, match="idle at step 1, but the next request was admitted before step 5"):
        fleet(1).run_by_step([recorded[0], Request("b", 1, 3, admit_step=5)], ignore)


def test_the_virtual_clock_never_goes_back_and_its_time_module_follows_the_running_engine() -> None:
    clock, other = VirtualClock(), VirtualClock()
    time = VirtualTime(clock)
    clock.wait_until(2_500_000_000)
    clock.wait_until(1)

    assert (time.monotonic_ns(), time.time(), time.perf_counter()) == (2_500_000_000, 2.5, 2.5)
    time.clock = other
    assert time.monotonic() == 0.0
    assert callable(time.sleep)
