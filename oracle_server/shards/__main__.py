"""Entry point of a shard: `python -m oracle_server.shards TASK`. Its parent starts it; nobody else does."""

from __future__ import annotations

import ctypes
import signal
import sys

_PR_SET_PDEATHSIG = 1

if __name__ == "__main__":
    # A signal to the process group or the unit is the parent's to act on: it drains its shards. Before anything heavy
    # is imported, so that none comes too early.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # The end of the life line is read by a process that runs. One that is stopped when its parent dies could go on
    # later and answer from a generation that the next server has left.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    from oracle_server.shards.shard import main

    main(sys.argv[1])
