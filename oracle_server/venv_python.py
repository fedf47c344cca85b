"""The Python of a virtual environment as a tool: its scripts and its pip, with their output in a log.

Standard library only.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import time
from pathlib import Path

HEARTBEAT_SECONDS = 15.0
# Lines of pip's that tell a user nothing, such as a configured index folder that is not there.
_PIP_NOISE = re.compile(r"WARNING:|DEPRECATION:|\[notice\]")


class InstallFailed(Exception):
    """An environment is not as it should be; the message says what happened, `next_step` what to do."""

    def __init__(self, message: str, next_step: str) -> None:
        super().__init__(message)
        self.next_step = next_step


class VenvPython:
    """Runs the Python of one environment. Whoever holds the environment's lock owns it; one thread."""

    def __init__(self, venv: Path, log: Path) -> None:
        self.path = venv / "bin" / "python"
        self._log = log

    def has_pip(self) -> bool:
        if not self.path.exists():
            return False
        done = subprocess.run([self.path, "-m", "pip", "--version"], capture_output=True, check=False)
        return done.returncode == 0

    def pip(self, arguments: list[str], hint: str) -> None:
        """Run pip. Raises InstallFailed, with `hint` for the next step where the output tells no better one."""
        self.command([str(self.path), "-m", "pip", *arguments], hint)

    def output(self, arguments: list[str], hint: str, stdin: str = "") -> str:
        """Standard output of Python with these arguments. Raises InstallFailed."""
        command = [str(self.path), *arguments]
        done = subprocess.run(
            command, input=stdin, capture_output=True, text=True, env=_environment(), cwd=self._log.parent, check=False
        )
        with self._log.open("a", encoding="utf-8") as log:
            log.write(done.stderr)
        if done.returncode != 0:
            raise InstallFailed(f"{shlex.join(command)[:120]} failed: {told(done.stderr)}", hint)
        return done.stdout

    def command(self, command: list[str], hint: str) -> None:
        """Run it, its output in the log; every 15 s a line says how far it is. Raises InstallFailed."""
        with self._log.open("a", encoding="utf-8") as log:
            log.write(f"\n$ {shlex.join(command)}\n")
        begin, start = time.monotonic(), self._log.stat().st_size
        with (
            self._log.open("ab") as log_bytes,
            subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log_bytes,
                stderr=subprocess.STDOUT,
                env=_environment(),
                cwd=self._log.parent,
            ) as process,
        ):
            while process.poll() is None:
                try:
                    process.wait(HEARTBEAT_SECONDS)
                except subprocess.TimeoutExpired:
                    last = (self._logged_since(start).splitlines() or ["started"])[-1].strip()
                    print(f"      {time.monotonic() - begin:.0f} s: {last[:100]}", flush=True)
        if process.returncode != 0:
            output = self._logged_since(start)
            what = shlex.join(["pip", *command[3:]] if command[1:3] == ["-m", "pip"] else command)
            raise InstallFailed(f"{what[:160]} failed: {told(output)}", _next_step(output, hint, self._log))

    def _logged_since(self, offset: int) -> str:
        with self._log.open("rb") as log:
            log.seek(offset)
            lines = log.read().decode(errors="replace").splitlines()
        return "\n".join(line for line in lines if not _PIP_NOISE.match(line))


def site_packages(python: Path) -> Path:
    """The folder pip installs into: asked of the Python itself, which an environment's name does not tell."""
    code = "import sysconfig; print(sysconfig.get_path('platlib'))"
    try:
        done = subprocess.run([python, "-I", "-c", code], capture_output=True, text=True, check=False)
    except OSError as error:
        raise InstallFailed(f"{python} does not run: {error}", "name a virtual environment") from error
    if done.returncode != 0:
        message = f"{python} does not run: {told(done.stderr)}"
        raise InstallFailed(message, "remove the environment and run the same command again")
    return Path(done.stdout.strip())


def told(output: str) -> str:
    """The lines of an output that say what went wrong: pip's errors, else its last words. Never pip's warnings."""
    lines = [line for line in output.splitlines() if line.strip() and not _PIP_NOISE.match(line)]
    errors = [line for line in lines if line.startswith("ERROR:")]
    return "\n       ".join((errors or lines)[-4:]) or "no output"


def _environment() -> dict[str, str]:
    """This process's environment without what would send pip or Python elsewhere, or switch the shim on."""
    dropped = {"PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "PIP_USER", "PIP_TARGET", "PIP_PREFIX", "STEP_ORACLE_TARGET"}
    kept = {name: value for name, value in os.environ.items() if name not in dropped}
    quiet = {"PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_NO_INPUT": "1", "PIP_PROGRESS_BAR": "off"}
    return kept | quiet | {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "PYTHONUNBUFFERED": "1"}


def _next_step(output: str, hint: str, log: Path) -> str:
    if "No space left on device" in output:
        return "free some space, then run the same command again; finished stages are kept"
    if re.search(r"Temporary failure|Max retries|timed out|NewConnectionError|ConnectionReset|ProxyError", output):
        return "check the network, then run the same command again; finished stages are kept"
    return f"{hint} (whole output: {log})"
