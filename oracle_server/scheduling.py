"""How Linux shares a core between the server's threads and those of others."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

BATCH, OTHER = "batch", "other"
_NAMES = {os.SCHED_OTHER: OTHER, os.SCHED_BATCH: BATCH}


def take_scheduling(wanted: str) -> str:
    """Put every thread of this process under a policy; threads and children it starts later inherit it.

    Under SCHED_BATCH a thread that wakes up does not take the core from one that works, so grpc.aio's poller hands over
    many messages at a time instead of interrupting the event loop for each. Only the usual policy is changed: whoever
    starts the server under another one (`chrt`) has a reason. Why it could not be done; empty where it was, or where
    there was nothing to do.
    """
    if wanted == BATCH and os.sched_getscheduler(0) == os.SCHED_OTHER:
        try:
            for thread in Path("/proc/self/task").iterdir():
                with suppress(ProcessLookupError):
                    os.sched_setscheduler(int(thread.name), os.SCHED_BATCH, os.sched_param(0))
        except OSError as error:
            return f"SCHED_BATCH is refused: {error}; a step costs up to twice as much under the usual policy"
    return ""


def scheduling() -> str:
    """The policy of this thread: batch, other, or the number of another one."""
    policy = os.sched_getscheduler(0)
    return _NAMES.get(policy, str(policy))
