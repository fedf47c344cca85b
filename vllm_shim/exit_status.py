"""`vllm serve` ends with status 0 after its engine core died (0.18.1, 0.33.0: seen). A lost oracle must not look like
success.

The engine core leaves its last words in a file named by the environment; the server's first process prints them as its
very last
line and ends with status 1.
"""

import atexit
import os
import secrets
import sys
import tempfile
from pathlib import Path

_VARIABLE = "STEP_ORACLE_LAST_WORDS"


def watch_for_loss() -> None:
    """Called once, in the server's first process."""
    path = Path(tempfile.gettempdir(), f"step-oracle-{os.getpid()}-{secrets.token_hex(8)}.last-words")
    os.environ[_VARIABLE] = str(path)
    atexit.register(_end, path, os.getpid())


def report_loss(message: str) -> None:
    """Called by an engine core that ends; the first of several has the last word."""
    path = os.environ.get(_VARIABLE)
    if path and not Path(path).exists():
        Path(path).write_text(message)


def _end(path: Path, pid: int) -> None:
    if os.getpid() != pid or not path.exists():
        return
    message = path.read_text()
    path.unlink()
    sys.stdout.flush()
    print(message, file=sys.stderr, flush=True)
    os._exit(1)
