"""The server as it is shipped."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from installed_server import install_server, plain_environment


@pytest.fixture(scope="session")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin folder of an environment with the wheel of this checkout in it."""
    return install_server(tmp_path_factory.mktemp("installed"))


@pytest.fixture(scope="session")
def kernels(installed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """numba's cache as the image brings it: filled when the image is built, with a key."""
    folder = tmp_path_factory.mktemp("kernels")
    code = "from oracle_server.state.kernels import warm_kernels; warm_kernels()"
    environment = plain_environment(installed, {"NUMBA_CACHE_DIR": str(folder)})
    # -P: not what lies in this folder, the installed modules are meant; numba files kernels under their path.
    command = [str(installed / "python"), "-P", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    (folder / "key").write_text("0123456789abcdef\n")
    return folder
