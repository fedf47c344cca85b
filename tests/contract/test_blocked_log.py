"""A log nobody reads: steps go on, what is lost is counted, what is written is whole."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import threading
import urllib.request
from pathlib import Path
from typing import IO

import grpc
import pytest

from oracle_calls import Calls, decode, identity
from oracle_server.logs import QUEUE_LINES
from sharded_server import wait_for

# Each refusal is a line of some 600 bytes: the pipe takes 64 KiB of them, the queue its lines, the rest is dropped.
REFUSALS = QUEUE_LINES + 700


def test_a_log_nobody_reads_stops_no_step_and_every_lost_line_is_counted(
    pack_dirs: dict[str, Path], tmp_path: Path
) -> None:
    command = [str(Path(sys.executable).with_name("step-oracle")), "serve", "--state-dir", str(tmp_path / "state")]
    command += ["--listen", "127.0.0.1:0", "--metrics", "127.0.0.1:0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        ready = process.stdout.readline()
        try:
            with Calls(ready.split(" at ")[1].split(";")[0]) as calls:
                calls.create(calls.upload(pack_dirs["constant"]))
                stream = calls.join("e")
                for i in range(REFUSALS):
                    with pytest.raises(grpc.RpcError):
                        calls.attach(identity(f"e{i}" + "x" * 200), device_generation=9)
                    if i % 10 == 0:
                        assert stream.ask(decode(i))
                dropped = dropped_lines(ready)
                assert dropped > 0
                # Somebody reads at last: everything that was not dropped is there, each line whole.
                lines = Lines(process.stderr)
                wait_for(lambda: lines.refused == REFUSALS - dropped)
                assert dropped_lines(ready) == dropped
                stream.close()
            process.send_signal(signal.SIGTERM)
            assert process.wait(15) == 0
            lines.thread.join(15)
        finally:
            process.kill()


class Lines:
    """Reads a log on a thread of its own and counts the refusals in it."""

    def __init__(self, log: IO[str]) -> None:
        self.refused = 0
        self.thread = threading.Thread(target=self._read, args=(log,), daemon=True)
        self.thread.start()

    def _read(self, log: IO[str]) -> None:
        for line in log:
            self.refused += json.loads(line)["event"] == "refused"


def dropped_lines(ready: str) -> int:
    """What its metrics say."""
    found = re.search(r"metrics (\S+);", ready)
    assert found is not None
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    text = opener.open(found[1], timeout=10).read().decode()
    count = re.search(r"^step_oracle_log_lines_dropped_total (\S+)$", text, re.MULTILINE)
    assert count is not None
    return int(float(count[1]))
