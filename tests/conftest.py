"""Options and fixtures every test folder shares."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from environments import VLLM_VERSIONS, VllmEnvironment, measured_data, shim_site, vllm_environment
from postgres_server import PostgresServer
from registry_server import RegistryProcess


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--vllm-version",
        action="append",
        metavar="VERSION",
        help=f"vLLM version the `vllm` tests run with; may be repeated (default: {', '.join(VLLM_VERSIONS)})",
    )
    parser.addoption(
        "--accuracy-output",
        type=Path,
        metavar="DIR",
        help="folder for figures, table and pictures of the gates",
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "vllm_version" in metafunc.fixturenames:
        versions = metafunc.config.getoption("--vllm-version") or VLLM_VERSIONS
        if metafunc.definition.get_closest_marker("one_vllm"):
            versions = versions[-1:]
        metafunc.parametrize("vllm_version", versions, scope="session")


@pytest.fixture(scope="session")
def vllm(vllm_version: str) -> VllmEnvironment:
    """The environment of each vLLM version under test."""
    return vllm_environment(vllm_version)


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """This package as it is installed beside vLLM."""
    return shim_site(tmp_path_factory.mktemp("site"))


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresServer]:
    """The PostgreSQL of all tests that do not stop it."""
    with PostgresServer(durable=False) as server:
        yield server


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """The measured runs and reference tables; they lie beside the checkout or where STEP_ORACLE_DATA says."""
    folder = measured_data()
    if not folder.is_dir():
        pytest.skip(f"no data in {folder}; set STEP_ORACLE_DATA")
    return folder


@pytest.fixture(scope="session")
def registry_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RegistryProcess]:
    """A registry the tests share; each has a repository of its own, or leaves what others need alone."""
    with RegistryProcess(tmp_path_factory.mktemp("registry")) as process:
        yield process
