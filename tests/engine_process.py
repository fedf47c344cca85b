"""A real `vllm serve` on loopback, for tests."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

from environments import VllmEnvironment, cache_folder

_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class EngineFailed(AssertionError):
    """The engine ended or did not become ready; the message ends with the last lines of its log."""


class EngineProcess:
    """One vLLM server in its own process group. Owned by the test that made it; use as a context manager.

    `target` is the oracle server's address, None to leave the shim asleep. `site` is a shim_site. The environment given
    to vLLM holds no STEP_ORACLE_* variable but the target and those of `extra_env`.
    """

    def __init__(
        self,
        environment: VllmEnvironment,
        model_dir: Path,
        *,
        target: str | None,
        site: Path,
        log_path: Path,
        extra_args: Sequence[str] = (),
        extra_env: Mapping[str, str] | None = None,
        port: int | None = None,
        own_session: bool = True,
    ) -> None:
        """`own_session`: Linux shares a core between sessions first and between their threads then."""
        self.port = port or free_port()
        self.base_url = f"http://127.0.0.1:{self.port}"
        self.log_path = log_path
        command = [str(environment.python), "-m", "vllm.entrypoints.cli.main", "serve", str(model_dir)]
        command += ["--host", "127.0.0.1", "--port", str(self.port), "--load-format", "dummy", *extra_args]
        variables = engine_variables(site, target) | dict(extra_env or {})
        with log_path.open("ab") as log:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=variables,
                start_new_session=own_session,
                process_group=None if own_session else 0,
            )

    def __enter__(self) -> EngineProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        """None while it runs."""
        return self._process.poll()

    def wait_ready(self, timeout_seconds: float = 240.0) -> EngineProcess:
        """Wait until /health answers 200. Raises EngineFailed when the process ends first or the time is over."""
        end = time.monotonic() + timeout_seconds
        while time.monotonic() < end:
            if self.returncode is not None:
                raise EngineFailed(f"vllm serve ended with {self.returncode} before it was ready\n{self.log_tail()}")
            try:
                with _DIRECT.open(f"{self.base_url}/health", timeout=2.0):
                    return self
            except (urllib.error.URLError, OSError):
                time.sleep(0.25)
        raise EngineFailed(f"vllm serve was not ready after {timeout_seconds:.0f} s\n{self.log_tail()}")

    def wait(self, timeout_seconds: float = 60.0) -> int:
        """Wait until the server ends by itself; its exit status. Raises EngineFailed when it does not."""
        try:
            return self._process.wait(timeout_seconds)
        except subprocess.TimeoutExpired:
            message = f"vllm serve still ran after {timeout_seconds:.0f} s\n{self.log_tail()}"
            raise EngineFailed(message) from None

    def stop(self, timeout_seconds: float = 20.0) -> int:
        """End the server as a user would, then whatever of its group is left; the server's exit status."""
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(timeout_seconds)
            except subprocess.TimeoutExpired:
                pass
        try:
            # The group outlives its leader while a child is left, so its number cannot belong to another yet.
            os.killpg(self._process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        return self._process.wait()

    def log_text(self) -> str:
        return self.log_path.read_text(encoding="utf-8", errors="replace")

    def log_tail(self, lines: int = 60) -> str:
        """The last lines of the server's output."""
        return "\n".join(self.log_text().splitlines()[-lines:])


def engine_variables(site: Path, target: str | None) -> dict[str, str]:
    """The environment of a process that runs vLLM with this package on its path."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("STEP_ORACLE_", "VLLM_"))}
    variables = kept | {
        "PYTHONPATH": str(site),
        # Nothing is reported, fetched or listened to outside this machine.
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_HOST_IP": "127.0.0.1",
        # The first start inspects the model's class for about 10 s and keeps the result here.
        "VLLM_CACHE_ROOT": str(cache_folder() / "vllm-cache"),
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    return variables | ({"STEP_ORACLE_TARGET": target} if target is not None else {})


def free_port() -> int:
    """A TCP port of loopback that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
