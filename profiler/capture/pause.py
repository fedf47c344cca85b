"""A capture that rests: while a run's folder holds a file `paused`, its engine records no steps.

    with paused(run): ...   from outside; pause(run) and resume(run) where no block fits

The threads that write look for the file four times a second. Whoever asks is answered by a file beside each capture
file, `engine.paused` for `engine.capture`: nothing of it is in flight, and all of it is written. A rank rests only once
its scheduler has answered, and the scheduler goes on only once its ranks do: whatever step the scheduler records, the
ranks record too.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from oracle_server.errors import InvalidArgument

PAUSED = "paused"
_LOOK_SECONDS = 0.1
# Writers take four looks each for it, a second together; a machine that is busy takes its time.
_MOST_LOOKS = 300


class Pause:
    """Whether the steps of one capture file are left out just now.

    The writer's thread calls `look` and sets `is_on`; the thread that steps reads it.
    """

    def __init__(self, capture: Path, is_settled: Callable[[], bool]) -> None:
        """`is_settled`: whether no step is half recorded."""
        self.is_on = False
        self._is_settled, self._is_told = is_settled, False
        self._asked, self._told = capture.with_name(PAUSED), capture.with_suffix(f".{PAUSED}")
        kind, of, self._data_parallel_rank = capture.stem.partition("-dp")
        scheduler = capture.with_name(f"engine{of}{self._data_parallel_rank}.{PAUSED}")
        # A rank's scheduler's answer; None: this is the scheduler.
        self._scheduler = None if kind == "engine" else scheduler

    def look(self, is_written: bool) -> None:
        """See what is asked for, and answer. `is_written`: the file has all that was recorded. Raises OSError."""
        is_asked = self._asked.exists()
        if not self.is_on:
            # The answer waits for the next look: the other thread may have read the flag just before.
            self.is_on = is_asked and (self._scheduler is None or self._scheduler.exists())
        elif is_asked:
            if not self._is_told and is_written and self._is_settled():
                self._told.touch()
                self._is_told = True
        elif self._scheduler is not None or not self._rests_a_rank():
            self.is_on = self._is_told = False
            self._told.unlink(missing_ok=True)

    def _rests_a_rank(self) -> bool:
        answers = self._told.parent.glob(f"rank-*.{PAUSED}")
        return any(path.stem.partition("-dp")[2] == self._data_parallel_rank for path in answers)


@contextlib.contextmanager
def paused(run: Path, sleep: Callable[[float], None] = time.sleep) -> Iterator[None]:
    """No step of the block is captured; all steps before it are in the files of `run`. Raises InvalidArgument where
    the engine does not follow within 30 s."""
    pause(run, sleep)
    try:
        yield
    except BaseException:
        (run / PAUSED).unlink(missing_ok=True)
        raise
    resume(run, sleep)


def pause(run: Path, sleep: Callable[[float], None] = time.sleep) -> None:
    """Returns when steps are left out, and all before them are in the files. Raises InvalidArgument where the engine
    does not follow within 30 s: the capture goes on then."""
    captures = {path.stem for path in run.glob("*.capture")}
    if not captures:
        raise InvalidArgument(f"{run} has no capture file: no captured engine has started there", field="capture")
    (run / PAUSED).touch()
    try:
        _wait(run, lambda: _resting(run) >= captures, "does not rest", sleep)
    except BaseException:
        (run / PAUSED).unlink(missing_ok=True)
        raise


def resume(run: Path, sleep: Callable[[float], None] = time.sleep) -> None:
    """Returns when steps are captured again. Raises InvalidArgument where the engine does not follow within 30 s."""
    (run / PAUSED).unlink(missing_ok=True)
    _wait(run, lambda: not _resting(run), "does not go on", sleep)


def _resting(run: Path) -> set[str]:
    return {path.stem for path in run.glob(f"*.{PAUSED}")}


def _wait(run: Path, is_so: Callable[[], bool], otherwise: str, sleep: Callable[[float], None]) -> None:
    for _ in range(_MOST_LOOKS):
        if is_so():
            return
        sleep(_LOOK_SECONDS)
    raise InvalidArgument(
        f"the capture in {run} {otherwise}: its engine has ended or is stopped, or a file cannot be written, which "
        "its output says",
        field="capture",
    )
