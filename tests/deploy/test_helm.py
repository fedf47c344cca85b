"""The chart: it renders and validates in both forms, and refuses what would lose data."""

from __future__ import annotations

import re
import shutil
import textwrap
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]

from deploy_tools import CHART, chart_manifests, insecure_pods, invalid_manifests, only, render_chart, run_tool
from oracle_server.config import read_config

EXAMPLES = ("sqlite", "postgres")


def server(manifests: list[dict[str, Any]]) -> dict[str, Any]:
    """The server's container."""
    containers = only(manifests, "Deployment")["spec"]["template"]["spec"]["containers"]
    return next(container for container in containers if container["name"] == "server")


def variables(manifests: list[dict[str, Any]]) -> dict[str, str]:
    """The server's environment."""
    return {variable["name"]: variable["value"] for variable in server(manifests)["env"]}


@pytest.mark.parametrize("values", EXAMPLES)
def test_helm_lints_the_chart(values: str) -> None:
    done = run_tool("helm", "lint", "--strict", CHART, "--values", CHART / "examples" / f"{values}.yaml")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("values", EXAMPLES)
def test_every_manifest_fits_the_api(values: str, tmp_path: Path) -> None:
    (tmp_path / "rendered.yaml").write_text(render_chart(values).stdout)
    assert invalid_manifests(tmp_path / "rendered.yaml") == ""


def test_the_validator_sees_a_misspelt_field(tmp_path: Path) -> None:
    text = render_chart("postgres").stdout.replace("maxReplicas:", "maxReplica:")
    (tmp_path / "rendered.yaml").write_text(text)
    assert "maxReplica" in invalid_manifests(tmp_path / "rendered.yaml")


@pytest.mark.parametrize("values", EXAMPLES)
def test_pods_are_unprivileged(values: str) -> None:
    manifests = chart_manifests(values)
    assert insecure_pods(manifests) == []
    assert server(manifests)["securityContext"]["readOnlyRootFilesystem"] is True


@pytest.mark.parametrize("values", EXAMPLES)
def test_selectors_match_the_pods(values: str) -> None:
    manifests = chart_manifests(values)
    labels = only(manifests, "Deployment")["spec"]["template"]["metadata"]["labels"]
    selectors = [only(manifests, "Deployment")["spec"]["selector"]["matchLabels"]]
    selectors.append(only(manifests, "Service")["spec"]["selector"])
    selectors.append(only(manifests, "NetworkPolicy")["spec"]["podSelector"]["matchLabels"])
    if values == "postgres":
        selectors.append(only(manifests, "PodDisruptionBudget")["spec"]["selector"]["matchLabels"])
        monitor = only(manifests, "ServiceMonitor")["spec"]["selector"]["matchLabels"]
        assert monitor.items() <= only(manifests, "Service")["metadata"]["labels"].items()
    for selector in selectors:
        assert selector
        assert selector.items() <= labels.items()


@pytest.mark.parametrize("values", EXAMPLES)
def test_readiness_asks_the_service_and_liveness_takes_any_answer(values: str) -> None:
    container = server(chart_manifests(values))
    ready = container["readinessProbe"]["exec"]["command"]
    alive = container["livenessProbe"]["exec"]["command"]
    assert ready[:2] == alive[:2] == ["step-oracle", "health"]
    assert ready[ready.index("--service") + 1] == "step_oracle.v1.OracleService"
    assert "--alive" not in ready
    assert "--alive" in alive
    assert container["startupProbe"]["exec"]["command"] == alive


@pytest.mark.parametrize("values", EXAMPLES)
def test_secrets_are_files_with_a_volume_each(values: str) -> None:
    manifests = chart_manifests(values)
    mounts = {mount["name"]: mount for mount in server(manifests)["volumeMounts"]}
    volumes = {v["name"]: v for v in only(manifests, "Deployment")["spec"]["template"]["spec"]["volumes"]}
    secret_paths = {mounts[name]["mountPath"]: name for name, volume in volumes.items() if "secret" in volume}
    named = ["TLS_CERT", "TLS_KEY", "OPERATOR_TOKEN_FILE"]
    named += ["TLS_CLIENT_CA", "DATABASE", "PACK_REGISTRY_CREDENTIALS"] if values == "postgres" else []
    for name in named:
        path = Path(variables(manifests)[f"STEP_ORACLE_{name}"])
        volume = volumes[secret_paths[str(path.parent)]]
        assert mounts[volume["name"]]["readOnly"] is True
        assert volume["secret"]["defaultMode"] == 0o440
        if "items" in volume["secret"]:
            assert path.name in [item["path"] for item in volume["secret"]["items"]]


