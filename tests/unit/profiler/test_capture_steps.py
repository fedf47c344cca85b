"""A capture read back: files joined step by step, warm-up marked, cost counted, whatever is missing said."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

import captures
from oracle_server.errors import InvalidArgument
from profiler.capture.device_times import HostClock
from profiler.capture.recording import SchedulerRecording, WorkerRecording
from profiler.capture.steps import PLAN_FILE, RunTail, read_capture
from profiler.capture.trace_file import read_capture_file
from schedules import new, output


def test_what_was_captured_is_read(tmp_path: Path) -> None:
    made = captures.steps(40)
    captures.write_run(tmp_path, made)
    run = read_capture(tmp_path)[0]

    assert list(run.steps) == made
    assert (run.name, run.timing, run.notes) == ("run-001", "host", ())
    assert run.engine["engine"]["num_kv_blocks"] == 682
    assert run.ranks[0]["attention_backends"] == ["CPU_ATTN"]


def test_a_run_of_a_capture_can_be_read_alone(tmp_path: Path) -> None:
    captures.write_run(tmp_path, captures.steps(5))
    run = captures.write_run(tmp_path, captures.steps(7, seed=2), number=2)

    assert [len(run.steps) for run in read_capture(tmp_path)] == [5, 7]
    assert [len(run.steps) for run in read_capture(run)] == [7]


def test_a_worker_that_counted_other_calls_too_is_recognized_by_its_tokens(tmp_path: Path) -> None:
    made = captures.steps(200)
    captures.write_run(tmp_path, made, worker_offset=3)
    run = read_capture(tmp_path)[0]

    assert list(run.steps) == made
    assert run.notes == ("rank-0.capture counts its steps 3 away from the scheduler",)


def test_a_step_that_a_rank_does_not_have_is_left_out_and_counted(tmp_path: Path) -> None:
    made = captures.steps(50)
    run = captures.write_run(tmp_path, made, ranks=2)
    (run / "rank-1.capture").unlink()
    (tmp_path / "other").mkdir()
    shorter = captures.write_run(tmp_path / "other", made[:30])
    (shorter / "rank-0.capture").rename(run / "rank-1.capture")
    found = read_capture(tmp_path)[0]

    assert list(found.steps) == made[:30]
    assert found.notes == ("20 of 50 steps are not in every rank's file",)


def test_a_broken_end_is_reported_with_the_file(tmp_path: Path) -> None:
    run = captures.write_run(tmp_path, captures.steps(5))
    with (run / "engine.capture").open("ab") as file:
        file.write(b"\x40\x00\x00\x00half a record")
    found = read_capture(tmp_path)[0]

    assert len(found.steps) == 5
    assert found.notes == ("engine.capture: 17 bytes cut, the last record is not whole",)


def test_steps_of_a_warm_up_are_marked(tmp_path: Path) -> None:
    made = captures.steps(10)
    run = captures.write_run(tmp_path, made)
    events = [
        {"event": "warm-up begins", "monotonic_ns": made[2].dispatch_ns},
        {"event": "warm-up ends", "monotonic_ns": made[5].dispatch_ns},
    ]
    (run / PLAN_FILE).write_text("\n".join(map(json.dumps, events)) + '\n{"event": "half a li')

    assert [step.warm_up for step in read_capture(tmp_path)[0].steps] == [False] * 2 + [True] * 3 + [False] * 5


def test_a_run_that_is_still_written_is_read_as_it_grows(tmp_path: Path) -> None:
    """Files grow byte by byte, at their own pace; each step comes once, when all of them have it."""
    made = captures.steps(30)
    whole = captures.write_run(tmp_path / "whole", made, ranks=2, steps_per_record=4)
    run = captures.write_run(tmp_path / "growing", made, ranks=2)
    names = ("engine.capture", "rank-0.capture", "rank-1.capture")
    written = {name: (whole / name).read_bytes() for name in names}
    for name in names:
        (run / name).write_bytes(written[name][:8])
    tail, source, came, shown = RunTail(run), random.Random(3), [], dict.fromkeys(names, 8)
    while any(shown[name] < len(written[name]) for name in names):
        name = source.choice(names)
        shown[name] += source.randint(1, 150)
        (run / name).write_bytes(written[name][: shown[name]])
        came.append(tail.new_steps())

    assert [step for steps in came for step in steps] == made
    assert sum(bool(steps) for steps in came) > 2


def test_a_step_of_several_ranks_takes_as_long_as_the_slowest_whatever_their_clocks_say(tmp_path: Path) -> None:
    """The second rank's clock has drifted by half a millisecond: ends of two ranks are not compared."""
    made = captures.steps(40)
    run = captures.write_run(tmp_path, made, ranks=2)
    drifted = [
        step._replace(
            device_start_ns=step.device_start_ns + 500_000, device_end_ns=step.device_end_ns + 500_000 + 7 * (at % 2)
        )
        for at, step in enumerate(made)
    ]
    other = captures.write_run(tmp_path / "other", drifted)
    (other / "rank-0.capture").rename(run / "rank-1.capture")
    steps = read_capture(tmp_path)[0].steps

    assert [step.latency_ns for step in steps] == [step.latency_ns + 7 * (at % 2) for at, step in enumerate(made)]


