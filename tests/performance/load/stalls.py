"""When the machine itself stood still: a host that gives the cores of a virtual machine to others for milliseconds.

A process of real-time priority sleeps on each core, a millisecond at a time: nothing of ours comes before it, so where
it wakes up late the core was not there. What such a stall met says nothing of a server.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from performance.load.client import LoadRun

_PERIOD_NS = 1_000_000
# Shorter than any stall that shows in a tail, longer than a wake-up that is only slow.
_LATE_NS = 300_000
# What waited for the end of a stall is worked off after it.
_AFTER_NS = 5_000_000
_PRIORITY = 50


class MachineStalls:
    """Watches cores while it is open; a context manager. `intervals` afterwards, of time.monotonic_ns.

    `is_watching` False: this user may not have real-time priority, and nothing is seen.
    """

    def __init__(self, cores: Iterable[int]) -> None:
        self._cores = tuple(cores)
        self._watchers: list[subprocess.Popen[str]] = []
        self.is_watching = True
        self.intervals: NDArray[np.int64] = np.empty((0, 2), np.int64)

    def __enter__(self) -> MachineStalls:
        for core in self._cores:
            told = map(str, (core, _PRIORITY, _PERIOD_NS, _LATE_NS))
            watcher = subprocess.Popen(
                [sys.executable, "-P", Path(__file__).with_name("stall_watcher.py"), *told],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            self._watchers.append(watcher)
            assert watcher.stdout is not None
            self.is_watching &= watcher.stdout.readline() == "watching\n"
        return self

    def __exit__(self, *error: object) -> None:
        found = [json.loads(watcher.communicate("")[0] or "[]") for watcher in self._watchers]
        if self.is_watching:
            self.intervals = np.array([each for of_core in found for each in of_core], np.int64).reshape(-1, 2)

    def met(self, run: LoadRun) -> NDArray[np.bool_]:
        """Of each message of the run that asks for a step: whether it was under way in a stall, or due just after."""
        due = run.begin_ns + run.due_ns
        done = due + run.latency_ns
        met = np.zeros(len(due), np.bool_)
        for begin, end in self.intervals.tolist():
            met |= (due < end + _AFTER_NS) & (done > begin)
        return met
