"""Ctrl-C and SIGTERM: the first one unwinds the demo, which ends what it started, and no later one disturbs that."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupt:
    """Turns the first signal into KeyboardInterrupt. Main thread only.

    Signals are not masked: children inherit a mask, and an engine that does not hear SIGTERM is hard to end.
    """

    def __init__(self) -> None:
        self.has_come = False
        self._held = False
        for number in SIGNALS:
            signal.signal(number, self._receive)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Raise at the end of the block only: around the start of a process and the note that it has to be ended."""
        self._held = True
        try:
            yield
        finally:
            self._held = False
        if self.has_come:
            raise KeyboardInterrupt

    def _receive(self, _number: int, _frame: FrameType | None) -> None:
        self.has_come = True
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        if not self._held:
            raise KeyboardInterrupt
