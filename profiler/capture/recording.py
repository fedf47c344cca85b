"""What an engine core and a worker write down of each step: hooks to records (capture.proto). No vLLM is imported."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from profiler.capture.device_times import CudaEventClock, DeviceStepTimes, HostClock
from profiler.capture.pause import Pause
from profiler.capture.trace_file import CaptureWriter
from step_oracle.v1 import capture_pb2 as pb
from vllm_shim import __version__
from vllm_shim.step_shape import StepReader


class SchedulerRecording:
    """Follows the steps of one scheduler. All methods run on the engine's thread."""

    def __init__(self, path: Path, data_parallel_rank: int = 0) -> None:
        self._reader = StepReader()
        self._step_index = -1
        # When the engine was given the last result, the capture's own time after it included; 0: none since the last
        # step.
        self._resumed_ns = 0
        # Steps dispatched and not finished, oldest first: (scheduler output, step).
        self._open: deque[tuple[Any, pb.ScheduledStep]] = deque()
        self._pause = Pause(path, is_settled=lambda: not self._open)
        header = _header(data_parallel_rank=data_parallel_rank)
        self._writer = CaptureWriter(path, header, scheduled_block, pause=self._pause)

    def dispatched(self, output: Any) -> None:
        """`schedule` returned: the step goes to the executor next."""
        begin_ns = time.monotonic_ns()
        resumed_ns, self._resumed_ns = self._resumed_ns, 0
        self._step_index += 1
        scheduled = self._reader.read(output)
        if self._pause.is_on:
            # Whatever is told from one step to the next is forgotten above: nothing spans a pause.
            return
        if not output.total_num_scheduled_tokens:
            return
        goes_on = resumed_ns and output.scheduled_cached_reqs.req_ids
        step = pb.ScheduledStep(
            step_index=self._step_index, shape=scheduled.shape, host_ns=begin_ns - resumed_ns if goes_on else 0
        )
        self._open.append((output, step))
        # The clock is read last: what the capture itself took does not count as the step's.
        step.dispatch_ns = time.monotonic_ns()
        self._writer.hook_ns += step.dispatch_ns - begin_ns

    def finished(self, output: Any, result: Any) -> None:
        """`update_from_output` is called: the step's result is here. Results come in the order of the steps."""
        if not any(dispatched is output for dispatched, _ in self._open):
            # Without tokens, or dispatched in a pause: those that are open come later.
            return
        result_ns = time.monotonic_ns()
        while self._open:
            dispatched, step = self._open.popleft()
            if dispatched is output:
                step.result_ns = result_ns
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


def scheduled_block(steps: Sequence[pb.ScheduledStep]) -> pb.CaptureRecord:
    """Steps with times of CLOCK_MONOTONIC as one record."""
    base_ns = steps[0].dispatch_ns
    block = pb.ScheduledSteps(base_ns=base_ns)
    for step in steps:
        written = block.steps.add()
        written.CopyFrom(step)
        written.dispatch_ns -= base_ns
        written.result_ns -= base_ns
    return pb.CaptureRecord(scheduled=block)


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
