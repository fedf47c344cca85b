"""The server's image, built from its Dockerfile and run as it is meant to be run. Minutes, so not in every test run."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

import container_images
from builders import build_constant_pack
from container_images import Podman
from oracle_calls import Calls, decode

pytestmark = [pytest.mark.slow, pytest.mark.nightly]

# As in the compose file and the chart: nothing may be written but what is mounted.
HARDENED = ("--read-only", "--read-only-tmpfs=false", "--cap-drop=all", "--security-opt=no-new-privileges")
# podman's defaults may lie above what this machine allows.
LIMITS = ("--ulimit=nofile=1024:1024", "--ulimit=nproc=4096:4096")


@pytest.fixture(scope="module")
def podman(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Podman]:
    """podman with the server's image in it."""
    if reason := container_images.missing():
        pytest.skip(reason)
    storage = Podman(tmp_path_factory.mktemp("podman"))
    try:
        storage.build("server")
        yield storage
    finally:
        storage.remove()


def test_the_image_is_configured_as_its_file_says(podman: Podman) -> None:
    (image,) = json.loads(podman("image", "inspect", "localhost/server").stdout)
    (base,) = json.loads(podman("image", "inspect", container_images.BASE).stdout)
    print(f"the server adds {(image['Size'] - base['Size']) / 1e6:.0f} MB to its base")
    assert image["User"] == "10001:10001"
    assert image["Healthcheck"]["Test"][:3] == ["CMD", "step-oracle", "health"]
    assert image["Size"] - base["Size"] < 700e6


def test_the_container_serves_steps_and_stops_cleanly(podman: Podman, tmp_path: Path) -> None:
    build_constant_pack(tmp_path / "pack", latency_ns=12_345_678)
    volumes = []
    folders = {"state": "/var/lib/step-oracle", "cache": "/var/cache/step-oracle", "run": "/run/step-oracle"}
    for name, mounted in folders.items():
        (tmp_path / name).mkdir()
        (tmp_path / name).chmod(0o777)
        volumes.append(f"--volume={tmp_path / name}:{mounted}")
    options = ("--network=none", "--tmpfs=/tmp", *HARDENED, *LIMITS, *volumes)
    podman("run", "--detach", "--name=oracle", *options, "localhost/server")
    podman("exec", "oracle", "step-oracle", "health", "--wait", "60")

    with Calls(f"unix:{tmp_path}/run/oracle.sock") as calls:
        calls.create(calls.upload(tmp_path / "pack"))
        stream = calls.join("engine-0")
        assert [r.latency_ns[0] for i in range(50) for r in stream.ask(decode(i))] == [12_345_678] * 50
        stream.close()
    assert podman("exec", "oracle", "touch", "/opt/x", check=False).returncode != 0
    # The image's kernels were taken as they are: the layers kept the times they are compared by.
    listing = "find {} -name '*.nb?' -printf '%f %T@\n' | sort"
    seed = podman("exec", "oracle", "sh", "-c", listing.format("/opt/step-oracle/numba-cache")).stdout
    assert ".nbc" in seed
    assert podman("exec", "oracle", "sh", "-c", listing.format("/var/cache/step-oracle")).stdout == seed

    podman("stop", "--time=15", "oracle")
    (container,) = json.loads(podman("inspect", "oracle").stdout)
    assert container["State"]["ExitCode"] == 0
    assert '"event": "drained"' in podman("logs", "oracle").stderr
