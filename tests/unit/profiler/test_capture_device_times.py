"""The clocks of a capture, on events whose device is a list of numbers."""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from profiler.capture.device_times import CudaEventClock, DeviceStepTimes, HostClock
from profiler.capture.recording import WorkerRecording
from profiler.capture.trace_file import read_capture_file
from step_oracle.v1 import capture_pb2 as pb


@dataclass
class Device:
    """A stream: an event happens when the device reaches it. Milliseconds; `now` is the host's time.

    `clock_rate`: how fast the device's clock runs beside the host's.
    """

    now: float = 0.0
    clock_rate: float = 1.0
    free_at: float = 0.0
    made: int = 0
    synchronized: bool = False

    def event(self) -> Event:
        self.made += 1
        return Event(self)

    def now_ns(self) -> int:
        return round(self.now * 1e6)

    def launch(self, milliseconds: float) -> None:
        self.free_at = max(self.free_at, self.now) + milliseconds


@dataclass(eq=False)
class Event:
    device: Device
    at: float | None = field(default=None)

    def record(self) -> None:
        self.at = max(self.device.free_at, self.device.now)

    def query(self) -> bool:
        assert self.at is not None, "queried before it was recorded"
        return self.at <= self.device.now

    def elapsed_time(self, end: Event) -> float:
        assert self.query(), "the real one raises here"
        assert end.query(), "the real one raises here"
        assert self.at is not None
        assert end.at is not None
        return (end.at - self.at) * self.device.clock_rate

    def synchronize(self) -> None:
        raise AssertionError("a capture never waits for the device")


def run(clock: CudaEventClock, device: Device, work: float) -> DeviceStepTimes:
    step = DeviceStepTimes(0, 1, device.now_ns())
    clock.begin(step)
    device.launch(work)
    clock.end(step)
    return step


def test_a_step_on_an_idle_stream_starts_at_the_hosts_time_and_lasts_what_the_events_say() -> None:
    device = Device()
    clock = CudaEventClock(device.event, device.now_ns)
    device.now = 3.0
    step = run(clock, device, 5.0)
    device.now = 9.0

    assert clock.resolved([step]) == 1
    assert step.was_idle
    assert (step.start_ns, step.end_ns) == (3_000_000, 8_000_000)


def test_steps_back_to_back_are_chained_without_a_gap() -> None:
    device = Device()
    clock = CudaEventClock(device.event, device.now_ns)
    steps = []
    for number in range(5):
        device.now = 10.0 * number
        steps.append(run(clock, device, 12.0))
    device.now = 1000.0

    assert clock.resolved(steps) == 5
    assert [step.was_idle for step in steps] == [True, False, False, False, False]
    assert [step.end_ns - step.start_ns for step in steps] == [12_000_000] * 5
    assert [after.start_ns - before.end_ns for before, after in itertools.pairwise(steps)] == [0] * 4


def test_a_step_that_is_not_done_is_not_resolved_and_nobody_waits_for_it() -> None:
    device = Device()
    clock = CudaEventClock(device.event, device.now_ns)
    steps = [run(clock, device, 5.0), run(clock, device, 5.0)]
    device.now = 7.0

    assert clock.resolved(steps) == 1
    device.now = 10.0
    assert clock.resolved(steps[1:]) == 1
    assert steps[1].end_ns - steps[1].start_ns == 5_000_000


def test_events_are_used_again() -> None:
    device = Device()
    clock = CudaEventClock(device.event, device.now_ns)
    for number in range(100):
        device.now = 20.0 * number
        step = run(clock, device, 5.0)
        device.now += 10.0
        assert clock.resolved([step]) == 1

    assert device.made <= 4


@pytest.mark.parametrize("clock_rate", [1 - 1e-4, 1 + 1e-4])
def test_a_clock_that_drifts_places_no_step_before_its_call_or_after_its_end_was_seen(clock_rate: float) -> None:
    """Ten minutes without an idle stream: the chain alone would be 60 ms away."""
    device = Device(clock_rate=clock_rate)
    clock = CudaEventClock(device.event, device.now_ns)
    waiting: list[tuple[DeviceStepTimes, float]] = []
    for number in range(20_000):
        # The host is one step ahead, as under asynchronous scheduling, and a writer looks every eighth step.
        device.now = max(0.0, 30.0 * (number - 1))
        waiting.append((run(clock, device, 30.0), 30.0 * number))
        if number % 8 == 7:
            known = clock.resolved([step for step, _ in waiting])
            for step, truth_ms in waiting[:known]:
                assert step.entry_ns <= step.start_ns
                assert step.end_ns <= device.now_ns()
                assert step.end_ns - step.start_ns == pytest.approx(30e6, rel=2e-4)
                # A step and what lies between two looks of the writer.
                assert abs(step.start_ns - truth_ms * 1e6) <= 9 * 30e6
            del waiting[:known]


def test_a_host_clock_measures_from_entry_to_return() -> None:
    clock, step = HostClock(), DeviceStepTimes(3, 7, entry_ns=1)
    clock.begin(step)
    clock.end(step)

    assert step.start_ns == 1
    assert clock.resolved([step]) == 1
    assert 0 <= time.monotonic_ns() - step.end_ns < 1_000_000_000


def test_a_worker_on_a_gpu_writes_what_its_events_said(tmp_path: Path) -> None:
    device = Device()
    recording = WorkerRecording(tmp_path / "rank-1.capture", CudaEventClock(device.event), rank=1)
    for number, tokens in enumerate((8, 0, 16)):
        device.now = 3.0 * number
        recording.begin(tokens)
        if tokens:
            device.launch(2.5)
            recording.end()
    device.now = 100.0
    recording.close()
    found = read_capture_file(tmp_path / "rank-1.capture")
    steps = [step for record in found.records for step in record.device.steps]

    assert (found.header.rank, found.header.timing) == (1, pb.CAPTURE_TIMING_CUDA_EVENTS)
    assert [(step.step_index, step.total_tokens) for step in steps] == [(0, 8), (2, 16)]
    assert [step.end_ns - step.start_ns for step in steps] == [2_500_000] * 2
