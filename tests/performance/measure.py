"""What the benchmarks share: cores, clocks of other processes, medians with their spread."""

from __future__ import annotations

import os
import re
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

SERVER_CORE, LOAD_CORE = 0, 1


class NotMeasured(RuntimeError):
    """A section cannot be measured here; the message says why."""


@dataclass(frozen=True)
class Spread:
    """The median of some rounds, the least and the largest."""

    median: float
    low: float
    high: float
    rounds: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(statistics.median(values), min(values), max(values), len(values))

    def text(self, digits: int = 1) -> str:
        """12.3 (11.9 to 14.0)."""
        return f"{self.median:.{digits}f} ({self.low:.{digits}f} to {self.high:.{digits}f})"


def set_policy(pid: int, policy: int) -> None:
    """Put every thread of a process under a policy; threads it starts later inherit it."""
    for thread in Path(f"/proc/{pid}/task").iterdir():
        # A thread may end meanwhile.
        with suppress(ProcessLookupError):
            os.sched_setscheduler(int(thread.name), policy, os.sched_param(0))


@contextmanager
def on_core(core: int) -> Iterator[None]:
    """Processes and threads started inside run on this core."""
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, allowed)


def cpu_ns(pid: int) -> int:
    """CPU time of a process so far, all its threads."""
    # The clock of another process (clock_getcpuclockid of glibc).
    return time.clock_gettime_ns((~pid << 3) | 2)


def resident_bytes(pid: int | str = "self") -> int:
    """Physical memory a process uses, pages shared with others included."""
    found = re.search(r"^Rss:\s+(\d+) kB", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024


def interleaved(rounds: int, measures: Mapping[str, Callable[[], float]]) -> dict[str, list[float]]:
    """Each measure once per round, in turn, so that all see the same noise."""
    found: dict[str, list[float]] = {name: [] for name in measures}
    for _ in range(rounds):
        for name, measure in measures.items():
            found[name].append(measure())
    return found


def ratios(over: Sequence[float], under: Sequence[float]) -> Spread:
    """The ratio of each round."""
    return Spread.of([a / b for a, b in zip(over, under, strict=True)])


def ratio_of_medians(over: Sequence[float], under: Sequence[float]) -> tuple[float, float, float]:
    """Ratio of the medians and its 95 % interval: pairs drawn again 2,000 times, seeded."""
    a, b = np.asarray(over), np.asarray(under)
    drawn = np.random.default_rng(1).integers(0, len(a), size=(2000, len(a)))
    again = np.median(a[drawn], axis=1) / np.median(b[drawn], axis=1)
    low, high = np.percentile(again, (2.5, 97.5))
    return float(np.median(a) / np.median(b)), float(low), float(high)


def nanoseconds_per_call(call: Callable[[int], object], calls: int) -> float:
    """CPU time of one call in a loop, the least of three; the argument counts up.

    Of the thread, not of the wall clock: what the machine gives to others is no cost of the call.
    """
    least = float("inf")
    for _ in range(3):
        begin = time.thread_time_ns()
        for i in range(calls):
            call(i)
        least = min(least, (time.thread_time_ns() - begin) / calls)
    return least


def plain(value: Any) -> Any:
    """Values of this module as JSON takes them."""
    if isinstance(value, Spread):
        return asdict(value)
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value
