"""Programs of Debian packages, downloaded by apt and unpacked into the cache: nothing is installed."""

from __future__ import annotations

import fcntl
import functools
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

from environments import cache_folder


def program(name: str, package: str) -> str:
    """The path of a program: on the PATH, else in the unpacked package; skips the test where neither can be had."""
    found = shutil.which(name)
    if found:
        return found
    folder, why = _unpacked(package, f"usr/bin/{name}")
    if folder is None:
        pytest.skip(f"{name} is not on the PATH and Debian's package {package} cannot be had: {why}")
    return str(folder / "usr/bin" / name)


@functools.cache
def _unpacked(package: str, proof: str) -> tuple[Path | None, str]:
    """(the package's folder, why there is none)."""
    folder = cache_folder() / package
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / f"{package}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if (folder / proof).exists():
            return folder, ""
        if not shutil.which("apt-get") or not shutil.which("dpkg-deb"):
            return None, "this machine has no apt-get"
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            why = _download(package, Path(scratch))
            packages = list(Path(scratch).glob(f"{package}_*.deb"))
            if not packages:
                return None, why
            unpacked = Path(scratch) / "root"
            subprocess.run(["dpkg-deb", "-x", str(packages[0]), str(unpacked)], check=True)
            unpacked.rename(folder)
    return folder, ""


def _download(package: str, folder: Path) -> str:
    """Fetch the package; what apt says where it cannot. A fresh machine has no list of packages yet."""
    said = ""
    for command in (None, ["apt-get", "update", "-qq"]):
        if command is not None:
            subprocess.run(command, capture_output=True, timeout=300, check=False)
        # Not as apt's own user, who may not write into this folder. apt compares the package with its list's digest.
        download = ["apt-get", "download", "-qq", "-o", "APT::Sandbox::User=root", package]
        done = subprocess.run(download, cwd=folder, capture_output=True, text=True, timeout=300, check=False)
        if done.returncode == 0:
            return ""
        said = done.stderr.strip()
    return said
