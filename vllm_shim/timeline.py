"""The serial GPU we pretend to have, and the Future that resolves when it would be done.

No timer thread: the engine thread waits in `result()` itself. Deadlines follow the deadlines before them, never a
wake-up, so lateness does not add up.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

# Hybrid wait: sleep until this long before the deadline, then spin. Longer than the lateness of a sleep with a timer
# slack of 1 ns.
SPIN_NS = 200_000
# What a busy engine does between two steps takes less.
SHORTEST_IDLE_NS = 50_000_000


@dataclass(slots=True)
class StepTimes:
    """When a step was handed over and what the device made of it; CLOCK_MONOTONIC, nanoseconds."""

    dispatch_ns: int
    device_start_ns: int = 0
    device_finish_ns: int = 0
    # When the output becomes visible to the engine.
    deadline_ns: int = 0
    # Deadline of the result that the engine came to this step from; 0: none, or it was longer ago than a busy engine
    # takes.
    after_ns: int = 0


class DeviceTimeline:
    """One device that runs one step after the other. `settle` must be called in dispatch order; engine thread only."""

    def __init__(self) -> None:
        # `returned_ns`: deadline of the result that the engine has been given since the last step; 0: none.
        self._free_at_ns = self.returned_ns = 0
        self._last: StepTimes | None = None

    def hand_over(self, now_ns: int, *, goes_on: bool = False) -> tuple[StepTimes, int]:
        """The times of a new step, and StepRequest.device_idle_ns. `goes_on`: a request of it was under way."""
        after_ns = self.returned_ns if goes_on and now_ns - self.returned_ns < SHORTEST_IDLE_NS else 0
        last, self._last, self.returned_ns = self._last, StepTimes(now_ns, after_ns=after_ns), 0
        # Without a deadline it is under way still.
        idle_ns = now_ns - last.device_finish_ns if last is not None and last.deadline_ns else 0
        return self._last, idle_ns if idle_ns >= SHORTEST_IDLE_NS else 0

    def settle(self, times: StepTimes, *, latency_ns: int, prep_ns: int, copy_ns: int, host_ns: int = 0) -> None:
        """start = max(ready + prep, finish of the step before).

        Finish = start + latency; visible at finish + copy. Ready is the dispatch, or where `host_ns` is known and the
        engine came from a result, so long after that: what this engine's own host takes does not matter then.
        """
        ready_ns = times.after_ns + host_ns if host_ns and times.after_ns else times.dispatch_ns
        times.device_start_ns = start_ns = max(ready_ns + prep_ns, self._free_at_ns)
        times.device_finish_ns = self._free_at_ns = start_ns + latency_ns
        times.deadline_ns = times.device_finish_ns + copy_ns


class Clock:
    """Wall clock: CLOCK_MONOTONIC and the four ways to wait on it. Replay brings a virtual one."""

    def __init__(self, wait_mode: str) -> None:
        self._spin_ns = {"sleep": 0, "hybrid": SPIN_NS, "spin": 1 << 62, "yield": 0}[wait_mode]
        # As vLLM's core process waits for a worker: its core never halts meanwhile, and belongs to whoever asks.
        self._let_in = (lambda _: os.sched_yield()) if wait_mode == "yield" else time.sleep

    def now_ns(self) -> int:
        return time.monotonic_ns()

    def wait_until(self, deadline_ns: int) -> None:
        """Returns at or just after the deadline; at once if it has passed.

        A wait lets the engine's other threads in once, however short it is, as waiting for a device does.
        """
        spin_ns, let_in, now, has_let_in = self._spin_ns, self._let_in, time.monotonic_ns, False
        while (left := deadline_ns - now()) > 0:
            if left > spin_ns or not has_let_in:
                let_in(max(0, left - spin_ns) * 1e-9)
                has_let_in = True


class DeadlineFuture(Future[Any]):
    """Resolves once the answer is here and its deadline has passed.

    vLLM's engine core calls `done()` and `result()` only (0.18.1 to 0.33.0, read), on the engine thread. Every
    dispatched step resolves exactly once, by its output or by an error.
    """

    __slots__ = ("_is_due", "_of_the_step", "_outcome", "_resolve")

    def __init__(self, is_due: Callable[..., bool], resolve: Callable[..., Any], *of_the_step: Any) -> None:
        """`resolve(*of_the_step)` waits for answer and deadline and returns the output, or raises.

        Future's own state is left out: its condition and callbacks would cost more than the rest of a leased step.
        """
        self._is_due, self._resolve, self._of_the_step = is_due, resolve, of_the_step
        self._outcome: tuple[Any, BaseException | None] | None = None

    def done(self) -> bool:
        return self._outcome is not None or self._is_due(*self._of_the_step)

    def result(self, timeout: float | None = None) -> Any:
        if self._outcome is None:
            try:
                self._outcome = (self._resolve(*self._of_the_step), None)
            except BaseException as error:  # noqa: BLE001  a Future carries whatever ended its step
                self._outcome = (None, error)
        output, failure = self._outcome
        if failure is not None:
            raise failure
        return output

    def __repr__(self) -> str:
        return f"<DeadlineFuture {'resolved' if self._outcome is not None else 'pending'}>"


def resolved(value: Any) -> Future[Any]:
    """A Future that is done."""
    future: Future[Any] = Future()
    future.set_result(value)
    return future
