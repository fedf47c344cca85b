"""The captured engine as a process: started, watched, asked to end."""

from __future__ import annotations

import subprocess
import time
import urllib.error
import urllib.request

from oracle_server.errors import InvalidArgument
from profiler.capture.launch import CaptureCommand

# Loopback is never behind a proxy.
_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))
_POLL_SECONDS = 0.5
_END_SECONDS = 60.0


class CapturedEngine:
    """One `vllm serve`; use as a context manager. Its output is the terminal's."""

    def __init__(self, command: CaptureCommand) -> None:
        self.base_url = _base_url(command.arguments)
        # The first of the keys the engine takes; one that takes no key takes any.
        self.api_key = _value(command.arguments, "--api-key") or command.environment.get("VLLM_API_KEY") or "none"
        try:
            self._process = subprocess.Popen(command.arguments, env=dict(command.environment), stdin=subprocess.DEVNULL)
        except OSError as error:
            message = f"{command.arguments[0]} does not start: {error}; give the path of vllm in its environment"
            raise InvalidArgument(message, field="command") from None

    def __enter__(self) -> CapturedEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def wait(self) -> int:
        """Until the engine ends; its exit status."""
        return self._process.wait()

    def is_running(self) -> bool:
        return self._process.poll() is None

    def wait_ready(self, timeout_seconds: float) -> bool:
        """Until /health answers 200; False where the engine ended or the time is over."""
        end = time.monotonic() + timeout_seconds
        while self.is_running() and time.monotonic() < end:
            try:
                with _DIRECT.open(f"{self.base_url}/health", timeout=2.0):
                    return True
            except (urllib.error.URLError, OSError):
                time.sleep(_POLL_SECONDS)
        return False

    def stop(self) -> None:
        """End it as a user would; kill it where that takes too long."""
        if self.is_running():
            self._process.terminate()
            try:
                self._process.wait(_END_SECONDS)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()


def _base_url(arguments: tuple[str, ...]) -> str:
    host = _value(arguments, "--host") or "127.0.0.1"
    return f"http://{'127.0.0.1' if host in ('0.0.0.0', '::') else host}:{_value(arguments, '--port') or '8000'}"  # noqa: S104


def _value(arguments: tuple[str, ...], flag: str) -> str:
    for at, argument in enumerate(arguments):
        if argument.startswith(f"{flag}="):
            return argument.partition("=")[2]
        if argument == flag and at + 1 < len(arguments):
            return arguments[at + 1]
    return ""
