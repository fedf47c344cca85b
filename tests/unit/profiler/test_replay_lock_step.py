"""Ranks in lock-step: no pass starts before all have handed theirs over, and all last as long as the longest."""

from __future__ import annotations

from typing import Any

import pytest

from oracle_server.errors import FailedPrecondition
from profiler.replay.clock import VirtualClock, VirtualTime
from profiler.replay.fleet import Fleet
from profiler.replay.job import Request
from profiler.replay.lock_step import LockStepGroup, Meet, WaveRules
from profiler.replay.times import RequestTimes

DUMMY_NS = 1
EVERY_FOURTH = WaveRules(4)


class Context:
    def __init__(self) -> None:
        self.clock = VirtualClock()
        self.times: dict[str, RequestTimes] = {}


class FakeExecutor:
    """A device whose passes begin when the one before has ended."""

    def __init__(self, clock: VirtualClock) -> None:
        self._clock = clock
        self.meet: Meet
        self.free_ns = 0
        # (begin, end) of each pass.
        self.passes: list[tuple[int, int]] = []
        self.dummies = 0

    def join(self, meet: Meet) -> None:
        self.meet = meet

    def run(self, latency_ns: int) -> None:
        dispatch_ns, common_ns = self.meet(self._clock.now_ns(), latency_ns)
        begin_ns = max(dispatch_ns, self.free_ns)
        self.free_ns = begin_ns + common_ns
        self.passes.append((begin_ns, self.free_ns))

    def execute_dummy_batch(self) -> None:
        self.dummies += 1
        self._clock.wait_until(self.free_ns)
        self.run(DUMMY_NS)


class FakeEngine:
    """Serves one request at a time: a pass of `prompt_tokens` nanoseconds for each output token, waited for."""

    def __init__(self, index: int) -> None:
        self.index = index
        self.context = Context()
        self.executor = FakeExecutor(self.context.clock)
        self.queue: list[tuple[Request, RequestTimes]] = []

    @property
    def now_ns(self) -> int:
        return self.context.clock.now_ns()

    @property
    def is_busy(self) -> bool:
        return bool(self.queue)

    has_unfinished = is_busy

    def in_flight(self, time_ns: int) -> int:
        return len(self.queue)

    def add(self, request: Request, arrival_ns: int, ordinal: int) -> None:
        assert self.now_ns >= arrival_ns
        times = RequestTimes(request.request_id, self.index, arrival_ns, 1, queued_ns=self.now_ns)
        self.context.times[request.request_id] = times
        self.queue.append((request, times))

    def turn(self) -> tuple[list[RequestTimes], bool]:
        if not self.queue:
            return [], False
        request, times = self.queue[0]
        self.executor.run(request.prompt_tokens)
        self.context.clock.wait_until(self.executor.free_ns)
        times.output_tokens += 1
        times.last_token_ns = self.now_ns
        if times.output_tokens < request.output_tokens:
            return [], True
        self.queue.pop(0)
        return [times], True


class Ranks:
    def __init__(self, count: int, rules: WaveRules = EVERY_FOURTH, router: str = "round_robin") -> None:
        self.engines: list[Any] = [FakeEngine(i) for i in range(count)]
        virtual_time = VirtualTime(self.engines[0].context.clock)
        self.group = LockStepGroup(self.engines, router, virtual_time, rules)
        self.fleet = Fleet([self.group], "round_robin", virtual_time)

    def run(self, *entries: tuple[int, int, int], users: int = 0) -> list[RequestTimes]:
        """(arrival ns, ns of a pass, passes)."""
        load = [Request(str(i), cost, passes, arrival) for i, (arrival, cost, passes) in enumerate(entries)]
        return self.fleet.run(load, users, lambda ended, time_ns: None)

    @property
    def passes(self) -> list[list[tuple[int, int]]]:
        return [engine.executor.passes for engine in self.engines]

    @property
    def dummies(self) -> list[int]:
        return [engine.executor.dummies for engine in self.engines]


