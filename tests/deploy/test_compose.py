"""The compose file, as docker compose itself reads it."""

from __future__ import annotations

import json
import os
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]

from deploy_tools import DEPLOY, run_tool
from oracle_server.config import read_config
from vllm_shim.config import ShimConfig

FOLDER = DEPLOY / "compose"


@cache
def services() -> dict[str, dict[str, Any]]:
    """The services with every variable and anchor resolved."""
    done = compose("config", "--format", "json", PACK_DIR="/packs/h100", MODEL_DIR="/models/m")
    assert done.returncode == 0, done.stderr
    resolved: dict[str, dict[str, Any]] = json.loads(done.stdout)["services"]
    return resolved


def compose(*arguments: str, **variables: str) -> Any:
    """docker compose over the file, with these variables alone."""
    environment = {"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/"), **variables}
    return run_tool("docker-compose", "--file", FOLDER / "compose.yaml", *arguments, environment=environment)


def test_compose_reads_the_file() -> None:
    assert set(services()) == {"oracle", "setup", "engine-0", "engine-1", "prometheus", "grafana"}


@pytest.mark.parametrize(("missing", "other"), [("PACK_DIR", "MODEL_DIR"), ("MODEL_DIR", "PACK_DIR")])
def test_a_missing_folder_is_told(missing: str, other: str) -> None:
    done = compose("config", "--quiet", **{other: "/x"})
    assert done.returncode != 0
    assert missing in done.stderr


def test_the_server_and_the_shims_take_their_settings() -> None:
    config = read_config({**services()["oracle"]["environment"]})
    ids = set()
    for name in ("engine-0", "engine-1"):
        shim = ShimConfig.from_environment(services()[name]["environment"], argv=[])
        assert (shim.target,) == config.listen
        ids.add(shim.engine_id)
    assert len(ids) == 2


def test_the_drain_ends_before_docker_loses_patience() -> None:
    oracle = services()["oracle"]
    assert (
        float(oracle["stop_grace_period"].removesuffix("s"))
        > float(oracle["environment"]["STEP_ORACLE_DRAIN_SECONDS"]) + 5
    )


def test_the_socket_is_in_a_volume_all_share() -> None:
    for name in ("oracle", "setup", "engine-0", "engine-1"):
        mounts = {mount["target"]: mount["source"] for mount in services()[name]["volumes"]}
        assert mounts["/run/step-oracle"] == "socket", name


def test_prometheus_scrapes_where_the_metrics_are() -> None:
    config = yaml.safe_load((FOLDER / "prometheus.yml").read_text())
    targets = {job["job_name"]: job["static_configs"][0]["targets"] for job in config["scrape_configs"]}
    assert targets["step-oracle"] == [services()["oracle"]["environment"]["STEP_ORACLE_METRICS"]]
    assert services()["prometheus"]["network_mode"] == "service:oracle"
    assert targets["vllm"] == ["engine-0:8000", "engine-1:8000"]


def test_every_service_is_unprivileged_and_ports_are_on_loopback() -> None:
    for name, service in services().items():
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert all(port["host_ip"] == "127.0.0.1" for port in service.get("ports", [])), name


def test_every_file_that_is_mounted_exists() -> None:
    outside = {Path("/packs/h100"), Path("/models/m")}
    sources = {
        Path(mount["source"])
        for service in services().values()
        for mount in service.get("volumes", [])
        if mount["type"] == "bind"
    }
    if not (DEPLOY / "observability").exists():
        sources = {source for source in sources if "observability" not in source.parts}
    assert [str(source) for source in sources - outside if not source.exists()] == []


def test_images_are_built_from_files_that_exist() -> None:
    for name in ("oracle", "engine-0", "engine-1"):
        build = services()[name]["build"]
        assert (Path(build["context"]) / build["dockerfile"]).is_file()
    assert services()["setup"]["image"] == services()["oracle"]["image"]


def test_dashboards_and_rules_are_looked_for_where_they_are_mounted() -> None:
    if not (DEPLOY / "observability").exists():
        pytest.skip("deploy/observability is not in this checkout")
    mounted = {mount["target"]: Path(mount["source"]) for mount in services()["grafana"]["volumes"]}
    (provider,) = (mounted["/etc/grafana/provisioning"] / "dashboards").iterdir()
    path = yaml.safe_load(provider.read_text())["providers"][0]["options"]["path"]
    assert list(mounted[path].glob("*.json"))
    rules = {mount["target"]: Path(mount["source"]) for mount in services()["prometheus"]["volumes"]}
    for file in yaml.safe_load((FOLDER / "prometheus.yml").read_text())["rule_files"]:
        assert (rules[str(Path(file).parent)] / Path(file).name).is_file(), file


def test_grafana_finds_prometheus() -> None:
    ports = services()["oracle"]["ports"]
    assert services()["grafana"]["environment"]["STEP_ORACLE_PROMETHEUS_URL"] == f"http://oracle:{ports[0]['target']}"
