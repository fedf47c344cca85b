"""`vllm serve` ends with status 0 after its engine core died (0.18.1, 0.33.0: seen). A lost oracle must not look like
success.

The engine core leaves its last words in a file named by the environment; the server's first process prints them as its
very last
line and ends with status 1.
"""

import atexit
import os
import sys
import tempfile
from pathlib import Path

_VARIABLE = "STEP_ORACLE_LAST_WORDS"


def watch_for_loss() -> None:
    """Called once, in the server's first process."""
    handle, path = tempfile.mkstemp(prefix="step-oracle-", suffix=".last-words")
    os.close(handle)
    os.environ[_VARIABLE] = path
    atexit.register(_end, Path(path), os.getpid())


def report_loss(message: str) -> None:
    """Called by an engine core whose oracle is lost; the first of several has the last word."""
    path = os.environ.get(_VARIABLE)
    if path and not Path(path).stat().st_size:
        Path(path).write_text(message)


def _end(path: Path, pid: int) -> None:
    if os.getpid() != pid:
        return
    message = path.read_text()
    path.unlink()
    if message:
        sys.stdout.flush()
        print(message, file=sys.stderr, flush=True)
        os._exit(1)