def test_no_database_url_is_in_the_clear() -> None:
    text = render_chart("postgres").stdout
    assert not re.search(r"postgres(ql)?://", text)
    assert "secretKeyRef" not in text


def test_the_registry_of_the_packs_is_one_the_server_takes() -> None:
    manifests = chart_manifests("postgres", "postgres.registryCa=true")
    given = {name: value for name, value in variables(manifests).items() if "PACK_REGISTRY" in name}
    registry = read_config(given).pack_registry
    assert registry is not None
    assert registry.repository.place == "registry.example.com:443/step-oracle/packs"
    assert (registry.credentials, registry.ca) == (
        Path("/etc/step-oracle/registry/credentials"),
        Path("/etc/step-oracle/registry/ca.crt"),
    )


def test_sqlite_is_one_pod_that_ends_before_its_successor_starts() -> None:
    manifests = chart_manifests("sqlite")
    spec = only(manifests, "Deployment")["spec"]
    assert spec["replicas"] == 1
    assert spec["strategy"] == {"type": "Recreate"}
    state = next(volume for volume in spec["template"]["spec"]["volumes"] if volume["name"] == "state")
    claim = only(manifests, "PersistentVolumeClaim")
    assert state["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
    assert claim["metadata"]["annotations"]["helm.sh/resource-policy"] == "keep"
    assert not {"PodDisruptionBudget", "HorizontalPodAutoscaler"} & {manifest["kind"] for manifest in manifests}


def test_an_existing_claim_is_used_and_none_is_made() -> None:
    manifests = chart_manifests("sqlite", "sqlite.existingClaim=mine")
    volumes = only(manifests, "Deployment")["spec"]["template"]["spec"]["volumes"]
    assert {"name": "state", "persistentVolumeClaim": {"claimName": "mine"}} in volumes
    assert "PersistentVolumeClaim" not in {manifest["kind"] for manifest in manifests}


def test_a_fleet_rolls_without_a_pod_less_and_scales() -> None:
    manifests = chart_manifests("postgres")
    deployment = only(manifests, "Deployment")
    assert "replicas" not in deployment["spec"]
    assert deployment["spec"]["strategy"]["rollingUpdate"] == {"maxSurge": 1, "maxUnavailable": 0}
    scaler = only(manifests, "HorizontalPodAutoscaler")["spec"]
    assert scaler["scaleTargetRef"]["name"] == deployment["metadata"]["name"]
    assert scaler["metrics"][0]["containerResource"]["container"] == "server"
    assert "cpu" in server(manifests)["resources"]["requests"]
    assert (
        only(chart_manifests("postgres", "autoscaling.enabled=false", "replicas=3"), "Deployment")["spec"]["replicas"]
        == 3
    )


@pytest.mark.parametrize("values", EXAMPLES)
def test_the_service_gives_every_pod_to_the_client(values: str) -> None:
    service = only(chart_manifests(values), "Service")["spec"]
    assert service["clusterIP"] == "None"
    grpc = next(port for port in service["ports"] if port["name"] == "grpc")
    assert (grpc["port"], grpc["appProtocol"]) == (8470, "kubernetes.io/h2c")


@pytest.mark.parametrize("values", EXAMPLES)
def test_the_grace_period_covers_the_end(values: str) -> None:
    manifests = chart_manifests(values, "drainSeconds=9", "preStopSeconds=16")
    pod = only(manifests, "Deployment")["spec"]["template"]["spec"]
    pause = float(server(manifests)["lifecycle"]["preStop"]["exec"]["command"][1])
    assert pod["terminationGracePeriodSeconds"] >= pause + float(variables(manifests)["STEP_ORACLE_DRAIN_SECONDS"]) + 5


@pytest.mark.parametrize("values", EXAMPLES)
def test_only_the_named_ports_are_open(values: str) -> None:
    policy = only(chart_manifests(values), "NetworkPolicy")["spec"]
    assert policy["policyTypes"] == ["Ingress", "Egress"]
    assert [port["port"] for rule in policy["ingress"] for port in rule["ports"]] == (
        ["grpc"] if values == "sqlite" else ["grpc", "metrics"]
    )
    assert bool(policy["egress"]) == (values == "postgres")


def test_metrics_go_through_the_proxy_alone() -> None:
    manifests = chart_manifests("postgres")
    pod = only(manifests, "Deployment")["spec"]["template"]["spec"]
    proxy = next(container for container in pod["containers"] if container["name"] == "metrics")
    assert f"--upstream=http://{variables(manifests)['STEP_ORACLE_METRICS']}/" in proxy["args"]
    assert pod["automountServiceAccountToken"] is True
    assert only(manifests, "ClusterRoleBinding")["roleRef"]["name"] == "system:auth-delegator"
    quiet = chart_manifests("sqlite")
    assert only(quiet, "Deployment")["spec"]["template"]["spec"]["automountServiceAccountToken"] is False


@pytest.mark.parametrize("values", EXAMPLES)
def test_the_server_takes_its_settings(values: str) -> None:
    """Those of this process's table; which addresses TLS opens is its own rule."""
    ours = ("METRICS", "STATE_DIR", "DRAIN_SECONDS", "SHARDS", "LEASES", "MAX_STREAM_AGE_SECONDS")
    given = variables(chart_manifests(values, "shards=4", "leases=false", "drainSeconds=7", "maxStreamAgeSeconds=600"))
    config = read_config({f"STEP_ORACLE_{name}": given[f"STEP_ORACLE_{name}"] for name in ours})
    assert (config.shards, config.leases, config.drain_seconds) == (4, False, 7.0)
    assert config.max_stream_age_seconds == 600
    mounts = [mount["mountPath"] for mount in server(chart_manifests(values))["volumeMounts"]]
    assert str(config.state_dir) in mounts
    assert given["STEP_ORACLE_LISTEN"].split(",") == ["0.0.0.0:8470", "unix:/run/step-oracle/oracle.sock"]


@pytest.mark.parametrize(
    ("values", "settings", "sentence"),
    [
        ("sqlite", ["replicas=2"], "two pods over one database would lose changes"),
        ("sqlite", ["autoscaling.enabled=true"], "autoscaling is enabled with the store sqlite"),
        ("sqlite", ["tls.secretName="], "refuses without TLS"),
        ("sqlite", ["operatorToken.secretName="], "name a secret that holds the operator's token"),
        ("sqlite", ["terminationGracePeriodSeconds=14"], "preStopSeconds, drainSeconds and 5 to end need 15"),
        ("postgres", ["postgres.secretName="], "needs a secret with the database's URL"),
        ("postgres", ["postgres.packRegistry="], "share their packs through an OCI registry"),
        ("postgres", ["postgres.packRegistry=oci://r/p"], "packRegistry"),
        ("postgres", ["autoscaling.minReplicas=20"], "the first may not be the larger"),
        ("sqlite", ["store=mysql"], "store"),
        ("sqlite", ["drainSeconds=10"], "drainSeconds"),
        ("sqlite", ["shards=65"], "shards"),
        ("sqlite", ["replica=1"], "Additional property replica is not allowed"),
        ("sqlite", ["sqlite.size=lots"], "sqlite.size"),
    ],
)
def test_a_combination_that_cannot_work_is_refused_with_a_sentence(
    values: str, settings: list[str], sentence: str
) -> None:
    done = render_chart(values, *settings)
    assert done.returncode != 0
    assert sentence in done.stderr.replace("/", ".")


def test_every_value_is_described_and_checked() -> None:
    """The schema allows no unknown value, so each one that values.yaml gives has to be in it; and the notes render."""
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    schema = yaml.safe_load((CHART / "values.schema.json").read_text())
    assert set(values) | {"global"} == set(schema["properties"])
    assert schema["additionalProperties"] is False
    templates = "".join(file.read_text() for file in (CHART / "templates").iterdir())
    for name in values:
        assert f".Values.{name}" in templates, name


def test_notes_name_the_engines_environment(tmp_path: Path) -> None:
    """helm shows notes with a cluster at hand only, so they are rendered as a manifest of a copied chart."""
    chart = tmp_path / "chart"
    shutil.copytree(CHART, chart)
    notes = (chart / "templates" / "NOTES.txt").read_text()
    (chart / "templates" / "notes.yaml").write_text("kind: Notes\ntext: |\n" + textwrap.indent(notes, "  "))
    release = ("step-oracle", chart, "--namespace", "here", "--show-only", "templates/notes.yaml")
    shown = {}
    for name in EXAMPLES:
        done = run_tool("helm", "template", *release, "--values", CHART / "examples" / f"{name}.yaml")
        assert done.returncode == 0, done.stderr
        shown[name] = yaml.safe_load(done.stdout)["text"]
        assert "STEP_ORACLE_TARGET=dns:///step-oracle.here.svc:8470" in shown[name]
    assert "STEP_ORACLE_TLS_CERT" in shown["postgres"]
    assert "STEP_ORACLE_TLS_CERT" not in shown["sqlite"]
