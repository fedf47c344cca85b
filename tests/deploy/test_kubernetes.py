"""The example of an emulated fleet behind a router."""

from __future__ import annotations

from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]

from deploy_tools import DEPLOY, chart_manifests, insecure_pods, invalid_manifests, only, pod_specs, run_tool
from vllm_shim.config import ShimConfig

FOLDER = DEPLOY / "kubernetes" / "emulated-fleet"
RESOURCES: list[str] = yaml.safe_load((FOLDER / "kustomization.yaml").read_text())["resources"]


def manifests() -> list[dict[str, Any]]:
    """All of them."""
    return [manifest for name in RESOURCES for manifest in yaml.safe_load_all((FOLDER / name).read_text())]


def test_the_kustomization_names_every_file() -> None:
    assert set(RESOURCES) == {path.name for path in FOLDER.iterdir()} - {"kustomization.yaml"}


@pytest.mark.parametrize("name", RESOURCES)
def test_every_manifest_fits_the_api(name: str) -> None:
    assert invalid_manifests(FOLDER / name) == ""


def test_pods_are_unprivileged() -> None:
    assert insecure_pods(manifests()) == []


def test_everything_is_in_one_namespace() -> None:
    namespace = only(manifests(), "Namespace")["metadata"]["name"]
    assert {m["metadata"]["namespace"] for m in manifests() if m["kind"] != "Namespace"} == {namespace}


def test_selectors_match_the_pods() -> None:
    pods = [m["spec"]["template"]["metadata"]["labels"] for m in manifests() if m["kind"] == "Deployment"]
    selecting = {"Deployment": "matchLabels", "PodDisruptionBudget": "matchLabels", "NetworkPolicy": "matchLabels"}
    for manifest in manifests():
        spec = manifest.get("spec", {})
        selector = spec.get("selector") or spec.get("podSelector")
        if selector is None:
            continue
        labels = selector[selecting[manifest["kind"]]] if manifest["kind"] in selecting else selector
        assert any(labels.items() <= pod.items() for pod in pods), manifest["metadata"]["name"]


def test_the_router_finds_the_engines_and_nothing_else() -> None:
    (router,) = (pod["containers"][0] for name, pod in pod_specs(manifests()) if name == "router")
    arguments = dict(argument.split("=", 1) for argument in router["args"])
    key, value = arguments["--k8s-label-selector"].split("=")
    for manifest in manifests():
        if manifest["kind"] == "Deployment":
            chosen = manifest["spec"]["template"]["metadata"]["labels"].get(key) == value
            assert chosen == manifest["metadata"]["name"].startswith("engine-")
    assert arguments["--k8s-namespace"] == only(manifests(), "Namespace")["metadata"]["name"]
    engine = next(pod["containers"][0] for name, pod in pod_specs(manifests()) if name.startswith("engine-"))
    assert int(arguments["--k8s-port"]) == engine["ports"][0]["containerPort"]


def test_engines_reach_the_release_the_chart_makes() -> None:
    service = only(chart_manifests("sqlite"), "Service")
    address = f"dns:///{service['metadata']['name']}.step-oracle.svc:{service['spec']['ports'][0]['port']}"
    for name, pod in pod_specs(manifests()):
        if name.startswith("engine-"):
            given = {v["name"]: v.get("value") for v in pod["containers"][0]["env"]}
            assert given["STEP_ORACLE_TARGET"] == address


def test_the_shim_takes_its_settings() -> None:
    """Those of its table; the certificate's is a rule of the channel."""
    for name, pod in pod_specs(manifests()):
        if name.startswith("engine-"):
            given = {v["name"]: v["value"] for v in pod["containers"][0]["env"] if "value" in v}
            given.pop("STEP_ORACLE_TLS_CA")
            config = ShimConfig.from_environment({k: v for k, v in given.items() if k.startswith("STEP_ORACLE_")})
            assert config.engine_labels == {"gpu": name.removeprefix("engine-")}


def test_the_kinds_of_engine_differ_in_name_and_number_alone() -> None:
    h100, l40s = ((FOLDER / f"engines-{gpu}.yaml").read_text() for gpu in ("h100", "l40s"))
    assert h100.replace("h100", "l40s").replace("H100s", "L40Ss").replace("replicas: 8", "replicas: 4") == l40s


def test_yaml_is_clean() -> None:
    done = run_tool("yamllint", "--strict", "-c", DEPLOY / "yamllint.yaml", DEPLOY)
    assert done.returncode == 0, done.stdout
