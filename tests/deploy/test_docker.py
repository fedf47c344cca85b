"""The images: their files are clean, and what they do works where they do it.

No image is built here (see test_images.py); the wheel is installed and the entry point run as the Dockerfile says.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml  # type: ignore[import-untyped]

from builders import build_constant_pack
from deploy_tools import DEPLOY, run_tool
from engine_process import EngineProcess
from environments import REPOSITORY, VllmEnvironment
from fleet import MODEL, complete
from installed_server import CONSTRAINTS, DOCKERFILES, constraints, instructions, plain_environment
from model_dir import write_model_dir
from oracle_calls import Calls, decode
from oracle_server.config import read_config
from vllm_shim.config import ShimConfig

ENTRYPOINT = DEPLOY / "docker" / "entrypoint.sh"


def last_stage(name: str) -> dict[str, str]:
    """The last instruction of each keyword in the stage that becomes the image."""
    return {found.keyword: found.argument for found in instructions(DOCKERFILES[name]) if not found.stage}


def variables(name: str) -> dict[str, str]:
    """The variables of an image."""
    return dict(pair.split("=", 1) for pair in last_stage(name)["ENV"].split())


@pytest.mark.parametrize("name", DOCKERFILES)
def test_hadolint_finds_nothing(name: str) -> None:
    done = run_tool("hadolint", "--config", DEPLOY / "docker" / "hadolint.yaml", DOCKERFILES[name])
    assert done.returncode == 0, done.stdout


def test_hadolint_sees_a_fault(tmp_path: Path) -> None:
    (tmp_path / "Dockerfile").write_text("FROM debian:latest\nRUN apt-get install curl\n")
    done = run_tool("hadolint", "--config", DEPLOY / "docker" / "hadolint.yaml", tmp_path / "Dockerfile")
    assert done.returncode != 0


@pytest.mark.parametrize(
    "script", [ENTRYPOINT, REPOSITORY / "tests" / "deploy" / "boot_systemd.sh"], ids=lambda p: p.name
)
def test_shellcheck_finds_nothing(script: Path) -> None:
    done = run_tool("shellcheck", script)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("name", DOCKERFILES)
def test_an_image_has_a_user_a_health_check_and_no_build_tools(name: str) -> None:
    found = list(instructions(DOCKERFILES[name]))
    stages = {instruction.stage for instruction in found}
    assert stages == {"wheel", "environment", ""}
    assert last_stage(name)["USER"] == "10001:10001"
    assert last_stage(name)["STOPSIGNAL"] == "SIGTERM"
    assert "CMD [" in last_stage(name)["HEALTHCHECK"]
    assert not [i for i in found if i.keyword == "RUN" and not i.stage and "pip install" in i.argument]


@pytest.mark.parametrize("name", DOCKERFILES)
def test_what_is_copied_exists_and_is_not_ignored(name: str) -> None:
    let_through = [line[1:] for line in (REPOSITORY / ".dockerignore").read_text().splitlines() if line[:1] == "!"]
    for instruction in instructions(DOCKERFILES[name]):
        words = [word for word in instruction.argument.split() if not word.startswith("--")]
        if instruction.keyword == "COPY" and "--from" not in instruction.argument:
            for source in words[:-1]:
                assert (REPOSITORY / source).exists(), source
                assert any(source == path or source.startswith(f"{path}/") for path in let_through), source


def test_the_wheel_is_built_from_all_its_sources() -> None:
    import tomllib

    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
    packages = project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    for name in DOCKERFILES:
        copied = " ".join(
            i.argument for i in instructions(DOCKERFILES[name]) if i.stage == "wheel" and i.keyword == "COPY"
        )
        for source in [*(package.partition("/")[0] for package in packages), "pyproject.toml", "README.md", "LICENSE"]:
            assert source in copied.split(), source


def test_the_images_settings_are_known() -> None:
    server = {k: v for k, v in variables("server").items() if k.startswith("STEP_ORACLE_")}
    config = read_config(server)
    engine = {k: v for k, v in variables("engine").items() if k.startswith("STEP_ORACLE_")}
    assert (ShimConfig.from_environment(engine, argv=[]).target,) == config.listen
    assert server["STEP_ORACLE_TARGET"] in last_stage("server")["HEALTHCHECK"]


def test_both_images_have_one_user() -> None:
    users = [i.argument for name in DOCKERFILES for i in instructions(DOCKERFILES[name]) if "groupadd" in i.argument]
    assert len(users) == 2
    assert all("--gid 10001" in text and "--uid 10001 --gid 10001" in text for text in users)


def test_the_engine_is_installed_by_a_command_that_exists() -> None:
    (run,) = (i.argument for i in instructions(DOCKERFILES["engine"]) if "vllm-install" in i.argument)
    assert 'vllm-install "${VLLM_VERSION}" --venv /opt/vllm' in run
    (version,) = (i.argument for i in instructions(DOCKERFILES["engine"]) if i.argument.startswith("VLLM_VERSION="))
    command = [str(Path(sys.executable).with_name("step-oracle")), "vllm-install", version.partition("=")[2]]
    options = ["--venv", "/opt/vllm", "--torch-index", "INDEX", "--dry-run"]
    done = subprocess.run([*command, *options], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "vllm==" in done.stdout


def test_constraints_are_exact_and_whole(installed: Path) -> None:
    done = subprocess.run([installed / "python", "-m", "pip", "check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    done = subprocess.run(
        [installed / "python", "-m", "pip", "freeze", "--exclude", "step-oracle"], capture_output=True, text=True
    )
    assert tuple(done.stdout.split()) == constraints(), f"renew {CONSTRAINTS.name} as its first lines say"


def test_an_unwritable_cache_is_told(tmp_path: Path) -> None:
    (tmp_path / "key").write_text("k\n")
    parent = tmp_path / "no" / "such" / "folder"
    environment = {"PATH": os.environ["PATH"], "NUMBA_CACHE_SEED": str(tmp_path), "NUMBA_CACHE_DIR": str(parent)}
    done = subprocess.run([ENTRYPOINT, "serve"], capture_output=True, text=True, env=environment)
    assert done.returncode == 1
    assert f"step-oracle: {parent} cannot be written" in done.stderr


@pytest.fixture
def container(installed: Path, kernels: Path, tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """The image's process: its entry point, its arguments and its variables, with folders of this test's."""
    (tmp_path / "cache").mkdir()
    (tmp_path / "step-oracle-entrypoint").symlink_to(ENTRYPOINT)
    given = variables("server") | {
        "STEP_ORACLE_LISTEN": f"unix:{tmp_path}/oracle.sock",
        "STEP_ORACLE_METRICS": "off",
        "STEP_ORACLE_STATE_DIR": str(tmp_path / "state"),
        "STEP_ORACLE_TARGET": f"unix:{tmp_path}/oracle.sock",
        "NUMBA_CACHE_SEED": str(kernels),
        "NUMBA_CACHE_DIR": str(tmp_path / "cache"),
    }
    del given["PATH"]
    (program,) = json.loads(last_stage("server")["ENTRYPOINT"])
    command = [str(tmp_path / program), *json.loads(last_stage("server")["CMD"])]
    with (tmp_path / "stdout").open("w") as stdout, (tmp_path / "stderr").open("w") as stderr:
        process = subprocess.Popen(
            command,
            env=plain_environment(installed, given),
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            text=True,
        )
    yield process
    process.kill()
    process.wait()


@pytest.mark.slow
def test_the_entry_point_serves_steps_and_ends_with_zero(
    container: subprocess.Popen[str], installed: Path, kernels: Path, tmp_path: Path
) -> None:
    target = f"unix:{tmp_path}/oracle.sock"
    build_constant_pack(tmp_path / "pack", latency_ns=12_345_678)
    health = [str(installed / "step-oracle"), "health", "--target", target, "--wait", "60"]
    done = subprocess.run(health, capture_output=True, text=True, env=plain_environment(installed, {}))
    assert done.returncode == 0, done.stderr + (tmp_path / "stderr").read_text()

    # What the compose file runs once does no harm when it is run again.
    for _ in range(2):
        _set_up(installed, tmp_path)
    with Calls(target) as calls:
        stream = calls.join("engine-0")
        assert [reply.latency_ns[0] for i in range(50) for reply in stream.ask(decode(i))] == [12_345_678] * 50
        stream.close()
    # The kernels were the image's: nothing was compiled anew.
    copied = tmp_path / "cache" / "0123456789abcdef"
    assert _compiled(copied) == _compiled(kernels) != {}

    begin = time.monotonic()
    container.send_signal(signal.SIGTERM)
    assert container.wait(15) == 0
    assert time.monotonic() - begin < 10
    assert '"event": "drained"' in (tmp_path / "stderr").read_text()


@pytest.mark.vllm
@pytest.mark.one_vllm
def test_a_real_engine_serves_from_it_through_the_socket(
    container: subprocess.Popen[str], installed: Path, vllm: VllmEnvironment, site: Path, tmp_path: Path
) -> None:
    """As in the compose file: oracle and engine share a socket, and the engine is started once both are set up."""
    build_constant_pack(tmp_path / "pack", latency_ns=20_000_000, kv_blocks=4000)
    _set_up(installed, tmp_path)
    model = write_model_dir(tmp_path / "model", "qwen3-8b")
    engine = EngineProcess(
        vllm,
        model,
        target=f"unix:{tmp_path}/oracle.sock",
        site=site,
        log_path=tmp_path / "engine.log",
        extra_args=["--served-model-name", MODEL, "--max-model-len", "8192"],
    )
    with engine:
        engine.wait_ready()
        begin = time.monotonic()
        assert complete(engine, max_tokens=50).usage.completion_tokens == 50
        # A prefill and 49 decode steps of 20 ms each: not a millisecond less.
        assert time.monotonic() - begin >= 1.0
        assert container.poll() is None
    container.send_signal(signal.SIGTERM)
    assert container.wait(15) == 0


def _set_up(installed: Path, folder: Path) -> None:
    """What the service `setup` of the compose file runs, with this test's pack and socket."""
    setup = yaml.safe_load((DEPLOY / "compose" / "compose.yaml").read_text())["services"]["setup"]
    (script,) = setup["command"]
    environment = plain_environment(
        installed,
        {
            "PATH": f"{folder}:{installed}:/usr/bin:/bin",
            "NUMBA_CACHE_SEED": str(folder / "seed"),
            "NUMBA_CACHE_DIR": str(folder / "cache"),
            "STEP_ORACLE_TARGET": f"unix:{folder}/oracle.sock",
        },
    )
    (folder / "seed").mkdir(exist_ok=True)
    (folder / "seed" / "key").write_text("setup\n")
    command = [*setup["entrypoint"], script.replace(" /pack", f" {folder}/pack")]
    waiting = [str(installed / "step-oracle"), "health", "--wait", "60"]
    for argv in (waiting, command):
        done = subprocess.run(argv, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stdout + done.stderr


def _compiled(cache: Path) -> dict[str, int]:
    """When each file of a cache of numba's was written, in nanoseconds."""
    return {str(path.relative_to(cache)): path.stat().st_mtime_ns for path in cache.rglob("*.nb?")}
