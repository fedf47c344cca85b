"""The compiled load client: built once per source, run on a core of its own, read back."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import struct
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from environments import cache_folder
from performance.load.script import Script
from step_oracle.v1 import step_pb2

_FLAGS = ("-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror")
_TIMES_COLUMNS = 5


class NoCompiler(RuntimeError):
    """There is no C compiler."""


class LoadFailed(RuntimeError):
    """The load client could not do what it was asked, or a connection ended with an error."""


@dataclass(frozen=True)
class LoadRun:
    """What one run saw. Times in ns from its begin; a message is one step, or counts alone."""

    # Why it ended: answered, drained (something was never answered), time or signal.
    end: str
    engines: int
    failed_engines: int
    first_error: str
    messages: int
    sent: int
    answered: int
    # Of time.monotonic_ns().
    begin_ns: int
    steps: int
    leases: int
    pushes: int
    # How often an engine had to wait: for the server's flow control, for room in the socket.
    window_stalls: int
    socket_stalls: int
    wall_ns: int
    last_answer_ns: int
    own_cpu_ns: int
    server_cpu_ns: int
    # How long the server's threads were ready to run and had no core: the noise of the machine.
    server_waited_ns: int
    # Of each message that asks for a step: when it was due, sent and answered; -1 where it was not.
    due_ns: NDArray[np.int64]
    sent_ns: NDArray[np.int64]
    answered_ns: NDArray[np.int64]
    # (engine, reply) in the order of arrival, where they were asked for.
    replies: list[tuple[int, step_pb2.StepReply]]

    @property
    def latency_ns(self) -> NDArray[np.int64]:
        """From due to answered, so time spent waiting to be sent counts; what was never answered lasts to the end."""
        done: NDArray[np.int64] = np.where(self.answered_ns < 0, self.wall_ns, self.answered_ns)
        return done - self.due_ns

    @property
    def send_lateness_ns(self) -> NDArray[np.int64]:
        """How late the generator itself was."""
        sent = self.sent_ns >= 0
        late: NDArray[np.int64] = self.sent_ns[sent] - self.due_ns[sent]
        return late

    @property
    def own_core(self) -> float:
        """Share of its core the generator used."""
        return self.own_cpu_ns / self.wall_ns

    @property
    def server_core(self) -> float:
        """Cores the server used."""
        return self.server_cpu_ns / self.wall_ns

    @property
    def server_waited(self) -> float:
        """Cores' worth of time the server waited for its core."""
        return self.server_waited_ns / self.wall_ns

    @property
    def kept_up(self) -> bool:
        """Everything was sent and answered, and no connection failed."""
        return self.end == "answered" and not self.failed_engines

    def headroom(self) -> str:
        """One line that shows whether the generator was the limit."""
        late = np.percentile(self.send_lateness_ns, (50, 99)) / 1e3 if self.send_lateness_ns.size else (0, 0)
        return (
            f"generator: {self.own_core:.0%} of its core, sends late by {late[0]:.0f} us p50, {late[1]:.0f} us p99; "
            f"held back by flow control {self.window_stalls}, by the socket {self.socket_stalls} times"
        )


def build_client() -> Path:
    """The compiled client, from the cache where these sources were compiled before; NoCompiler, LoadFailed."""
    compiler = shutil.which(os.environ.get("CC", "cc")) or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise NoCompiler("the load generator is a small C program and there is no C compiler: install gcc or clang")
    folder = Path(__file__).parent
    sources = sorted(folder.glob("*.[ch]"))
    recipe = hashlib.sha256(" ".join((compiler, *_FLAGS)).encode())
    for source in sources:
        recipe.update(source.name.encode() + b"\0" + source.read_bytes())
    program = cache_folder() / f"load-{recipe.hexdigest()[:16]}"
    if not program.exists():
        program.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=program.parent) as build:
            made = Path(build) / "load"
            inputs = [str(source) for source in sources if source.suffix == ".c"]
            done = subprocess.run([compiler, *_FLAGS, "-o", str(made), *inputs], capture_output=True, text=True)
            if done.returncode:
                raise LoadFailed(f"{compiler} refuses the load generator: {done.stderr[-2000:]}")
            made.replace(program)
    return program


def run_load(
    script: Script,
    target: str,
    *,
    closed: bool = False,
    core: int | None = None,
    server_pids: Sequence[int] = (),
    max_seconds: float = 60.0,
    drain_seconds: float = 2.0,
    answers: bool = False,
    may_fail: bool = False,
) -> LoadRun:
    """Play the script against a server on loopback; LoadFailed where a connection ends with an error, unless it may.

    `closed`: each engine has one message in flight, whatever the times say. `core` is the one the client runs on.
    """
    program = build_client()
    with tempfile.TemporaryDirectory(prefix="step-oracle-load-") as name:
        folder = Path(name)
        script.write(folder / "script")
        command = [str(program), str(folder / "script"), "--target", target, "--times", str(folder / "times")]
        command += ["--max-seconds", str(max_seconds), "--drain-seconds", str(drain_seconds)]
        command += ["--closed"] if closed else []
        command += ["--answers", str(folder / "answers")] if answers else []
        for pid in server_pids:
            command += ["--server-pid", str(pid)]
        summary = _run(command, core, max_seconds + drain_seconds + 60)
        times = np.fromfile(folder / "times", dtype=np.int64).reshape(-1, _TIMES_COLUMNS)
        replies = _read_replies((folder / "answers").read_bytes()) if answers else []
    times = times[times[:, 1] > 0]
    run = LoadRun(**summary, due_ns=times[:, 2], sent_ns=times[:, 3], answered_ns=times[:, 4], replies=replies)
    if run.failed_engines and not may_fail:
        raise LoadFailed(f"{run.failed_engines} of {run.engines} connections failed, the first with: {run.first_error}")
    return run


def _run(command: list[str], core: int | None, limit_seconds: float) -> dict[str, Any]:
    allowed = os.sched_getaffinity(0)
    try:
        # Children inherit where their parent may run.
        os.sched_setaffinity(0, allowed if core is None else {core})
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    finally:
        os.sched_setaffinity(0, allowed)
    try:
        output, errors = process.communicate(timeout=limit_seconds)
    except BaseException:
        process.send_signal(signal.SIGTERM)
        process.kill()
        process.wait()
        raise
    if process.returncode:
        raise LoadFailed(f"the load generator ended with {process.returncode}: {errors.strip()}")
    summary: dict[str, Any] = json.loads(output)
    return summary


def _read_replies(data: bytes) -> list[tuple[int, step_pb2.StepReply]]:
    replies = []
    position = 0
    while position < len(data):
        engine, size = struct.unpack_from("<II", data, position)
        position += 8
        replies.append((engine, step_pb2.StepReply.FromString(data[position : position + size])))
        position += size
    return replies
