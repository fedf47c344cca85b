"""Runs of the closed loop on a virtual machine whose hypervisor gave its cores to others meanwhile are made again.

What was taken is counted by the kernel, which knows nothing of results: no run is chosen by what it showed.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

# Of all cores' time during a run. Two cores of shared machines had 0.3 to 0.8 % taken on average, in seconds of a stall
# tens of percent.
MOST_PERCENT = 2.0
TRIES = 3
_STAT = Path("/proc/stat")
# Place of the time stolen in the line of all cores (proc_stat(5)).
_STEAL = 8
Result = TypeVar("Result")


def stolen_seconds(stat: Path = _STAT) -> float:
    """Of all cores since the start, which the hypervisor took while they had work; 0 where the kernel tells nothing."""
    try:
        fields = stat.read_text(encoding="ascii").split("\n", 1)[0].split()
        return int(fields[_STEAL]) / os.sysconf("SC_CLK_TCK")
    except (OSError, IndexError, ValueError):
        return 0.0


@dataclass
class Undisturbed:
    """Makes runs, and again those that were disturbed. `runs` count; of these `disturbed` were so in every try;
    `repeated` were left for another try."""

    say: Callable[[str], None]
    stolen: Callable[[], float] = stolen_seconds
    now: Callable[[], float] = time.monotonic
    runs: int = 0
    repeated: int = 0
    disturbed: int = 0

    def run(self, name: str, work: Callable[[int], Result]) -> Result:
        """What `work(number of the try)` returned in the first try that was not disturbed, or in the last one."""
        for number in range(1, TRIES + 1):
            stolen, begin = self.stolen(), self.now()
            result = work(number)
            percent = 100 * (self.stolen() - stolen) / ((self.now() - begin) * (os.cpu_count() or 1))
            if percent <= MOST_PERCENT:
                break
            is_last = number == TRIES
            self.repeated += not is_last
            self.disturbed += is_last
            then = "in the last try too: it counts" if is_last else "so it is made again"
            self.say(f"    {name}: others had {percent:.1f} % of the cores' time, {then}")
        self.runs += 1
        return result

    def told(self) -> str:
        """A sentence for people."""
        also = f", {self.disturbed} were disturbed in each of {TRIES} tries" if self.disturbed else ""
        return (
            f"{self.repeated} runs beside the {self.runs} that count were made again, as others had more than "
            f"{MOST_PERCENT:g} % of the cores' time{also}"
        )
