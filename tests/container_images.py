"""Images built and run by podman, over a base of Debian's packages: no registry of images is asked."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from environments import REPOSITORY, cache_folder

PACKAGES = ("podman", "runc", "debootstrap")
# What python:3.11-slim-bookworm has, as far as the Dockerfiles use it.
BASE_PACKAGES = "python3,python3-venv,python3-pip,python-is-python3,ca-certificates"
BASE = "localhost/python-base"


def missing() -> str:
    """Why no image can be built here, after trying to install what is missing; "" where one can."""
    if os.geteuid() != 0:
        return "debootstrap and podman's storage take root"
    if shutil.which("apt-get") is None:
        return "the base is made of Debian's packages, and apt-get is missing"
    if any(shutil.which(name) is None for name in PACKAGES):
        for command in (["update", "-qq"], ["install", "-y", "-qq", "--no-install-recommends", *PACKAGES]):
            done = subprocess.run(["apt-get", *command], capture_output=True, text=True)
            if done.returncode != 0:
                return f"{', '.join(PACKAGES)} cannot be installed: {done.stderr.strip()[-200:]}"
    return ""


class Podman:
    """podman with a storage of its own. Owned by the test that made it; the storage goes with `remove`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        # podman takes 50 characters at most, and a test's own folder may have more.
        self._run_folder = Path(tempfile.mkdtemp(prefix="podman-"))
        # crun refuses machines with both versions of cgroups; runc takes them.
        self._options = [f"--root={folder}/root", f"--runroot={self._run_folder}", "--runtime=runc"]

    def __call__(self, *arguments: str | Path, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run a command; with `check` a failure fails the test with its words."""
        command = ["podman", *self._options, "--cgroup-manager=cgroupfs", *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=1800)
        assert done.returncode == 0 or not check, f"{' '.join(command)}: {done.stdout[-2000:]}{done.stderr[-2000:]}"
        return done

    def build(self, name: str, *arguments: str) -> None:
        """Build deploy/docker/NAME.Dockerfile over Debian's Python."""
        if self("image", "exists", BASE, check=False).returncode != 0:
            self("import", "--quiet", _base(), BASE)
        index = self._folder / "pip.conf"
        index.write_text(_package_index())
        dockerfile = REPOSITORY / "deploy" / "docker" / f"{name}.Dockerfile"
        where = ["--isolation=chroot", "--network=host", f"--volume={index}:/etc/pip.conf:ro"]
        # The certificates of this machine: its package index may be a mirror with one of its own.
        where += ["--volume=/etc/ssl/certs:/etc/ssl/certs:ro", f"--build-arg=PYTHON_IMAGE={BASE}", *arguments]
        self("build", "--quiet", "--format=docker", *where, "-f", dockerfile, "-t", f"localhost/{name}", REPOSITORY)

    def remove(self) -> None:
        """Containers, images, storage."""
        self("rm", "--all", "--force", check=False)
        for folder in (self._folder, self._run_folder):
            shutil.rmtree(folder, ignore_errors=True)


def _base() -> Path:
    """The root file system of the base, a tar in the cache."""
    recipe = hashlib.sha256(f"bookworm {BASE_PACKAGES}".encode()).hexdigest()[:16]
    tar = cache_folder() / f"deploy-base-{recipe}.tar"
    tar.parent.mkdir(parents=True, exist_ok=True)
    with tar.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not tar.exists():
            with tempfile.TemporaryDirectory() as root:
                command = ["debootstrap", "--variant=minbase", f"--include={BASE_PACKAGES}", "bookworm", root]
                done = subprocess.run(command, capture_output=True, text=True)
                assert done.returncode == 0, done.stdout[-2000:]
                subprocess.run(["tar", "--create", f"--file={tar}.new", f"--directory={root}", "."], check=True)
            Path(f"{tar}.new").replace(tar)
    return tar


def _package_index() -> str:
    """pip's configuration of where packages are, as this machine has it."""
    listed = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True).stdout
    lines = [line.removeprefix("global.").replace("'", "") for line in listed.splitlines()]
    return "\n".join(["[global]", *(line for line in lines if line.startswith(("index-url=", "extra-index-url=")))])