def test_a_run_with_fewer_files_than_ranks_says_so(tmp_path: Path) -> None:
    captures.write_run(tmp_path, captures.steps(20), engine={"tensor_parallel_size": 2})

    assert read_capture(tmp_path)[0].notes == ("1 of 2 ranks wrote a file here: the others' times are not known",)


def test_data_parallel_ranks_are_runs_of_their_own(tmp_path: Path) -> None:
    first, second = captures.steps(20), captures.steps(30, seed=2)
    run = captures.write_run(tmp_path, first)
    other = captures.write_run(tmp_path / "other", second)
    for kind in ("capture", "json"):
        (other / f"engine.{kind}").rename(run / f"engine-dp1.{kind}")
        (other / f"rank-0.{kind}").rename(run / f"rank-0-dp1.{kind}")
    found = {each.name: list(each.steps) for each in read_capture(tmp_path)}

    assert found == {"run-001": first, "run-001-dp1": second}


@pytest.mark.parametrize("left", [b"", b"SOCAPT1\n", b"SOCAP"])
def test_a_run_that_cannot_be_read_is_left_out_and_told(tmp_path: Path, left: bytes) -> None:
    """An engine killed while it started, by a writer that had not written its header."""
    captures.write_run(tmp_path, captures.steps(20))
    (captures.write_run(tmp_path, captures.steps(20), number=2) / "engine.capture").write_bytes(left)
    (run,) = read_capture(tmp_path)

    assert (run.name, len(run.steps)) == ("run-001", 20)
    assert len(run.notes) == 1
    assert run.notes[0].startswith("run-002 is left out: ")
    with pytest.raises(InvalidArgument, match="run-002 is left out"):
        read_capture(tmp_path / "run-002")


def test_a_worker_whose_count_is_off_is_followed_while_it_writes(tmp_path: Path) -> None:
    made = captures.steps(40)
    run = captures.write_run(tmp_path, made, worker_offset=5)

    assert RunTail(run).new_steps() == made


def test_steps_of_no_worker_are_not_joined(tmp_path: Path) -> None:
    run = captures.write_run(tmp_path, captures.steps(40), ranks=0)

    assert RunTail(run).new_steps() == []


def test_a_call_outside_of_a_step_is_not_that_step(tmp_path: Path) -> None:
    """Equal tokens, another time: steps of a worker that something else called."""
    made = [step for step in captures.steps(200) if not step.chunk_tokens and step.num_decode_requests == 8]
    run = captures.write_run(tmp_path, made)
    later = [step._replace(device_start_ns=step.device_start_ns + 10**12) for step in made]
    other = captures.write_run(tmp_path / "other", later)
    (other / "rank-0.capture").replace(run / "rank-0.capture")

    assert read_capture(tmp_path)[0].steps == ()
    assert RunTail(run).new_steps() == []


def test_the_share_of_the_capture_is_of_the_devices_time(tmp_path: Path) -> None:
    """Asynchronous scheduling: a step's result comes two steps after its dispatch."""
    made = captures.steps(40)
    early = [step._replace(dispatch_ns=step.dispatch_ns - step.latency_ns) for step in made]
    captures.write_run(tmp_path, early)
    cost = read_capture(tmp_path)[0].overhead

    assert cost.step_us == pytest.approx(sum(step.latency_ns for step in made) / 40 / 1e3)


def test_a_folder_without_a_capture_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="no run-"):
        read_capture(tmp_path)


def test_scheduler_and_worker_meet_in_one_step_with_the_tokens_that_came_out(tmp_path: Path) -> None:
    run = captures.write_run(tmp_path, captures.steps(1))
    for name in ("engine", "rank-0"):
        (run / f"{name}.capture").unlink()
    scheduler, worker = SchedulerRecording(run / "engine.capture"), WorkerRecording(run / "rank-0.capture", HostClock())
    outputs = [
        output({"a": 10}, new_requests=(new("a", 10),)),
        output({}),
        output({"a": 1}, cached=(("a", 10, 1),)),
    ]
    for scheduled, tokens in zip(outputs, ([[7]], [], [[8]]), strict=True):
        scheduler.dispatched(scheduled)
        worker.begin(scheduled.total_num_scheduled_tokens)
        worker.end()
        scheduler.finished(scheduled, type("Result", (), {"sampled_token_ids": tokens}))
    scheduler.close()
    worker.close()
    steps = read_capture(tmp_path)[0].steps

    assert [(step.step_index, step.chunk_tokens, step.num_decode_requests) for step in steps] == [
        (0, (10,), 0),
        (2, (), 1),
    ]
    assert [step.generated_tokens for step in steps] == [1, 1]
    for step in steps:
        assert step.dispatch_ns <= step.device_start_ns <= step.device_end_ns <= step.result_ns


