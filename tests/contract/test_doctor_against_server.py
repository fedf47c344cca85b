"""`step-oracle doctor` beside a real oracle server: what an engine here would be told."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from builders import MODEL_SHAPE, build_constant_pack
from model_dir import write_model_dir
from oracle_process import OracleProcess
from oracle_server import doctor
from oracle_server.pack import Model

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OracleProcess]:
    """A server with one experiment, whose pack states a model shape."""
    folder = tmp_path_factory.mktemp("doctor")
    build_constant_pack(folder / "pack", model=Model(id="test/model", shape=MODEL_SHAPE))
    with OracleProcess(folder / "state") as process:
        _step_oracle("pack", "upload", str(folder / "pack"), "--target", process.target)
        _step_oracle("experiment", "create", "there", "--pack", str(folder / "pack"), "--target", process.target)
        yield process


def findings(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, target: str, experiment: str, *options: str
) -> dict[str, dict[str, str]]:
    monkeypatch.setenv("STEP_ORACLE_TARGET", target)
    monkeypatch.setenv("STEP_ORACLE_EXPERIMENT", f"tenants/default/experiments/{experiment}")
    doctor.main(["--json", *options])
    return {finding["check"]: finding for finding in json.loads(capsys.readouterr().out)["findings"]}


def test_a_server_with_the_experiment_is_described(
    server: OracleProcess, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = findings(capsys, monkeypatch, server.target, "there")

    statuses = [found[check]["status"] for check in ("variables", "oracle", "experiment", "device", "engine id")]
    assert statuses == ["ok"] * 5, found
    assert found["device"]["message"].startswith("Test Device, 80 GiB, pack sha256:")


def test_each_replica_is_looked_at_and_one_that_serves_is_enough_for_the_rest(
    server: OracleProcess, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("STEP_ORACLE_TARGET", f"unix:{tmp_path}/nobody,{server.target}")
    monkeypatch.setenv("STEP_ORACLE_EXPERIMENT", "tenants/default/experiments/there")
    doctor.main(["--json"])

    found = [(one["check"], one["status"]) for one in json.loads(capsys.readouterr().out)["findings"]]

    assert [status for check, status in found if check == "oracle"] == ["problem", "ok"]
    assert ("device", "ok") in found


def test_a_missing_experiment_is_a_problem(
    server: OracleProcess, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = findings(capsys, monkeypatch, server.target, "absent")

    assert (found["oracle"]["status"], found["experiment"]["status"]) == ("ok", "problem")
    assert "tenants/default/experiments/absent" in found["experiment"]["message"]


def test_a_model_the_pack_is_not_for_is_a_problem(
    server: OracleProcess, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model = write_model_dir(tmp_path, "llama-3.1-8b")

    found = findings(capsys, monkeypatch, server.target, "there", "--model", str(model))

    assert found["pack"]["status"] == "problem"
    assert MODEL_SHAPE in found["pack"]["message"]


def _step_oracle(*arguments: str) -> None:
    done = subprocess.run([sys.executable, "-m", "profiler.cli", *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
