"""A capture that rests while its engine serves: who answers whom, and what is in the files afterwards."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import captures
from oracle_server.errors import InvalidArgument
from profiler.capture.device_times import HostClock
from profiler.capture.pause import PAUSED, Pause, pause, paused, resume
from profiler.capture.recording import SchedulerRecording, WorkerRecording
from profiler.capture.steps import read_capture
from schedules import new, output

RESULT = SimpleNamespace(sampled_token_ids=[[7]])


def looking(pauses: list[Pause]) -> Callable[[float], None]:
    """What stands for sleeping: every writer looks once."""

    def sleep(_: float) -> None:
        for each in pauses:
            each.look(is_written=True)

    return sleep


def made(run: Path, *names: str, is_settled: Callable[[], bool] = lambda: True) -> list[Pause]:
    """Capture files of these names, and the pause of each."""
    for name in names:
        (run / f"{name}.capture").touch()
    return [Pause(run / f"{name}.capture", is_settled) for name in names]


def test_a_pause_is_in_effect_when_it_returns_and_over_when_the_capture_goes_on(tmp_path: Path) -> None:
    pauses = made(tmp_path, "engine", "rank-0", "rank-1", "engine-dp1", "rank-0-dp1")
    with paused(tmp_path, looking(pauses)):
        assert all(each.is_on for each in pauses)

    assert not any(each.is_on for each in pauses)
    assert not list(tmp_path.glob(f"*{PAUSED}*"))


@pytest.mark.parametrize("scheduler_first", [True, False])
def test_ranks_rest_after_their_scheduler_and_go_on_before_it(tmp_path: Path, scheduler_first: bool) -> None:
    """Whatever order the writers look in: a step the scheduler records is one that the ranks record."""
    scheduler, *ranks = made(tmp_path, "engine", "rank-0", "rank-1")
    order = [scheduler, *ranks] if scheduler_first else [*ranks, scheduler]
    seen = []

    def sleep(_: float) -> None:
        for each in order:
            each.look(is_written=True)
            seen.append((scheduler.is_on, [rank.is_on for rank in ranks]))

    pause(tmp_path, sleep)
    resume(tmp_path, sleep)

    assert (True, [True, True]) in seen
    assert all(scheduler_on or not any(on) for scheduler_on, on in seen)


def test_a_rank_waits_for_its_own_scheduler_and_a_scheduler_for_its_own_ranks(tmp_path: Path) -> None:
    (tmp_path / PAUSED).touch()
    (tmp_path / "engine-dp1.paused").touch()
    first, second = made(tmp_path, "rank-0", "rank-0-dp1")
    for each in (first, second):
        each.look(is_written=True)
    assert (first.is_on, second.is_on) == (False, True)

    schedulers = made(tmp_path, "engine", "engine-dp1")
    for each in schedulers:
        each.look(is_written=True)
    (tmp_path / "rank-0-dp1.paused").touch()
    (tmp_path / PAUSED).unlink()
    for each in schedulers:
        each.look(is_written=True)
    assert [each.is_on for each in schedulers] == [False, True]


def test_the_answer_waits_for_steps_in_flight_and_for_the_file(tmp_path: Path) -> None:
    open_steps = [object()]
    (scheduler,) = made(tmp_path, "engine", is_settled=lambda: not open_steps)
    answer = tmp_path / "engine.paused"
    (tmp_path / PAUSED).touch()
    scheduler.look(is_written=True)
    scheduler.look(is_written=True)
    assert (scheduler.is_on, answer.exists()) == (True, False)
    open_steps.clear()
    scheduler.look(is_written=False)
    assert not answer.exists()
    scheduler.look(is_written=True)
    assert answer.exists()


def test_an_engine_that_does_not_follow_is_told_and_not_left_paused(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="no captured engine has started"):
        pause(tmp_path)
    pauses = made(tmp_path, "engine", "rank-0")
    slept: list[float] = []
    with pytest.raises(InvalidArgument, match="does not rest"):
        pause(tmp_path, slept.append)
    assert sum(slept) == pytest.approx(30)
    assert not (tmp_path / PAUSED).exists()

    pause(tmp_path, looking(pauses))
    with pytest.raises(InvalidArgument, match="does not go on"):
        resume(tmp_path, slept.append)


def test_what_fails_in_a_pause_is_what_is_raised_and_the_capture_goes_on(tmp_path: Path) -> None:
    pauses = made(tmp_path, "engine")
    with pytest.raises(ZeroDivisionError), paused(tmp_path, looking(pauses)):
        raise ZeroDivisionError

    pauses[0].look(is_written=True)
    assert not pauses[0].is_on


class Engine:
    """One request whose steps go through both hooks, as without asynchronous scheduling."""

    def __init__(self, run: Path) -> None:
        for name in ("engine", "rank-0"):
            (run / f"{name}.capture").unlink()
        self.scheduler = SchedulerRecording(run / "engine.capture")
        self.worker = WorkerRecording(run / "rank-0.capture", HostClock())
        self.computed = 0

    def schedule(self) -> Any:
        """The first step computes ten tokens, each other one."""
        if not self.computed:
            scheduled = output({"a": 10}, new_requests=(new("a", 10),))
        else:
            scheduled = output({"a": 1}, cached=(("a", self.computed, self.computed - 9),))
        self.computed += scheduled.total_num_scheduled_tokens
        self.scheduler.dispatched(scheduled)
        return scheduled

    def execute(self, scheduled: Any) -> None:
        self.scheduler.executing()
        self.worker.begin(scheduled.total_num_scheduled_tokens)
        self.worker.end()

    def finish(self, scheduled: Any) -> None:
        self.scheduler.finished(scheduled, RESULT)

    def step(self) -> None:
        scheduled = self.schedule()
        self.execute(scheduled)
        self.finish(scheduled)

    def close(self) -> None:
        self.scheduler.close()
        self.worker.close()


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return captures.write_run(tmp_path, captures.steps(1))


def test_steps_of_a_pause_are_in_no_file_and_those_around_it_join(run: Path) -> None:
    """Contexts too: the reader of the scheduler's outputs goes on following. The writers' own threads answer."""
    engine = Engine(run)
    engine.step()
    engine.step()
    with paused(run):
        # Whatever came before is written when the pause is in effect.
        (before,) = read_capture(run)
        for _ in range(5):
            engine.step()
    engine.step()
    engine.step()
    engine.close()
    (found,) = read_capture(run)

    assert [step.step_index for step in before.steps] == [0, 1]
    assert [(step.step_index, step.decode_context_tokens) for step in found.steps] == [
        (0, 0),
        (1, 11),
        (7, 17),
        (8, 18),
    ]
    assert [step.chunk_tokens for step in found.steps] == [(10,), (), (), ()]
    assert found.notes == ()


def test_a_step_dispatched_in_a_pause_and_finished_after_it_costs_no_other_step(run: Path) -> None:
    """Asynchronous scheduling: the step after is dispatched before the result."""
    engine = Engine(run)
    engine.step()
    with paused(run):
        waiting = engine.schedule()
    for _ in range(3):
        engine.execute(waiting)
        following = engine.schedule()
        engine.finish(waiting)
        waiting = following
    engine.execute(waiting)
    engine.finish(waiting)
    engine.close()
    (found,) = read_capture(run)

    assert [step.step_index for step in found.steps] == [0, 2, 3, 4]
    assert found.notes == ()


def test_a_step_in_flight_as_the_pause_begins_is_recorded_by_both(run: Path) -> None:
    """The answer comes only when it is written."""
    engine = Engine(run)
    engine.step()
    scheduled = engine.schedule()
    begun: list[bool] = []

    def sleep(seconds: float) -> None:
        if engine.scheduler._pause.is_on and not begun:
            begun.append(not (run / "rank-0.paused").exists())
            engine.execute(scheduled)
            engine.finish(scheduled)
        time.sleep(seconds)

    with paused(run, sleep):
        (found,) = read_capture(run)
    engine.close()

    assert begun == [True]
    assert [step.step_index for step in found.steps] == [0, 1]
    assert found.notes == ()


def test_a_file_is_settled_when_none_of_its_steps_is_in_flight(run: Path) -> None:
    engine = Engine(run)
    pauses = (engine.scheduler._pause, engine.worker._pause)
    told = [[each._is_settled() for each in pauses]]
    scheduled = engine.schedule()
    engine.worker.begin(scheduled.total_num_scheduled_tokens)
    told.append([each._is_settled() for each in pauses])
    engine.worker.end()
    told.append([each._is_settled() for each in pauses])
    engine.finish(scheduled)
    told.append([each._is_settled() for each in pauses])
    engine.close()

    assert told == [[True, True], [False, False], [False, True], [True, True]]


def test_what_the_hooks_take_in_a_pause_is_not_told_of_the_steps_that_are_captured(run: Path) -> None:
    engine = Engine(run)
    engine.step()
    hook_ns = (engine.scheduler._writer.hook_ns, engine.worker._writer.hook_ns)
    with paused(run):
        for _ in range(50):
            engine.step()
        assert (engine.scheduler._writer.hook_ns, engine.worker._writer.hook_ns) == hook_ns
    engine.close()
