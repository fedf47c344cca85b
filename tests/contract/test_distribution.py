"""What pip installs: the wheel's contents, and the core alone with the oldest grpcio and protobuf it promises."""

from __future__ import annotations

import configparser
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from environments import REPOSITORY, cached_venv, shim_site

OLDEST_CORE = ("grpcio==1.62.3", "protobuf==4.25.0")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder)]
    done = subprocess.run([*command, "--quiet", str(REPOSITORY)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return next(folder.glob("step_oracle-*.whl"))


@pytest.fixture(scope="module")
def core(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(Python with the oldest core dependencies and nothing else, folder that holds this package)."""
    return cached_venv("core", OLDEST_CORE), shim_site(tmp_path_factory.mktemp("core"))


def test_the_wheel_holds_the_four_packages_and_no_test(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()

    tops = {name.partition("/")[0] for name in names if ".dist-info/" not in name}
    assert tops == {"oracle_server", "profiler", "step_oracle", "vllm_shim"}
    assert not [name for name in names if "tests" in name.split("/") or name.endswith((".pyc", ".nbc"))]
    assert "step_oracle/v1/step_pb2.py" in names
    assert "step_oracle/v1/step.proto" in names


def test_the_wheel_has_the_command_and_the_entry_points_vllm_looks_for(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    name = next(name for name in archive.namelist() if name.endswith("entry_points.txt"))
    entry_points = configparser.ConfigParser()
    entry_points.read_string(archive.read(name).decode())

    assert entry_points["console_scripts"]["step-oracle"] == "profiler.cli:main"
    assert entry_points["vllm.platform_plugins"]["step_oracle"] == "vllm_shim.plugin:register"
    assert entry_points["vllm.general_plugins"]["step_oracle"] == "vllm_shim.plugin:verify_active"


def test_only_the_extra_named_vllm_asks_for_vllm_and_nothing_for_torch(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    metadata = archive.read(next(name for name in archive.namelist() if name.endswith("METADATA"))).decode()
    requirements = [line.removeprefix("Requires-Dist: ") for line in metadata.splitlines() if "Requires-Dist" in line]

    assert sorted(line for line in requirements if "extra ==" not in line) == ["grpcio>=1.62", "protobuf>=4.25"]
    assert [line for line in requirements if line.startswith(("vllm", "torch"))] == ["vllm>=0.18.1; extra == 'vllm'"]


def test_doctor_runs_from_the_bare_core(core: tuple[Path, Path]) -> None:
    done = _step_oracle(core, "doctor", "--json")

    report = json.loads(done.stdout)
    assert {finding["check"]: finding["status"] for finding in report["findings"]}["messages"] == "ok", done.stdout
    assert (done.returncode, report["ok"]) == (0, True), done.stdout + done.stderr


def test_vllm_install_runs_from_the_bare_core(core: tuple[Path, Path]) -> None:
    done = _step_oracle(core, "vllm-install", "0.33.0", "--venv", "somewhere", "--dry-run")

    assert done.returncode == 0, done.stderr
    assert "--no-deps vllm==0.33.0" in done.stdout


def _step_oracle(core: tuple[Path, Path], *arguments: str) -> subprocess.CompletedProcess[str]:
    python, site = core
    command = [str(python), "-W", "error", str(site / "bin" / "step-oracle"), *arguments]
    return subprocess.run(command, env={"PYTHONPATH": str(site)}, capture_output=True, text=True)
