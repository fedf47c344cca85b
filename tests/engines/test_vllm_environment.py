"""vLLM stays as its authors made it: no file touched, no pin moved."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from environments import REPOSITORY, VllmEnvironment
from oracle_server import vllm_install

pytestmark = pytest.mark.vllm


def test_every_file_of_vllm_is_the_wheels(vllm: VllmEnvironment, capsys: pytest.CaptureFixture[str]) -> None:
    venv = vllm.python.parent.parent

    status = vllm_install.main([vllm.version, "--venv", str(venv), "--verify"])

    assert status == 0, capsys.readouterr().err
    assert "byte-identical to the wheel's RECORD, none added" in capsys.readouterr().out


def test_installing_the_core_beside_vllm_moves_no_other_package(vllm: VllmEnvironment) -> None:
    options = ["--dry-run", "--disable-pip-version-check", "--no-build-isolation", "--no-index"]
    # Where a requirement were not met, pip would look for it, and fail without an index.
    variables = {"PYTHONPATH": _build_backend(), "PATH": "/usr/bin:/bin"}

    command = [str(vllm.python), "-m", "pip", "install", *options, str(REPOSITORY)]
    done = subprocess.run(command, env=variables, capture_output=True, text=True)

    assert done.returncode == 0, done.stderr
    would_install = [line for line in done.stdout.splitlines() if line.startswith("Would install")]
    assert would_install == ["Would install step-oracle-0.1.0"]


def _build_backend() -> str:
    """The folder of the development environment that hatchling is in."""
    import hatchling

    return str(Path(str(hatchling.__file__)).parent.parent)
