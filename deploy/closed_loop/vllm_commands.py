"""Runs vLLM's commands in children of one process that has imported vLLM, which takes longer than a short command.

Runs in vLLM's environment, where nothing of ours is. A line of JSON on standard input for each command, its arguments
and the file its output goes to, and a line on standard output: first `ready`, then each command's exit status.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
import traceback


def main() -> None:
    """Serves until standard input ends."""
    # vLLM writes to standard output while it is imported.
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    _import()
    print("ready", file=replies, flush=True)
    for line in sys.stdin:
        command = json.loads(line)
        child = os.fork()
        if not child:
            os._exit(_run(command["arguments"], command["output"]))
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), file=replies, flush=True)


def _import() -> None:
    """What the commands import before they read their arguments, and what they do most likely then."""
    from vllm.entrypoints.cli.main import main as run

    sys.argv = ["vllm", "bench", "serve", "--help"]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
        run()
    with contextlib.suppress(ImportError):
        from transformers import AutoTokenizer  # noqa: F401


def _run(arguments: list[str], output: str) -> int:
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.argv = ["vllm", *arguments]
    status: object = 0
    try:
        from vllm.entrypoints.cli.main import main as run

        run()
    except SystemExit as end:
        status = end.code
    except BaseException:  # noqa: BLE001  the child must not go on as the parent
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return status if isinstance(status, int) else int(status is not None)


if __name__ == "__main__":
    main()
