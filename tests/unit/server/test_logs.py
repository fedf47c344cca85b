"""Writing a log never waits."""

from __future__ import annotations

import io
import threading
from typing import Any

import pytest
import structlog

from oracle_server import logs
from oracle_server.logs import LogWriter


class Blocked(io.StringIO):
    """A sink that waits until it is let go."""

    def __init__(self) -> None:
        super().__init__()
        self.go = threading.Event()

    def write(self, text: str) -> int:
        self.go.wait(10)
        return super().write(text)


def test_a_blocked_sink_drops_lines_and_counts_them() -> None:
    sink = Blocked()
    dropped: list[int] = []
    writer = LogWriter(sink, lambda: dropped.append(1))
    for i in range(logs.QUEUE_LINES + 500):
        writer.put(str(i))
    assert 498 <= len(dropped) <= 500
    sink.go.set()
    writer.close(10)
    written = len(sink.getvalue().splitlines())
    assert written + len(dropped) == logs.QUEUE_LINES + 500


def test_an_event_is_logged_a_bounded_number_of_times(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "EVENT_LINES", 3)
    dropped: list[int] = []
    limit = logs._Limit(lambda: dropped.append(1))
    lines: list[Any] = []
    for method in ["info"] * 5 + ["error"]:
        try:
            lines.append(limit(None, method, {"event": "attached"}).get("more"))
        except structlog.DropEvent:
            pass
    assert lines == [None, None, "not logged any more in this process", None]
    assert len(dropped) == 2
