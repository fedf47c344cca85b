"""Starts the worker in vLLM's environment and follows it."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from oracle_server.errors import FailedPrecondition, InvalidArgument
from oracle_server.pack import Manifest
from profiler.replay.job import Job, write_job

_PACKAGES: Final = ("step_oracle", "oracle_server", "vllm_shim", "profiler")
# What vLLM looks for in installed packages to find a platform; the worker brings its own, so that an environment with
# plain vLLM will do.
_ENTRY_POINTS: Final = "[vllm.platform_plugins]\nstep_oracle = vllm_shim.plugin:register\n"
_METADATA: Final = "Metadata-Version: 2.1\nName: step-oracle-replay\nVersion: 0\n"
_LOG_LINES: Final = 12

OnEvent = Callable[[dict[str, Any]], None]


class ReplayFailed(FailedPrecondition):
    """The worker ended without its results."""


def vllm_python(venv: Path | None) -> Path:
    """The Python that has vLLM: the environment named, else this one."""
    if venv is None:
        if importlib.util.find_spec("vllm") is not None:
            return Path(sys.executable)
        raise InvalidArgument(
            "vLLM is not installed beside this command; name its environment: --vllm VENV (step-oracle vllm-install "
            "makes one)",
            field="vllm",
        )
    python = venv / "bin" / "python"
    if not python.exists():
        raise InvalidArgument(f"{venv} is no virtual environment: it has no bin/python", field="vllm")
    return python


def cache_folder() -> Path:
    """Where models, links and compiled kernels of replays outlive a command."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "step-oracle"
    return Path(os.environ.get("STEP_ORACLE_CACHE") or default) / "replay"


def model_folder(config: Path) -> Path:
    """A model directory for a config.json under any name, or the directory given.

    The folder is named by the content, for its path is part of what traces record.
    """
    if config.is_dir():
        if not (config / "config.json").is_file():
            raise InvalidArgument(f"{config} holds no config.json", field="model_config")
        return config.absolute()
    try:
        content = config.read_bytes()
        json.loads(content)
    except (OSError, ValueError) as error:
        raise InvalidArgument(f"{config} is no config.json of a model ({error})", field="model_config") from error
    folder = cache_folder() / "models" / hashlib.sha256(content).hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    _write_whole(folder / "config.json", content)
    return folder


def run_worker(python: Path, job: Job, manifest: Manifest, folder: Path, on_event: OnEvent) -> None:
    """Runs a job to its end in a process of its own; raises ReplayFailed with the worker's reason.

    `folder` receives the job and the worker's output.
    """
    job_path, log_path = folder / "job.json", folder / "worker.log"
    write_job(job_path, job)
    reading, writing = os.pipe()
    failure: dict[str, Any] | None = None
    try:
        with log_path.open("wb") as log:
            process = subprocess.Popen(
                [str(python), "-P", "-m", "profiler.replay.worker", str(job_path), str(writing)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                pass_fds=(writing,),
                env=_environment(python, job, manifest),
                start_new_session=True,
            )
    finally:
        os.close(writing)
    with _ended(process), os.fdopen(reading, encoding="utf-8") as events:
        for line in events:
            event: dict[str, Any] = json.loads(line)
            if event["event"] == "error":
                failure = event
            else:
                on_event(event)
        status = process.wait()
    if failure is not None:
        prefix = "" if failure["kind"] == "refused" else f"vLLM: {failure['kind']}: "
        raise ReplayFailed(f"{prefix}{failure['message']}")
    if status != 0:
        last = "\n".join(log_path.read_text(encoding="utf-8", errors="replace").splitlines()[-_LOG_LINES:])
        raise ReplayFailed(f"the replay process ended with status {status}; its last words:\n{last}")


@contextmanager
def _ended(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """Whatever interrupts the parent ends the worker too."""
    try:
        yield
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _environment(python: Path, job: Job, manifest: Manifest) -> dict[str, str]:
    dropped = {"PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "VLLM_PLUGINS", "VLLM_TARGET_DEVICE"}
    kept = {
        name: value for name, value in os.environ.items() if name not in dropped and not name.startswith("STEP_ORACLE_")
    }
    device = manifest.device
    described = [
        job.engine_id,
        device.name,
        device.memory_bytes,
        device.capability_major,
        device.capability_minor,
        1,
        manifest.kv_cache.block_size,
        manifest.engine.model_runner or "",
    ]
    kernels = cache_folder() / f"kernels-{hashlib.sha256(str(python).encode()).hexdigest()[:16]}"
    defaults = {
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "VLLM_HOST_IP": "127.0.0.1",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": "1",
    }
    return (
        defaults
        | kept
        | {
            "PYTHONPATH": str(_site()),
            "PYTHONHASHSEED": "0",
            # Kernels compiled by this environment's numba; those beside the source belong to the server's.
            "NUMBA_CACHE_DIR": str(kernels),
            # The platform is asked for its device before the executor exists; there is no server to ask.
            "STEP_ORACLE_TARGET": "replay",
            # The oracle is in the same process: a lease would save nothing.
            "STEP_ORACLE_LEASES": "0",
            "STEP_ORACLE_DEVICE": json.dumps(described),
        }
    )


def _site() -> Path:
    """A folder with our packages and nothing else, for the Python path of another environment.

    Links, so that nothing installed beside this command gets in front of what vLLM has; at a fixed place, since
    compiled kernels are found by the path of their source.
    """
    sources = {name: _package_folder(name) for name in _PACKAGES}
    key = hashlib.sha256(json.dumps(sorted(map(str, sources.values()))).encode()).hexdigest()[:16]
    site = cache_folder() / f"site-{key}"
    information = site / "step_oracle_replay-0.dist-info"
    information.mkdir(parents=True, exist_ok=True)
    for name, source in sources.items():
        link = site / name
        if not link.is_symlink() or link.readlink() != source:
            partial = site / f".{name}.{os.getpid()}"
            partial.unlink(missing_ok=True)
            partial.symlink_to(source)
            partial.replace(link)
    _write_whole(information / "METADATA", _METADATA.encode())
    _write_whole(information / "entry_points.txt", _ENTRY_POINTS.encode())
    return site


def _package_folder(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    locations = list(spec.submodule_search_locations or ()) if spec is not None else []
    if not locations:
        raise ReplayFailed(f"the package {name} is not installed")
    return Path(locations[0]).absolute()


def _write_whole(path: Path, content: bytes) -> None:
    """Several commands may write the same file at once."""
    if path.exists() and path.read_bytes() == content:
        return
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_bytes(content)
    shutil.move(partial, path)
