"""Structured events: JSON lines on stderr through a bounded queue. Writing a log never blocks a step."""

from __future__ import annotations

import logging
import queue
import sys
import threading
from collections.abc import Callable, MutableMapping
from typing import Any, TextIO

import structlog

QUEUE_LINES = 1000
# Events of one name at INFO in the life of a process: engines that come and go for weeks fill no disk.
EVENT_LINES = 10_000


class LogWriter:
    """A queue and the one thread that writes it out. Full queue: the line is dropped and counted."""

    def __init__(self, sink: TextIO, on_drop: Callable[[], None] = lambda: None) -> None:
        self._lines: queue.Queue[str | None] = queue.Queue(QUEUE_LINES)
        self._sink = sink
        self._on_drop = on_drop
        # A daemon: a sink that blocks for ever must not keep the process from ending.
        self._thread = threading.Thread(target=self._write, name="log", daemon=True)
        self._thread.start()

    def put(self, line: str) -> None:
        """Queue one line; never waits."""
        try:
            self._lines.put_nowait(line)
        except queue.Full:
            self._on_drop()

    def close(self, timeout_seconds: float = 1.0) -> None:
        """Write what is queued, for so long at most."""
        try:
            self._lines.put(None, timeout=timeout_seconds)
        except queue.Full:
            return
        self._thread.join(timeout_seconds)

    def _write(self) -> None:
        while (line := self._lines.get()) is not None:
            try:
                self._sink.write(line + "\n")
                self._sink.flush()
            except (OSError, ValueError):
                self._on_drop()


def configure(on_drop: Callable[[], None]) -> tuple[Any, LogWriter]:
    """(logger of the events, its writer); the standard library's warnings, gRPC's among them, take the same way."""
    writer = LogWriter(sys.stderr, on_drop)
    structlog.configure(
        processors=[
            _Limit(on_drop),
            structlog.stdlib.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.JSONRenderer(),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        logger_factory=lambda *_: _LineLogger(writer),
        cache_logger_on_first_use=True,
    )
    root = logging.getLogger()
    root.handlers[:] = [_Handler(writer)]
    root.setLevel(logging.WARNING)
    return structlog.get_logger(), writer


class _Limit:
    """Drops and counts what exceeds EVENT_LINES; the last line of an event says so."""

    def __init__(self, on_drop: Callable[[], None]) -> None:
        self._seen: dict[str, int] = {}
        self._on_drop = on_drop

    def __call__(self, logger: Any, method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
        name = str(event.get("event"))
        seen = self._seen[name] = self._seen.get(name, 0) + 1
        if method != "info" or seen < EVENT_LINES:
            return event
        if seen == EVENT_LINES:
            event["more"] = "not logged any more in this process"
            return event
        self._on_drop()
        raise structlog.DropEvent


class _LineLogger:
    """What structlog calls with the rendered line."""

    def __init__(self, writer: LogWriter) -> None:
        self._writer = writer

    def msg(self, line: str) -> None:
        """Queue the line."""
        self._writer.put(line)

    debug = info = warning = error = critical = msg


class _Handler(logging.Handler):
    def __init__(self, writer: LogWriter) -> None:
        super().__init__()
        self._writer = writer
        self._renderer = structlog.processors.JSONRenderer()

    def emit(self, record: logging.LogRecord) -> None:
        event: MutableMapping[str, Any] = {
            "event": record.getMessage(),
            "level": record.levelname.lower(),
            "logger": record.name,
        }
        if record.exc_info:
            event["trace"] = logging.Formatter().formatException(record.exc_info)
        self._writer.put(str(self._renderer(None, "", event)))
