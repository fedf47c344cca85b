"""The whole command on wheels of a few bytes, with no index: every stage is real but what it installs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from environments import REPOSITORY
from oracle_server import vllm_env, vllm_install
from oracle_server.venv_python import site_packages, told
from small_wheels import write_torch, write_wheel

pytestmark = pytest.mark.slow

VERSION = "0.33.0"
VLLM_FILES = {"vllm/__init__.py": f"__version__ = {VERSION!r}\n", "vllm/engine.py": "ENGINE = True\n"}
REQUIRES = (
    "alpha>=1.0",
    "beta[fast]==2.0",
    "certifi>=2999.1",
    "never; python_version < '3'",
    "pandas; extra == 'bench'",
    "torch==2.14.0",
    "torchvision==0.29.0",
    "nvidia-cudnn-frontend>=1.31",
    "humming-kernels[cu13]==0.1",
    "new-kernels[cu14]==1.0",
    "other-kernels-cu13",
)


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of wheels that is all pip can see."""
    folder = tmp_path / "index"
    torch = {"torch/__init__.py": "from torch.version import __version__\n"}
    torch["torch/version.py"] = "__version__ = '2.13.0+cpu'\ncuda = None\n"
    write_wheel(folder, "torch", vllm_install.TORCH_VERSION, files=torch)
    write_wheel(folder, "alpha", "1.5", requires=["triton", "gamma"])
    write_wheel(folder, "beta", "2.0", requires=["delta; extra == 'fast'"])
    for name in ("certifi", "triton", "gamma", "delta", "grpcio", "protobuf"):
        write_wheel(folder, name, "5.0")
    write_wheel(folder, "vllm", VERSION, requires=REQUIRES, files=VLLM_FILES)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.delenv("PIP_EXTRA_INDEX_URL", raising=False)
    return folder


@pytest.fixture
def venv(tmp_path: Path) -> Path:
    return tmp_path / "venv"


def run(venv: Path, *options: str) -> int:
    return vllm_install.main([VERSION, "--venv", str(venv), *options])


def installed(venv: Path, name: str) -> str | None:
    return vllm_env.distribution_version([str(site_packages(venv / "bin" / "python"))], name)


