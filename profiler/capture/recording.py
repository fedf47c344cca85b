"""What an engine core and a worker write down of each step: hooks to records (capture.proto). No vLLM is imported."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from profiler.capture.device_times import CudaEventClock, DeviceStepTimes, HostClock
from profiler.capture.pause import Pause
from profiler.capture.trace_file import CaptureWriter
from step_oracle.v1 import capture_pb2 as pb
from vllm_shim import __version__
from vllm_shim.step_shape import DecodeStep, ScheduledStep, StepReader


@dataclass(slots=True)
class StepSchedule:
    """One step of a scheduler, as ScheduledStep of capture.proto says, which the writer's thread makes of it."""

    step_index: int
    # vLLM's object, by which the step's result is recognized; None from then on.
    output: Any
    host_ns: int
    # Known once the executor has the step.
    scheduled: ScheduledStep | DecodeStep | None = None
    dispatch_ns: int = 0
    result_ns: int = 0
    generated_tokens: int = 0


class SchedulerRecording:
    """Follows the steps of one scheduler. All methods run on the engine's thread.

    Between a result and the next dispatch the device may wait for this thread, and so for what is done here. So a step
    is read while the device works on it: `dispatched`, then `executing`, then `finished`.
    """

    def __init__(self, path: Path, data_parallel_rank: int = 0) -> None:
        self._reader = StepReader()
        self._step_index = -1
        # When the engine was given the last result, the capture's own time after it included; 0: none since the last
        # step.
        self._resumed_ns = 0
        # Steps dispatched and not finished, oldest first.
        self._open: deque[StepSchedule] = deque()
        # Dispatched and not read: vLLM's object, and its step where it is recorded.
        self._unread: tuple[Any, StepSchedule | None] | None = None
        self._pause = Pause(path, is_settled=lambda: not self._open)
        header = _header(data_parallel_rank=data_parallel_rank)
        self._writer = CaptureWriter(path, header, scheduled_block, pause=self._pause)

    def dispatched(self, output: Any) -> None:
        """`schedule` returned: the step goes to the executor next."""
        begin_ns = time.monotonic_ns()
        # Of an executor that was not seen to take it.
        self._read()
        resumed_ns, self._resumed_ns = self._resumed_ns, 0
        self._step_index += 1
        is_recorded = output.total_num_scheduled_tokens and not self._pause.is_on
        goes_on = is_recorded and resumed_ns and output.scheduled_cached_reqs.req_ids
        step = StepSchedule(self._step_index, output, begin_ns - resumed_ns if goes_on else 0) if is_recorded else None
        self._unread = output, step
        if output.scheduled_spec_decode_tokens:
            # A worker in this process may take drafts out of it (ngram_proposer_gpu.py of 0.18.1 to 0.33.0).
            self._read()
        if step is not None:
            self._open.append(step)
            # The clock is read last: what the capture itself took does not count as the step's.
            step.dispatch_ns = time.monotonic_ns()
            self._writer.hook_ns += step.dispatch_ns - begin_ns

    def executing(self) -> None:
        """The executor has the step dispatched last."""
        if self._unread is None:
            return
        begin_ns, (_, step) = time.monotonic_ns(), self._unread
        self._read()
        if step is not None:
            self._writer.beside_ns += time.monotonic_ns() - begin_ns

    def _read(self) -> None:
        """Every step is read, and in order, those that are not recorded too."""
        if self._unread is not None:
            (output, step), self._unread = self._unread, None
            scheduled = self._reader.read(output)
            if step is not None:
                step.scheduled = scheduled

    def finished(self, output: Any, result: Any) -> None:
        """`update_from_output` is called: the step's result is here. Results come in the order of the steps."""
        if not any(step.output is output for step in self._open):
            # Without tokens, or dispatched in a pause: those that are open come later.
            return
        result_ns = time.monotonic_ns()
        self._read()
        while self._open:
            step = self._open.popleft()
            if step.output is output:
                step.output, step.result_ns = None, result_ns
                step.generated_tokens = sum(map(len, getattr(result, "sampled_token_ids", None) or ()))
                self._writer.append(step)
                break
        self._resumed_ns = time.monotonic_ns()
        self._writer.hook_ns += self._resumed_ns - result_ns

    def close(self) -> None:
        """The engine ends."""
        self._writer.close()


