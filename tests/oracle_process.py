"""A real `step-oracle serve` on loopback, for tests."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from oracle_server.rpc.channel import ANONYMOUS, Access, open_channel

_READY = re.compile(r"^step-oracle: ready at (?P<addresses>.*); metrics (?P<metrics>\S+); state ", re.MULTILINE)


class OracleFailed(AssertionError):
    """The server ended or did not become ready; the message ends with the last lines of its log."""


class OracleProcess:
    """One oracle server over a state folder. Owned by the test that made it; use as a context manager.

    The first start takes a free port, later starts take the same one, so that clients find a restarted server. The
    environment given to it holds no STEP_ORACLE_* variable but those of `extra_env`.
    """

    def __init__(
        self,
        state_dir: Path,
        *,
        listen: Sequence[str] = ("127.0.0.1:0",),
        metrics: str = "off",
        arguments: Sequence[str] = (),
        extra_env: Mapping[str, str] | None = None,
        access: Access = ANONYMOUS,
    ) -> None:
        self.state_dir = state_dir
        self.stdout_path = state_dir.parent / f"{state_dir.name}.stdout"
        self.stderr_path = state_dir.parent / f"{state_dir.name}.stderr"
        self.metrics_url = ""
        self._listen = tuple(listen)
        self._targets = self._listen
        self._arguments = tuple(arguments)
        self._metrics = metrics
        self._access = access
        self._extra_env = dict(extra_env or {})
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> OracleProcess:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def target(self) -> str:
        """Its first address, for a channel."""
        return self._targets[0]

    @property
    def targets(self) -> tuple[str, ...]:
        """All its addresses."""
        return self._targets

    @property
    def pid(self) -> int:
        return self._running.pid

    @property
    def returncode(self) -> int | None:
        """None while it runs."""
        return self._running.poll()

    @property
    def log(self) -> str:
        """Everything it wrote to stderr so far: one JSON object per line."""
        return self.stderr_path.read_text() if self.stderr_path.exists() else ""

    def start(self, timeout_seconds: float = 120.0, *, wait: bool = True) -> OracleProcess:
        """Start it and wait until its health is SERVING; the first start ever compiles kernels."""
        assert self._process is None or self._process.poll() is not None, "it runs already"
        command = [sys.executable, "-m", "profiler.cli"] if not _command() else [_command()]
        command += ["serve", "--state-dir", str(self.state_dir), "--metrics", self._metrics, *self._arguments]
        for address in self._listen:
            command += ["--listen", address]
        variables = {name: value for name, value in os.environ.items() if not name.startswith("STEP_ORACLE_")}
        self.state_dir.parent.mkdir(parents=True, exist_ok=True)
        self.stdout_path.write_bytes(b"")
        with self.stdout_path.open("ab") as stdout, self.stderr_path.open("ab") as stderr:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
                env=variables | self._extra_env,
                start_new_session=True,
            )
        if wait:
            self.wait_ready(timeout_seconds)
        return self

    def wait_ready(self, timeout_seconds: float = 120.0) -> None:
        """Wait for the ready line and SERVING; OracleFailed when the process ends first or the time is over."""
        end = time.monotonic() + timeout_seconds
        while time.monotonic() < end:
            if self._running.poll() is not None:
                raise OracleFailed(f"the server ended with {self._running.returncode}: {self.log[-3000:]}")
            ready = _READY.search(self.stdout_path.read_text())
            if ready:
                self._targets = tuple(ready["addresses"].split(", "))
                sockets = [address for address in self._listen if address.startswith("unix:")]
                self._listen = (*(a for a in self._targets if not a.startswith("unix:")), *sockets)
                self.metrics_url = ready["metrics"]
                if self.is_serving():
                    return
            time.sleep(0.02)
        raise OracleFailed(f"the server is not ready after {timeout_seconds} s: {self.log[-3000:]}")

    def is_serving(self, service: str = "step_oracle.v1.OracleService") -> bool:
        """What its health says of a service."""
        with self.channel() as channel:
            try:
                request = health_pb2.HealthCheckRequest(service=service)
                answer = health_pb2_grpc.HealthStub(channel).Check(request, timeout=5)
            except grpc.RpcError:
                return False
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)

    def channel(self) -> grpc.Channel:
        """A new connection to its first address; the caller closes it."""
        return open_channel(self.target, self._access)

    def kill(self) -> None:
        """kill -9, and wait for the end."""
        self._signal(signal.SIGKILL)
        self._running.wait(10)

    def terminate(self, timeout_seconds: float = 15.0) -> int:
        """SIGTERM, and the exit status."""
        self._signal(signal.SIGTERM)
        return self._running.wait(timeout_seconds)

    def stop(self) -> None:
        """End it whatever its state; no error if it has ended."""
        if self._process is not None and self._process.poll() is None:
            try:
                self.terminate()
            except subprocess.TimeoutExpired:
                self.kill()

    @property
    def _running(self) -> subprocess.Popen[bytes]:
        assert self._process is not None, "it was never started"
        return self._process

    def _signal(self, number: int) -> None:
        if self._running.poll() is None:
            os.killpg(self._running.pid, number)


def _command() -> str:
    path = Path(sys.executable).with_name("step-oracle")
    return str(path) if path.exists() else ""