def test_an_environment_is_built_verified_and_built_again_for_nothing(
    index: Path, venv: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(venv, "--without-shim") == 0, capsys.readouterr().err

    first = capsys.readouterr().out
    names = ("vllm", "torch", "alpha", "gamma", "delta", "certifi", "triton", "humming-kernels", "pandas", "never")
    versions = [installed(venv, name) for name in names]
    assert versions == [VERSION, "2.13.0", "1.5", "5.0", "5.0", "5.0", None, None, None, None]
    assert "3 installed, 6 for GPUs left out, triton removed" in first
    assert "WARNING" not in first
    assert vllm_install.is_complete(venv, VERSION)
    assert not vllm_install.is_complete(venv, "0.18.1")

    for wheel in index.glob("*.whl"):
        wheel.unlink()
    assert run(venv, "--without-shim") == 0
    assert capsys.readouterr().out.count("is there") == 3
    assert run(venv, "--verify") == 0
    assert "2 files are byte-identical to the wheel's RECORD" in capsys.readouterr().out


def test_a_run_that_failed_looks_unfinished_and_goes_on_where_it_stopped(
    index: Path, venv: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gamma = (index / "gamma-5.0-py3-none-any.whl").rename(index.parent / "gamma-5.0-py3-none-any.whl")

    assert run(venv, "--without-shim") == 1

    failure = capsys.readouterr().err
    assert "No matching distribution found for gamma" in failure
    assert "next:  run the same command again" in failure
    assert not vllm_install.is_complete(venv, VERSION)
    assert installed(venv, "vllm") is None

    gamma.rename(index / gamma.name)
    assert run(venv, "--without-shim") == 0
    assert "torch 2.13.0: 2.13.0+cpu is there" in capsys.readouterr().out


def test_a_version_without_a_wheel_says_how_to_find_one(
    index: Path, venv: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert vllm_install.main(["0.33.99", "--venv", str(venv), "--without-shim"]) == 1

    assert "pip index versions vllm" in capsys.readouterr().err
    assert not vllm_install.is_complete(venv, "0.33.99")


def test_a_damaged_vllm_is_found_and_replaced(index: Path, venv: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(venv, "--without-shim") == 0
    file = site_packages(venv / "bin" / "python") / "vllm" / "engine.py"
    file.write_text("ENGINE = False\n")

    assert run(venv, "--verify") == 1
    assert "1 changed, such as vllm/engine.py" in capsys.readouterr().err
    assert run(venv, "--without-shim") == 0
    assert file.read_text() == VLLM_FILES["vllm/engine.py"]


def test_mixed_builds_of_torch_leave_the_environment_unfinished(
    index: Path, venv: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(venv, "--without-shim") == 0
    write_torch(site_packages(venv / "bin" / "python"), "0.28.0", cuda="13.0", package="torchvision")

    assert run(venv, "--without-shim") == 1

    assert "torchvision 0.28.0 is built for CUDA 13.0, torch 2.13.0+cpu is a CPU build" in capsys.readouterr().err
    assert not vllm_install.is_complete(venv, VERSION)


def test_the_shim_goes_in_with_what_the_core_needs(
    index: Path, venv: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", str(index)]
    subprocess.run([*command, str(REPOSITORY)], check=True, capture_output=True)
    wheel = next(index.glob("step_oracle-*.whl"))
    monkeypatch.setattr(vllm_install, "_own_source", lambda: ([str(wheel)], "installed"))

    assert run(venv) == 0, capsys.readouterr().err

    assert [installed(venv, name) for name in ("step-oracle", "grpcio", "protobuf")] == ["0.1.0", "5.0", "5.0"]
    marker = json.loads((venv / ".step-oracle" / "complete.json").read_text())
    assert (marker["vllm"], marker["torch"], marker["shim"]) == (VERSION, "2.13.0+cpu", True)


def test_a_folder_that_is_something_else_is_left_alone(
    index: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("")

    assert run(tmp_path / "mine", "--without-shim") == 1
    assert "not empty and not a virtual environment (it holds thesis.txt)" in capsys.readouterr().err


def test_a_vllm_from_elsewhere_of_another_version_is_left_alone(
    index: Path, venv: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    subprocess.run([sys.executable, "-m", "venv", venv], check=True)
    other = write_wheel(index.parent, "vllm", "0.20.0", files={"vllm/__init__.py": ""})
    subprocess.run([venv / "bin" / "pip", "install", "--quiet", other], check=True)

    assert run(venv, "--without-shim") == 1
    assert "holds vLLM 0.20.0, which this command did not install" in capsys.readouterr().err
    assert installed(venv, "vllm") == "0.20.0"


def test_a_dry_run_changes_nothing(venv: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(venv, "--torch-index", "https://example.invalid/cpu", "--dry-run") == 0

    assert "torch==2.13.0 --index-url https://example.invalid/cpu" in capsys.readouterr().out
    assert not venv.exists()


@pytest.mark.parametrize("version", ["0.18.0", "latest", "0.33.0; rm", "-1"])
def test_a_version_that_cannot_be_is_refused(version: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_status:
        vllm_install.main([version, "--dry-run"])

    assert exit_status.value.code == 2


def test_a_python_that_is_not_there_is_named(venv: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(venv, "--python", "/nowhere/python") == 1
    assert "/nowhere/python does not run" in capsys.readouterr().err


def test_what_pip_warns_of_is_not_told() -> None:
    output = "WARNING: Location 'file:///x' is ignored\nCollecting x\nERROR: No matching distribution found for x\n"

    assert told(output) == "ERROR: No matching distribution found for x"


def test_equal_recipes_have_equal_names() -> None:
    digest = vllm_install.recipe_digest(VERSION)

    assert digest == vllm_install.recipe_digest(VERSION) != vllm_install.recipe_digest("0.18.1")
