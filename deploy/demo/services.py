"""What runs during the demo, from the test suite's builders; their failures say what to do next."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path

from deploy.demo.interrupt import Interrupt
from deploy.demo.load import SERVED_MODEL
from deploy.demo.packs import ENGINE_LIMITS
from deploy.demo.progress import DemoFailed, tail
from engine_process import EngineFailed, EngineProcess
from environments import VllmEnvironment, vllm_environment
from oracle_process import OracleFailed, OracleProcess

EXPERIMENT = "demo"
# vLLM hears SIGTERM late while it starts; what is then killed has nothing left to write.
END_SECONDS = 8.0
DOCTOR = "ask .venv/bin/step-oracle doctor what this machine lacks; make demo ARGS='--keep DIR' keeps every log"

# Loopback is never behind a proxy.
_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def environment(version: str, interrupt: Interrupt) -> VllmEnvironment:
    """The cached vLLM environment, built when missing; the builder prints its own progress."""
    try:
        return vllm_environment(version)
    except AssertionError as error:
        if interrupt.has_come:
            raise KeyboardInterrupt from None
        raise DemoFailed(str(error), "its last lines say what to do; make demo goes on where it stopped") from None


@contextlib.contextmanager
def oracle(state_dir: Path) -> Iterator[OracleProcess]:
    """An oracle server that has been started and is not ready yet; ends with the block."""
    server = OracleProcess(state_dir)
    try:
        yield server.start(wait=False)
    except OracleFailed as error:
        raise DemoFailed(str(error), DOCTOR) from None
    finally:
        server.stop()


def engine(
    name: str, environment: VllmEnvironment, model: Path, *, site: Path, target: str, folder: Path, scratch: Path
) -> EngineProcess:
    """A vLLM server that is starting. Log and trace go into `folder`, its temporary files into `scratch`.

    A killed vLLM leaves those behind. Its sockets are among them, and a socket's path has at most 107 bytes.
    """
    return EngineProcess(
        environment,
        model,
        target=target,
        site=site,
        log_path=folder / f"{name}.log",
        extra_args=("--served-model-name", SERVED_MODEL, *ENGINE_LIMITS),
        extra_env={
            "STEP_ORACLE_ENGINE_ID": name,
            "STEP_ORACLE_EXPERIMENT": f"tenants/default/experiments/{EXPERIMENT}",
            "STEP_ORACLE_TRACE": f"{folder}/traces/",
            "TMPDIR": str(scratch),
        },
    )


def wait_ready(engines: Mapping[str, EngineProcess]) -> None:
    """Until every engine serves."""
    for name, started in engines.items():
        try:
            started.wait_ready()
        except EngineFailed:
            status = started.returncode
            what = "is not ready after minutes" if status is None else f"ended with {status} before it was ready"
            raise DemoFailed(f"{name} {what}:\n{tail(started.log_path)}", DOCTOR) from None


def end_together(engines: tuple[EngineProcess, ...]) -> None:
    """Ask all engines to end at once, then see each one out."""
    for running in engines:
        if running.returncode is None:
            os.kill(running.pid, signal.SIGTERM)
    for running in engines:
        running.stop(timeout_seconds=END_SECONDS)


def load_of(served: EngineProcess) -> str:
    """What the engine's own metrics say; vLLM names and counts them."""
    try:
        with _DIRECT.open(f"{served.base_url}/metrics", timeout=5) as page:
            text = page.read().decode()
    except OSError:
        return "busy"

    def total(name: str) -> float:
        return sum(map(float, re.findall(rf"^{name}(?:\{{.*\}})? (\S+)$", text, re.MULTILINE)))

    return f"{total('vllm:request_success_total'):.0f} served, {total('vllm:num_requests_running'):.0f} running"