class WorkerRecording:
    """Follows the steps of one worker. All methods run on the worker's thread."""

    def __init__(
        self,
        path: Path,
        clock: HostClock | CudaEventClock,
        *,
        rank: int = 0,
        data_parallel_rank: int = 0,
        begin_thread: Callable[[], None] = lambda: None,
    ) -> None:
        """`begin_thread`: called first in the thread that reads the clock's events; see worker.py."""
        timing = pb.CAPTURE_TIMING_HOST if isinstance(clock, HostClock) else pb.CAPTURE_TIMING_CUDA_EVENTS
        header = _header(rank=rank, data_parallel_rank=data_parallel_rank, timing=timing)
        self._clock = clock
        self._step_index = -1
        self._step: DeviceStepTimes | None = None
        self._pause = Pause(path, is_settled=lambda: self._step is None)
        self._writer = CaptureWriter(path, header, partial(device_block, clock), begin_thread, self._pause)

    def begin(self, total_tokens: int) -> None:
        """The worker is called with a step."""
        entry_ns = time.monotonic_ns()
        self._step_index += 1
        if not total_tokens or self._pause.is_on:
            return
        self._step = DeviceStepTimes(self._step_index, total_tokens, entry_ns)
        self._clock.begin(self._step)
        self._writer.hook_ns += time.monotonic_ns() - entry_ns

    def end(self) -> None:
        """All of the step's work is done, or on the stream."""
        step, self._step = self._step, None
        if step is None:
            return
        begin_ns = time.monotonic_ns()
        self._clock.end(step)
        step.return_ns = time.monotonic_ns()
        self._writer.append(step)
        self._writer.hook_ns += time.monotonic_ns() - begin_ns

    def close(self) -> None:
        """The engine ends."""
        self._writer.close()


def _header(**fields: Any) -> pb.CaptureHeader:
    return pb.CaptureHeader(version=__version__, monotonic_ns=time.monotonic_ns(), unix_ns=time.time_ns(), **fields)


def scheduled_block(steps: Sequence[StepSchedule]) -> pb.CaptureRecord:
    """Finished steps, with times of CLOCK_MONOTONIC, as one record."""
    base_ns = steps[0].dispatch_ns
    record = pb.CaptureRecord(scheduled=pb.ScheduledSteps(base_ns=base_ns))
    for step in steps:
        assert step.scheduled is not None  # noqa: S101  a finished step has been read
        record.scheduled.steps.add(
            step_index=step.step_index,
            shape=step.scheduled.shape,
            dispatch_ns=step.dispatch_ns - base_ns,
            result_ns=step.result_ns - base_ns,
            generated_tokens=step.generated_tokens,
            host_ns=step.host_ns,
        )
    return record


def device_block(clock: HostClock | CudaEventClock, steps: Sequence[DeviceStepTimes]) -> pb.CaptureRecord | None:
    """The steps whose times the clock knows, from the first; None where it knows none."""
    known = clock.resolved(steps)
    if not known:
        return None
    base_ns = steps[0].entry_ns
    block = pb.DeviceSteps(base_ns=base_ns)
    for step in steps[:known]:
        block.steps.add(
            step_index=step.step_index,
            total_tokens=step.total_tokens,
            entry_ns=step.entry_ns - base_ns,
            start_ns=step.start_ns - base_ns,
            end_ns=step.end_ns - base_ns,
            return_ns=step.return_ns - base_ns,
            was_idle=step.was_idle,
        )
    return pb.CaptureRecord(device=block)