def test_every_pass_lasts_as_long_as_that_of_the_slowest_rank() -> None:
    ranks = Ranks(3)

    times = ranks.run((0, 10, 4), (0, 30, 4), (0, 20, 4))

    assert [entry.engine for entry in times] == [0, 1, 2]
    assert [entry.last_token_ns for entry in times] == [120, 120, 120]
    assert ranks.passes == [[(0, 30), (30, 60), (60, 90), (90, 120)]] * 3
    assert ranks.dummies == [0, 0, 0]


def test_a_rank_without_requests_hands_over_dummy_batches_until_all_agree_to_stop() -> None:
    ranks = Ranks(2)

    (times,) = ranks.run((5, 10, 2))

    # Two passes of the request; the ranks ask each other after the fourth.
    assert times.last_token_ns == 25
    assert ranks.dummies == [2, 4]
    assert ranks.passes == [[(5, 15), (15, 25), (25, 26), (26, 27)]] * 2


def test_a_wave_goes_on_while_any_rank_has_requests() -> None:
    ranks = Ranks(2)

    times = ranks.run((0, 10, 1), (0, 10, 5))

    assert [entry.last_token_ns for entry in times] == [10, 50]
    assert ranks.dummies == [7, 3]


@pytest.mark.parametrize(("rules", "passes"), [(WaveRules(4, syncs_first=True), 1), (WaveRules(4), 4)])
def test_newer_versions_agree_after_the_first_pass_too(rules: WaveRules, passes: int) -> None:
    ranks = Ranks(2, rules)

    ranks.run((0, 10, 1))

    assert [len(found) for found in ranks.passes] == [passes, passes]


def test_a_request_is_seen_at_a_ranks_next_turn_and_one_after_the_wave_starts_another() -> None:
    ranks = Ranks(2)

    # The second arrives in the middle of the first pass; the third long after the wave has ended at 50.
    times = ranks.run((0, 10, 4), (3, 20, 1), (1000, 10, 1))

    # At 0 the idle rank looked, found nothing and stood with its second dummy until the other came at 10.
    assert times[1].queued_ns == 10
    assert times[1].last_token_ns == 40
    assert times[2].queued_ns == 1000
    assert times[2].last_token_ns == 1010
    assert ranks.passes[0][:5] == [(0, 10), (10, 20), (20, 40), (40, 50), (1000, 1010)]
    assert ranks.passes[0] == ranks.passes[1]


def test_ranks_are_chosen_by_the_router() -> None:
    load = ((0, 10, 9), (0, 10, 2), (1, 10, 2), (25, 10, 1))

    assert [entry.engine for entry in Ranks(2).run(*load)] == [0, 1, 0, 1]
    # Both ranks have one request at 1, and by 25 that of rank 1 has ended.
    assert [entry.engine for entry in Ranks(2, router="least_requests").run(*load)] == [0, 1, 0, 1]
    assert [entry.engine for entry in Ranks(2, router="least_requests").run(*load, (26, 10, 1))][-1] == 1


def test_a_closed_loop_keeps_all_ranks_in_step() -> None:
    ranks = Ranks(2)

    times = ranks.run(*[(0, 10, 3)] * 6, users=2)

    assert sorted(entry.last_token_ns for entry in times) == [30, 30, 60, 60, 90, 90]
    assert ranks.passes[0] == ranks.passes[1]


def test_a_second_run_is_as_the_first() -> None:
    ranks = Ranks(2)
    load = ((0, 10, 3), (7, 20, 2))
    first = [entry.last_token_ns for entry in ranks.run(*load)]
    passes = [list(found) for found in ranks.passes]
    for engine in ranks.engines:
        engine.context.clock.reset()
        engine.context.times.clear()
        engine.executor.free_ns = 0
        engine.executor.passes.clear()
    ranks.group.begin_run()

    assert [entry.last_token_ns for entry in ranks.run(*load)] == first
    assert ranks.passes == passes


def test_recorded_admissions_are_not_those_of_a_group() -> None:
    with pytest.raises(FailedPrecondition, match="those of one engine"):
        Ranks(2).fleet.run_by_step([Request("a", 1, 1, admit_step=0)], lambda ended, time_ns: None)
