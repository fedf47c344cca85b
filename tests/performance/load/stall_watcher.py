"""One core's watcher (stalls.py): core, priority, period and lateness in nanoseconds; until its input ends.

Says `watching`, then what it saw: a JSON list of [due, woken up], CLOCK_MONOTONIC.
"""

from __future__ import annotations

import json
import os
import select
import sys
import time


def main() -> int:
    core, priority, period_ns, late_ns = map(int, sys.argv[1:])
    os.sched_setaffinity(0, {core})
    try:
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(priority))
    except PermissionError:
        print("not allowed", flush=True)
        return 0
    print("watching", flush=True)
    ended = select.poll()
    ended.register(sys.stdin, select.POLLIN | select.POLLHUP)
    stalls: list[tuple[int, int]] = []
    due = time.monotonic_ns() + period_ns
    while not ended.poll(0):
        time.sleep(max(0, due - time.monotonic_ns()) * 1e-9)
        now = time.monotonic_ns()
        if now - due > late_ns:
            stalls.append((due, now))
        due = max(due + period_ns, now)
    print(json.dumps(stalls))
    return 0


if __name__ == "__main__":
    sys.exit(main())
