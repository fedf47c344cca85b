"""What is left out of answer times because the machine itself stood still."""

from __future__ import annotations

import os
import signal
import time
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from performance.load.stalls import MachineStalls

MS = 1_000_000


def test_what_a_stall_met_and_what_waited_for_its_end_is_left_out() -> None:
    stalls = MachineStalls(())
    stalls.intervals = np.array([[1_100 * MS, 1_103 * MS]])
    due_ms = np.array([90, 98, 99, 102, 107, 109])
    latency_ms = np.array([1, 3, 1, 1, 1, 1])
    run: Any = SimpleNamespace(begin_ns=1_000 * MS, due_ns=due_ms * MS, latency_ns=latency_ms * MS)

    # Answered before it; under way; answered as it began; due in it; due while its backlog is worked off; due later.
    assert stalls.met(run).tolist() == [False, True, False, True, True, False]


def test_a_watcher_that_did_not_run_saw_a_stall() -> None:
    (core, *_) = os.sched_getaffinity(0)
    with MachineStalls((core,)) as stalls:
        if not stalls.is_watching:
            pytest.skip("this user may not have real-time priority")
        (watcher,) = stalls._watchers
        begin = time.monotonic_ns()
        os.kill(watcher.pid, signal.SIGSTOP)
        time.sleep(0.1)
        os.kill(watcher.pid, signal.SIGCONT)
    assert any(first < begin + 5 * MS and last - first > 90 * MS for first, last in stalls.intervals)
