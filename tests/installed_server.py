"""The server installed as its image does: the wheel with the extras of the image, the image's exact versions.

What comes from the package index lies in the cache; the wheel of this checkout is built and installed anew by each test
run, into a copy of links to the cached files.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from environments import REPOSITORY, cached_venv

CONSTRAINTS = REPOSITORY / "deploy" / "docker" / "server-constraints.txt"
DOCKERFILES = {name: REPOSITORY / "deploy" / "docker" / f"{name}.Dockerfile" for name in ("server", "engine")}


@dataclass(frozen=True)
class Instruction:
    """One instruction of a Dockerfile: the stage it is in (its name, or "" for the last one), keyword, argument."""

    stage: str
    keyword: str
    argument: str


def instructions(dockerfile: Path) -> Iterator[Instruction]:
    """The instructions of a Dockerfile, continuation lines joined and comments dropped."""
    stage = ""
    lines = [line for line in dockerfile.read_text().splitlines() if not line.lstrip().startswith("#")]
    for line in re.sub(r"\\\n", " ", "\n".join(lines)).splitlines():
        keyword, _, argument = line.strip().partition(" ")
        if not keyword:
            continue
        if keyword == "FROM":
            stage = argument.partition(" AS ")[2]
        yield Instruction(stage, keyword, " ".join(argument.split()))


def constraints() -> tuple[str, ...]:
    """name==version of everything in the server's image beside step-oracle."""
    return tuple(line for line in CONSTRAINTS.read_text().splitlines() if line and not line.startswith("#"))


def install_server(folder: Path) -> Path:
    """An environment in `folder` with the server and nothing else; its bin folder."""
    cached = cached_venv("deploy-server", constraints()).parent.parent
    venv = folder / "venv"
    shutil.copytree(cached, venv, symlinks=True, copy_function=_link)
    # A file with two names would be written in both places.
    (venv / "pyvenv.cfg").unlink()
    shutil.copy(cached / "pyvenv.cfg", venv / "pyvenv.cfg")
    python = venv / "bin" / "python"
    wheels = folder / "wheels"
    _run(sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", wheels, REPOSITORY)
    (wheel,) = wheels.glob("step_oracle-*.whl")
    _run(python, "-m", "pip", "install", "--no-index", "--constraint", CONSTRAINTS, f"{wheel}[server,oci,postgres]")
    return venv / "bin"


def plain_environment(bin_folder: Path, variables: Mapping[str, str]) -> dict[str, str]:
    """The environment of a container or a service: a search path and what is given, nothing of this process."""
    return {"PATH": f"{bin_folder}:/usr/local/bin:/usr/bin:/bin", "HOME": "/nonexistent", **variables}


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def _run(*command: str | Path) -> None:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