def test_the_host_s_time_lies_between_a_result_and_the_next_step_without_the_capture_s_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A clock that the test moves; the capture's own readings of it cost 1,000 each."""
    scheduler, written, now = recorded(tmp_path, monkeypatch)
    first, cached = output({"a": 10}, new_requests=(new("a", 10),)), (("a", 10, 1),)
    alone, waited = output({"a": 1}, cached=cached), output({"b": 10}, new_requests=(new("b", 10),))
    nothing = output({})
    for step, pause_ns in ((first, 50), (alone, 70), (nothing, 30), (output({"a": 1}, cached=(("a", 11, 2),)), 40)):
        now[0] += pause_ns
        scheduler.dispatched(step)
        if step is not nothing:
            scheduler.finished(step, None)
    now[0] += 60
    scheduler.dispatched(waited)
    scheduler.dispatched(in_flight := output({"a": 1}, cached=(("a", 12, 3),)))
    for step in (waited, in_flight):
        scheduler.finished(step, None)

    # First one: nothing before it. Second: 70 and one reading. After a step without tokens, for a new request alone,
    # and dispatched with no result since the step before: not known.
    assert [step.host_ns for step in written.steps] == [0, 1_070, 0, 0, 0]


@pytest.mark.parametrize("is_told", [True, False])
def test_a_step_is_read_once_the_executor_has_it_and_that_is_no_time_of_the_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_told: bool
) -> None:
    """Or with its result, where nobody tells that it has. The clock moves by 1,000 with each reading."""
    scheduler, written, _ = recorded(tmp_path, monkeypatch)
    step = output({"a": 10}, new_requests=(new("a", 10),))
    read = [bool(scheduler._open)]
    scheduler.dispatched(step)
    read.append(scheduler._open[0].scheduled is not None)
    if is_told:
        scheduler.executing()
        scheduler.executing()
    read.append(scheduler._open[0].scheduled is not None)
    assert read == [False, False, is_told]
    assert (written.hook_ns, written.beside_ns) == (1_000, 1_000 * is_told)
    scheduler.finished(step, None)

    assert [chunk.num_tokens for chunk in written.steps[0].scheduled.shape.prefill_chunks] == [10]
    assert (written.hook_ns, written.beside_ns) == (2_000, 1_000 * is_told)


def test_a_worker_that_takes_drafts_out_of_a_step_changes_nothing_of_its_shape(tmp_path: Path) -> None:
    """As vLLM's own n-gram proposer on a GPU does to the object both share."""
    scheduler = SchedulerRecording(tmp_path / "engine.capture")
    first, second = output({"a": 10}, new_requests=(new("a", 10),)), output({"a": 4}, cached=(("a", 10, 1),))
    second.scheduled_spec_decode_tokens = {"a": [7, 8, 9]}
    for step in (first, second):
        scheduler.dispatched(step)
        if step.scheduled_spec_decode_tokens:
            step.scheduled_spec_decode_tokens.clear()
            step.num_scheduled_tokens["a"] -= 3
        scheduler.executing()
        scheduler.finished(step, None)
    scheduler.close()

    (record,) = read_capture_file(tmp_path / "engine.capture").records
    assert [list(step.shape.num_draft_tokens) for step in record.scheduled.steps] == [[], [3]]
    assert [step.shape.num_decode_tokens for step in record.scheduled.steps] == [0, 4]


def recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[SchedulerRecording, FakeWriter, list[int]]:
    """A recording, what it writes, and the time, which each reading of the clock moves by 1,000."""
    now = [0]

    def monotonic_ns() -> int:
        now[0] += 1_000
        return now[0]

    monkeypatch.setattr("profiler.capture.recording.time.monotonic_ns", monotonic_ns)
    scheduler, written = SchedulerRecording(tmp_path / "engine.capture"), FakeWriter()
    monkeypatch.setattr(scheduler, "_writer", written)
    return scheduler, written, now


class FakeWriter:
    def __init__(self) -> None:
        self.hook_ns = self.beside_ns = 0
        self.steps: list[Any] = []

    def append(self, step: Any) -> None:
        self.steps.append(step)


def test_steps_in_flight_together_keep_their_results_apart(tmp_path: Path) -> None:
    """Asynchronous scheduling: the next step is dispatched before the result of this one."""
    scheduler = SchedulerRecording(tmp_path / "engine.capture")
    first, second = output({"a": 10}, new_requests=(new("a", 10),)), output({"a": 1}, cached=(("a", 10, 1),))
    scheduler.dispatched(first)
    scheduler.dispatched(second)
    scheduler.finished(first, type("Result", (), {"sampled_token_ids": [[1]]}))
    scheduler.finished(second, type("Result", (), {"sampled_token_ids": [[1, 2]]}))
    scheduler.close()
    steps = [
        (step.step_index, step.generated_tokens)
        for record in read_capture_file(tmp_path / "engine.capture").records
        for step in record.scheduled.steps
    ]
    assert steps == [(0, 1), (1, 2)]
