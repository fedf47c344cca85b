"""`step-oracle health` and the service manager's socket, at a real server."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from oracle_process import OracleProcess
from sharded_server import TWO_SHARDS


def health(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The command."""
    command = [sys.executable, "-m", "profiler.cli", "health", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=30)


@pytest.mark.parametrize("service", ["step_oracle.v1.OracleService", ""])
def test_a_ready_server_is_healthy(service: str, shared_server: OracleProcess) -> None:
    done = health("--target", shared_server.target, "--service", service)
    assert (done.returncode, done.stdout) == (0, f"{shared_server.target}: SERVING\n")


def test_a_service_that_is_not_there_is_not_ready_but_alive(shared_server: OracleProcess) -> None:
    arguments = ("--target", shared_server.target, "--service", "step_oracle.v1.Nothing")
    done = health(*arguments)
    assert done.returncode == 1
    assert "NOT_FOUND" in done.stderr
    assert health(*arguments, "--alive").returncode == 0


def test_nobody_there_is_told_apart(tmp_path: Path) -> None:
    for arguments in ((), ("--alive",)):
        done = health("--target", f"unix:{tmp_path}/nobody", *arguments)
        assert done.returncode == 3
        assert "UNAVAILABLE" in done.stderr


@pytest.mark.parametrize("shards", [(), TWO_SHARDS], ids=["one process", "two shards"])
def test_the_service_manager_hears_of_ready_and_of_the_end(
    shards: tuple[str, ...], new_server: Callable[..., OracleProcess], tmp_path: Path
) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(f"{tmp_path}/notify")
        manager.settimeout(20)
        server = new_server(extra_env={"NOTIFY_SOCKET": f"{tmp_path}/notify"}, arguments=shards)
        ready = dict(line.split("=", 1) for line in manager.recv(1000).decode().splitlines())
        assert ready["READY"] == "1"
        assert server.target in ready["STATUS"]
        assert server.terminate() == 0
        assert manager.recv(1000).decode().startswith("STOPPING=1\nSTATUS=draining for up to ")
        # Nothing else was said by anybody: neither shards nor children inherit the word.
        manager.setblocking(False)
        with pytest.raises(BlockingIOError):
            manager.recv(1000)
