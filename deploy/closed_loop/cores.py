"""One core for the model, the others for everything else: a GPU does not share its time with clients either.

Without it a decode step takes as long as its neighbours leave the core alone, and a capture would measure the load of
the machine. Does nothing on a machine with one core.
"""

from __future__ import annotations

import contextlib
import os
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

ALL = frozenset(os.sched_getaffinity(0))
MODEL_CORE = max(ALL)
OTHERS = ALL - {MODEL_CORE} or ALL


@contextlib.contextmanager
def on_other_cores() -> Iterator[None]:
    """What is started in the block, and this process meanwhile, keep off the model's core."""
    os.sched_setaffinity(0, OTHERS)
    try:
        yield
    finally:
        os.sched_setaffinity(0, ALL)


def leave_core_to_the_model(pid: int) -> None:
    """Move every thread of a process and of those it started, but the ones bound to the model's core, to the others.

    vLLM binds its CPU worker by itself, at its start, to a core it is allowed to use: so this comes after the start.
    """
    for process in _tree(pid):
        for thread in _entries(Path(f"/proc/{process}/task")):
            with contextlib.suppress(OSError):  # it has ended
                if os.sched_getaffinity(thread) != {MODEL_CORE}:
                    os.sched_setaffinity(thread, OTHERS)


def _tree(pid: int) -> list[int]:
    children = defaultdict(list)
    for process in _entries(Path("/proc")):
        with contextlib.suppress(OSError, IndexError, ValueError):
            stat = Path(f"/proc/{process}/stat").read_text(encoding="utf-8", errors="replace")
            # The name stands in parentheses and may hold anything; state and parent follow it.
            children[int(stat.rpartition(")")[2].split()[1])].append(process)
    found = [pid]
    for process in found:
        found += children[process]
    return found


def _entries(folder: Path) -> list[int]:
    try:
        return [int(entry.name) for entry in folder.iterdir() if entry.name.isdigit()]
    except OSError:
        return []
