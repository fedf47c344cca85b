"""A real oracle server and real engines on it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from engine_process import EngineProcess
from environments import VllmEnvironment
from fleet import MODEL, StartEngine
from model_dir import write_model_dir
from oracle_process import OracleProcess


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model_dir(tmp_path_factory.mktemp("model") / "qwen3-8b", "qwen3-8b")


@pytest.fixture
def oracle(tmp_path: Path) -> Iterator[OracleProcess]:
    with OracleProcess(tmp_path / "state") as process:
        yield process


@pytest.fixture
def start_engine(vllm: VllmEnvironment, site: Path, model: Path, tmp_path: Path) -> Iterator[StartEngine]:
    """Starts engines that end with the test; keyword arguments as EngineProcess, `ready=False` does not wait."""
    with ExitStack() as running:
        count = 0

        def start(target: str, *args: str, ready: bool = True, **env: str) -> EngineProcess:
            nonlocal count
            count += 1
            engine = EngineProcess(
                vllm,
                model,
                target=target,
                site=site,
                log_path=tmp_path / f"engine-{count}.log",
                extra_args=["--served-model-name", MODEL, "--max-model-len", "8192", *args],
                extra_env=env,
            )
            running.enter_context(engine)
            return engine.wait_ready() if ready else engine

        yield start
