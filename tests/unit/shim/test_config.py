"""The shim's variables: read once, checked, unknown ones refused."""

import pytest

from vllm_shim.config import ShimConfig
from vllm_shim.errors import ConfigurationError


def read(argv: list[str] | None = None, /, **variables: str) -> ShimConfig:
    environ = {"STEP_ORACLE_TARGET": "127.0.0.1:8470", **{f"STEP_ORACLE_{k}": v for k, v in variables.items()}}
    return ShimConfig.from_environment(environ, argv or ["vllm", "serve", "model", "--port", "9001"])


def test_defaults_need_only_a_target() -> None:
    config = read()
    assert config.experiment == "tenants/default/experiments/default"
    assert config.engine_id.endswith(":9001")
    assert (config.budget_seconds, config.on_lost, config.wait) == (10.0, "fail", "hybrid")
    assert config.leases
    assert not read(LEASES="0").leases
    assert config.engine_labels == {}
    assert config.allow_mismatch == ()


@pytest.mark.parametrize(
    ("argv", "port"),
    [
        (["vllm", "serve", "m", "--port=81"], ":81"),
        (["vllm", "serve", "m"], ":8000"),
        (["x/api_server.py"], ":8000"),
        (["script.py"], ":pid"),
    ],
)
def test_the_engine_id_follows_the_port_of_the_command_line(argv: list[str], port: str) -> None:
    assert port in read(argv).engine_id


def test_labels_and_lists_are_split() -> None:
    config = read(ENGINE_LABELS="gpu=h100, zone = a", ALLOW_MISMATCH="max_num_seqs,block_size")
    assert config.engine_labels == {"gpu": "h100", "zone": "a"}
    assert config.allow_mismatch == ("max_num_seqs", "block_size")


@pytest.mark.parametrize(
    ("variables", "named"),
    [
        ({"TARGET": ""}, "STEP_ORACLE_TARGET"),
        ({"TARGET": "a:1,,b:1"}, "'a:1,,b:1'"),
        ({"TARGET": "a:1, "}, "of each of its replicas with commas"),
        ({"EXPERIMENT": "default"}, "tenants/<tenant>/experiments/<experiment>"),
        ({"ENGINE_LABELS": "h100"}, "'h100'"),
        ({"BUDGET_SECONDS": "-1"}, "'-1'"),
        ({"BUDGET_SECONDS": "soon"}, "'soon'"),
        ({"BUDGET_SECONDS": "inf"}, "'inf'"),
        ({"ON_LOST": "guess"}, "fail, hold"),
        ({"LEASES": "yes"}, "0, 1"),
        ({"WAIT": "busy"}, "hybrid, sleep, spin, yield"),
        ({"TARGETS": "x"}, "unknown variable STEP_ORACLE_TARGETS"),
    ],
)
def test_a_bad_variable_is_named_with_what_is_allowed(variables: dict[str, str], named: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        read(**variables)
    assert named in str(caught.value)


def test_variables_of_the_tests_are_let_through() -> None:
    assert read(DATA="folder").target == "127.0.0.1:8470"
