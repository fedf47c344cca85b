"""What the demo says while it works, and how it says that it cannot go on."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

LOG_LINES = 25


class DemoFailed(Exception):
    """The demo cannot go on; `next_step` is what the person at the terminal can do about it."""

    def __init__(self, message: str, next_step: str) -> None:
        super().__init__(message)
        self.next_step = next_step


class Progress:
    """Prints one line per stage, with the seconds since the demo began. Main thread only."""

    def __init__(self) -> None:
        self._begin = time.monotonic()

    @property
    def seconds(self) -> float:
        """Since the demo began."""
        return time.monotonic() - self._begin

    def say(self, text: str) -> None:
        """One line, visible at once."""
        print(f"[{self.seconds:4.0f} s] {text}", flush=True)


def step_oracle(*arguments: str, next_step: str) -> str:
    """Run the product's command line as a user does; its standard output. DemoFailed holds the command's words."""
    command = [sys.executable, "-m", "profiler.cli", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        said = (done.stderr or done.stdout).strip()
        raise DemoFailed(f"step-oracle {' '.join(arguments)} ended with {done.returncode}: {said}", next_step)
    return done.stdout


def tail(log: Path, lines: int = LOG_LINES) -> str:
    """The last lines of a log, each behind a bar."""
    text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
    return "\n".join(f"  | {line}" for line in text.splitlines()[-lines:])
