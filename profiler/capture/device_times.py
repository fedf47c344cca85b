"""When the device worked on each step: the host's clock where the host is the device, CUDA events where it is a GPU.

A clock is used by two threads: `begin` and `end` belong to the one that steps, `resolved` to the one that writes.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(slots=True)
class DeviceStepTimes:
    """One step of one worker, as DeviceStep of capture.proto says; start and end are set once they are known."""

    step_index: int
    total_tokens: int
    entry_ns: int
    return_ns: int = 0
    start_ns: int = 0
    end_ns: int = 0
    was_idle: bool = True
    # Of a CUDA clock: two events.
    events: Any = None


class HostClock:
    """The work happens between entry and return: a CPU engine."""

    def begin(self, step: DeviceStepTimes) -> None:
        step.start_ns = step.entry_ns

    def end(self, step: DeviceStepTimes) -> None:
        step.end_ns = time.monotonic_ns()

    def resolved(self, steps: Sequence[DeviceStepTimes]) -> int:
        """How many of the steps, from the first, have their times."""
        return len(steps)


class CudaEventClock:
    """Two events per step on the current stream, read once both have happened. It never waits for the device.

    A step that finds the stream empty starts when its event is recorded, which is a host time. Any other starts its
    event's distance after the end of the step before. So events of one busy stretch are chained, each distance a few
    steps long at most: `elapsed_time` is a 32-bit float of milliseconds, whose last digit is 0.25 ms after an hour.

    The device's clock runs 10 to 100 ppm beside the host's, and the chain of a long stretch with it: distances hold,
    places on the host's clock drift. They are kept within what the host knows: no step starts before its call, or ends
    after its end was seen. What needs a place takes steps shortly after an idle stream (build.py).
    """

    def __init__(self, make_event: Callable[[], Any], now_ns: Callable[[], int] = time.monotonic_ns) -> None:
        """`make_event` is torch.cuda.Event with enable_timing=True, or what behaves like it."""
        self._make_event, self._now_ns = make_event, now_ns
        self._free: deque[Any] = deque()
        # Stepping thread: the event that ends the step handed over last.
        self._last_end: Any = None
        # Writing thread: the last resolved step's.
        self._chain_event: Any = None
        self._chain_ns = 0

    def begin(self, step: DeviceStepTimes) -> None:
        step.was_idle = self._last_end is None or self._last_end.query()
        start = self._event()
        start.record()
        step.start_ns = self._now_ns()
        step.events = (start, None)

    def end(self, step: DeviceStepTimes) -> None:
        end = self._event()
        end.record()
        step.events = (step.events[0], end)
        self._last_end = end

    def resolved(self, steps: Sequence[DeviceStepTimes]) -> int:
        for number, step in enumerate(steps):
            start, end = step.events
            if not end.query():
                return number
            seen_ns = self._now_ns()
            if not step.was_idle and self._chain_event is not None:
                step.start_ns = max(step.entry_ns, self._chain_ns + _nanoseconds(self._chain_event, start))
            latency_ns = _nanoseconds(start, end)
            step.start_ns = min(step.start_ns, seen_ns - latency_ns)
            step.end_ns = step.start_ns + latency_ns
            if self._chain_event is not None:
                self._free.append(self._chain_event)
            self._free.append(start)
            self._chain_event, self._chain_ns = end, step.end_ns
            step.events = None
        return len(steps)

    def _event(self) -> Any:
        try:
            return self._free.popleft()
        except IndexError:
            return self._make_event()


def _nanoseconds(begin: Any, end: Any) -> int:
    milliseconds: float = begin.elapsed_time(end)
    return max(0, round(milliseconds * 1e6))
