"""Virtual time: waiting is jumping."""

from __future__ import annotations

import importlib
import time
from typing import Any

from vllm_shim.timeline import Clock

# Modules of vLLM that stamp requests and events (0.18.1 to 0.33.0, read); each has the module as attribute `time`.
_STAMPING_MODULES = (
    "vllm.v1.core.sched.scheduler",
    "vllm.v1.core.kv_cache_metrics",
    "vllm.v1.engine",
    "vllm.v1.request",
)


class VirtualClock(Clock):
    """The clock of one engine, nanoseconds from the begin of the run; it moves only forward."""

    def __init__(self) -> None:
        self._now_ns = 0

    def now_ns(self) -> int:
        return self._now_ns

    def wait_until(self, deadline_ns: int) -> None:
        self._now_ns = max(self._now_ns, deadline_ns)

    def reset(self) -> None:
        """The begin of another run."""
        self._now_ns = 0


class VirtualTime:
    """Stands in for the module `time`: what it tells comes from the engine that is running."""

    def __init__(self, clock: VirtualClock) -> None:
        self.clock = clock

    def time_ns(self) -> int:
        return self.clock.now_ns()

    def time(self) -> float:
        return self.clock.now_ns() * 1e-9

    monotonic_ns = perf_counter_ns = time_ns
    monotonic = perf_counter = time

    def __getattr__(self, name: str) -> Any:
        return getattr(time, name)


def install(virtual: VirtualTime) -> None:
    """Lets vLLM's stamps be virtual. For a process that does nothing but replay."""
    for name in _STAMPING_MODULES:
        module = importlib.import_module(name)
        if getattr(module, "time", None) is not None:
            module.time = virtual  # type: ignore[attr-defined]
