"""How late the event loop wakes up: whatever keeps it from answering steps shows here."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from time import perf_counter_ns

from oracle_server.rpc.metrics import Metrics

# A probe costs a timer, four times a second; a stall shorter than this is seen by one probe in proportion.
PERIOD_SECONDS = 0.25


async def watch_loop(
    metrics: Metrics,
    clock_ns: Callable[[], int] = perf_counter_ns,
    sleep: Callable[[float], Awaitable[object]] = asyncio.sleep,
) -> None:
    """Sleep and count how much longer it took, until cancelled. uvloop's timers have steps of a millisecond."""
    while True:
        begin = clock_ns()
        await sleep(PERIOD_SECONDS)
        metrics.count_lag(max(0, clock_ns() - begin - int(PERIOD_SECONDS * 1e9)))
