"""A real systemd, PID 1 of namespaces of its own, over a throw-away view of this machine's files."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

from environments import REPOSITORY

BOOT = REPOSITORY / "tests" / "deploy" / "boot_systemd.sh"
CGROUPS = Path("/sys/fs/cgroup")


def missing() -> str:
    """Why systemd cannot be booted here; "" where it can."""
    if os.geteuid() != 0:
        return "systemd is booted in namespaces, which takes root"
    if absent := [name for name in ("unshare", "nsenter", "pivot_root") if shutil.which(name) is None]:
        return f"{', '.join(absent)} of util-linux is missing"
    if not Path("/lib/systemd/systemd").exists():
        return "/lib/systemd/systemd is missing (Debian: apt-get install systemd)"
    # Two of them would contend for the groups of this machine.
    if Path("/run/systemd/system").exists():
        return "a systemd manages this machine's cgroups already"
    if not (CGROUPS / "memory").is_dir():
        return "it was only tried with cgroups of version 1, which this machine does not have"
    probe = subprocess.run(["unshare", "--mount", "--pid", "--fork", "true"], capture_output=True, text=True)
    return f"namespaces are not allowed: {probe.stderr.strip()}" if probe.returncode else ""


class BootedSystemd:
    """systemd with one unit folder and the installed server at /opt/step-oracle. Use as a context manager."""

    def __init__(self, folder: Path, *, bin_folder: Path, units: Path, variables: Mapping[str, str]) -> None:
        self._log = folder / "boot.log"
        scratch, environment = folder / "scratch", folder / "step-oracle.env"
        scratch.mkdir()
        self._groups_before = set(_groups())
        # The Python of tests may have its library beside it, where the moved one does not look.
        given = {**variables, "LD_LIBRARY_PATH": "/opt/python/lib"}
        environment.write_text("".join(f"{name}={value}\n" for name, value in given.items()))
        namespaces = ["unshare", "--pid", "--mount", "--fork", "--uts", "--ipc", "--kill-child"]
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [*namespaces, str(BOOT), *map(str, (scratch, bin_folder.parent, sys.base_prefix, units, environment))],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        self._init = 0

    def __enter__(self) -> BootedSystemd:
        try:
            self._wait_until_up(30.0)
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Its namespaces, processes and mounts end with it; the groups it made do not. One with a process in it stays.
        self._process.send_signal(signal.SIGKILL)
        self._process.wait()
        end = time.monotonic() + 10
        while self._init and Path(f"/proc/{self._init}").exists() and time.monotonic() < end:
            time.sleep(0.05)
        for group in reversed(_groups()):
            if group not in self._groups_before:
                with contextlib.suppress(OSError):
                    group.rmdir()

    @property
    def root(self) -> Path:
        """Its root folder, seen from outside."""
        return Path(f"/proc/{self._init}/root")

    def systemctl(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """systemctl, inside."""
        return self.run("systemctl", *arguments)

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        """A command inside, as root."""
        inside = ["nsenter", "--target", str(self._init), "--pid", "--mount", "--root", "--wdns=/"]
        return subprocess.run([*inside, *command], capture_output=True, text=True, check=False, timeout=150)

    def _wait_until_up(self, timeout_seconds: float) -> None:
        end = time.monotonic() + timeout_seconds
        while time.monotonic() < end:
            assert self._process.poll() is None, f"systemd did not boot: {self._log.read_text()}"
            self._init = self._first_child()
            if self._init and self.systemctl("is-active", "basic.target").returncode == 0:
                return
            time.sleep(0.1)
        raise AssertionError(f"systemd is not up after {timeout_seconds:.0f} s: {self._log.read_text()}")

    def _first_child(self) -> int:
        children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children").read_text().split()
        if not children:
            return 0
        # Until it has become systemd, it is the script, in the old root.
        return int(children[0]) if Path(f"/proc/{children[0]}/comm").read_text() == "systemd\n" else 0


def _groups() -> list[Path]:
    """The groups of the hierarchies systemd is given, parents before children."""
    return [folder for name in ("memory", "systemd") for folder in sorted((CGROUPS / name).rglob("*/"))]
