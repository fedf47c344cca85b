"""promtool and prometheus for tests: those on the PATH, else those of Debian's package, unpacked into the cache."""

from __future__ import annotations

import fcntl
import functools
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

from environments import cache_folder


def promtool() -> str:
    """The path of promtool; skips the test where it is not to be had, and says why."""
    return _tool("promtool")


def prometheus() -> str:
    """The path of prometheus; skips as promtool does."""
    return _tool("prometheus")


def _tool(name: str) -> str:
    found = shutil.which(name)
    if found:
        return found
    folder, why = _unpacked()
    if folder is None:
        pytest.skip(f"{name} is not on the PATH and Debian's package cannot be had: {why}")
    return str(folder / "usr/bin" / name)


@functools.cache
def _unpacked() -> tuple[Path | None, str]:
    """(the package's folder, why there is none)."""
    folder = cache_folder() / "prometheus"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / "prometheus.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if (folder / "usr/bin/promtool").exists():
            return folder, ""
        if not shutil.which("apt-get") or not shutil.which("dpkg-deb"):
            return None, "this machine has no apt-get"
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            why = _download(Path(scratch))
            packages = list(Path(scratch).glob("prometheus_*.deb"))
            if not packages:
                return None, why
            unpacked = Path(scratch) / "root"
            subprocess.run(["dpkg-deb", "-x", str(packages[0]), str(unpacked)], check=True)
            unpacked.rename(folder)
    return folder, ""


def _download(folder: Path) -> str:
    """Fetch the package; what apt says where it cannot. A fresh machine has no list of packages yet."""
    said = ""
    for command in (None, ["apt-get", "update", "-qq"]):
        if command is not None:
            subprocess.run(command, capture_output=True, timeout=300, check=False)
        # Not as apt's own user, who may not write into this folder.
        download = ["apt-get", "download", "-qq", "-o", "APT::Sandbox::User=root", "prometheus"]
        done = subprocess.run(download, cwd=folder, capture_output=True, text=True, timeout=300, check=False)
        if done.returncode == 0:
            return ""
        said = done.stderr.strip()
    return said
