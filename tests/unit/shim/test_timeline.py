"""The serial device, the deadline Future, the wall clock."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_shim.config import WAIT_MODES
from vllm_shim.timeline import SHORTEST_IDLE_NS, Clock, DeadlineFuture, DeviceTimeline, StepTimes, resolved


def test_an_idle_device_starts_after_prep() -> None:
    times = StepTimes(dispatch_ns=1_000)
    DeviceTimeline().settle(times, latency_ns=100, prep_ns=10, copy_ns=5)
    assert (times.device_start_ns, times.device_finish_ns, times.deadline_ns) == (1_010, 1_110, 1_115)


def test_a_busy_device_starts_when_the_step_before_is_finished() -> None:
    timeline, first, second = DeviceTimeline(), StepTimes(1_000), StepTimes(1_020)
    timeline.settle(first, latency_ns=100, prep_ns=10, copy_ns=50)
    timeline.settle(second, latency_ns=70, prep_ns=10, copy_ns=0)
    assert second.device_start_ns == first.device_finish_ns == 1_110
    assert second.deadline_ns == 1_180


def test_a_pause_is_told_from_the_device_s_last_finish_on() -> None:
    timeline = DeviceTimeline()
    first, idle_ns = timeline.hand_over(SHORTEST_IDLE_NS * 5)
    assert idle_ns == 0
    timeline.settle(first, latency_ns=100, prep_ns=10, copy_ns=50)
    second, idle_ns = timeline.hand_over(first.device_finish_ns + SHORTEST_IDLE_NS)
    assert idle_ns == SHORTEST_IDLE_NS
    timeline.settle(second, latency_ns=100, prep_ns=10, copy_ns=50)
    third, idle_ns = timeline.hand_over(second.device_finish_ns + SHORTEST_IDLE_NS - 1)
    assert idle_ns == 0
    # The third is under way: whatever the clock says, the device is not idle.
    assert timeline.hand_over(third.dispatch_ns + 10 * SHORTEST_IDLE_NS)[1] == 0


def next_step(
    dispatch_ns: int, *, returned_ns: int = 1_000_000, goes_on: bool = True, host_ns: int = 3_000
) -> StepTimes:
    timeline = DeviceTimeline()
    timeline.returned_ns = returned_ns
    times, _ = timeline.hand_over(dispatch_ns, goes_on=goes_on)
    timeline.settle(times, latency_ns=100, prep_ns=10, copy_ns=5, host_ns=host_ns)
    return times


@pytest.mark.parametrize("dispatch_ns", [1_000_001, 1_003_000, 1_900_000, 1_000_000 + SHORTEST_IDLE_NS - 1])
def test_a_step_is_ready_when_the_real_host_would_have_it_ready_however_long_this_one_takes(dispatch_ns: int) -> None:
    times = next_step(dispatch_ns)

    assert (times.dispatch_ns, times.after_ns) == (dispatch_ns, 1_000_000)
    assert (times.device_start_ns, times.deadline_ns) == (1_003_010, 1_003_115)


def test_a_step_is_ready_at_its_dispatch_where_nothing_says_what_came_before() -> None:
    late = 1_000_000 + SHORTEST_IDLE_NS
    for times in (
        next_step(1_900_000, host_ns=0),  # a pack that does not know it
        next_step(1_900_000, goes_on=False),  # the engine may have waited for a request
        next_step(1_900_000, returned_ns=0),  # the first, or the second of two that were handed over in a row
        next_step(late),  # no host takes as long
    ):
        assert times.device_start_ns == times.dispatch_ns + 10


def test_a_result_is_followed_by_one_step() -> None:
    timeline = DeviceTimeline()
    timeline.returned_ns = 1_000
    assert [timeline.hand_over(1_500, goes_on=True)[0].after_ns for _ in range(2)] == [1_000, 0]


def test_a_ready_step_waits_for_a_device_at_work() -> None:
    timeline, before = DeviceTimeline(), StepTimes(1_000)
    timeline.settle(before, latency_ns=9_000, prep_ns=0, copy_ns=0)
    timeline.returned_ns = 900
    times, _ = timeline.hand_over(1_100, goes_on=True)
    timeline.settle(times, latency_ns=100, prep_ns=10, copy_ns=5, host_ns=50)
    assert times.device_start_ns == before.device_finish_ns


@given(
    st.lists(st.tuples(st.integers(0, 10**9), st.integers(1, 10**9), st.integers(0, 10**6)), min_size=1, max_size=50)
)
def test_a_device_never_runs_two_steps_at_once(steps: list[tuple[int, int, int]]) -> None:
    timeline, now, free_at = DeviceTimeline(), 0, 0
    for gap, latency, prep in steps:
        now += gap
        times = StepTimes(now)
        timeline.settle(times, latency_ns=latency, prep_ns=prep, copy_ns=0)
        assert times.device_start_ns >= free_at
        assert times.device_start_ns == max(now + prep, free_at)
        assert times.device_finish_ns - times.device_start_ns == latency
        free_at = times.device_finish_ns


def test_a_future_resolves_exactly_once() -> None:
    calls: list[int] = []

    def resolve() -> str:
        calls.append(1)
        return "output"

    future = DeadlineFuture(lambda: False, resolve)
    assert not future.done()
    assert future.result() == "output"
    assert future.done()
    assert future.result() == "output"
    assert calls == [1]


def test_a_future_is_done_when_it_is_due() -> None:
    due = [False]
    future = DeadlineFuture(lambda: due[0], lambda: None)
    assert not future.done()
    due[0] = True
    assert future.done()


def test_an_error_ends_the_future_for_good() -> None:
    calls = []

    def fail() -> None:
        calls.append(1)
        raise ValueError("lost")

    future = DeadlineFuture(lambda: False, fail)
    for _ in range(2):
        with pytest.raises(ValueError, match="lost"):
            future.result()
    assert calls == [1]


def test_a_resolved_future_is_done() -> None:
    assert resolved(None).done()
    assert resolved(3).result() == 3


@pytest.mark.parametrize("mode", WAIT_MODES)
def test_no_wait_mode_returns_before_the_deadline(mode: str) -> None:
    clock = Clock(mode)
    for _ in range(20):
        deadline = clock.now_ns() + 700_000
        clock.wait_until(deadline)
        assert clock.now_ns() >= deadline


@pytest.mark.parametrize("mode", WAIT_MODES)
def test_a_deadline_in_the_past_does_not_wait(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vllm_shim.timeline.time.sleep", lambda _: pytest.fail("slept"))
    clock = Clock(mode)
    clock.wait_until(clock.now_ns() - 1)


@pytest.mark.parametrize("mode", ["hybrid", "spin"])
def test_a_wait_too_short_to_sleep_lets_other_threads_in_once(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    readings = iter((0, 50_000, 100_000, 150_000))
    monkeypatch.setattr("vllm_shim.timeline.time.sleep", slept.append)
    monkeypatch.setattr("vllm_shim.timeline.time.monotonic_ns", lambda: next(readings))
    Clock(mode).wait_until(150_000)
    assert slept == [0.0]


def test_yielding_gives_the_core_away_at_every_look_at_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[int] = []
    readings = iter((0, 400_000, 800_000, 1_000_000))
    monkeypatch.setattr("vllm_shim.timeline.time.sleep", lambda _: pytest.fail("slept"))
    monkeypatch.setattr("vllm_shim.timeline.os.sched_yield", lambda: given.append(1))
    monkeypatch.setattr("vllm_shim.timeline.time.monotonic_ns", lambda: next(readings))
    Clock("yield").wait_until(1_000_000)
    assert len(given) == 3


def test_a_future_can_be_printed_in_an_error_report() -> None:
    future = DeadlineFuture(lambda: False, lambda: "tokens")
    assert repr(future) == "<DeadlineFuture pending>"
    future.result()
    assert repr(future) == "<DeadlineFuture resolved>"
