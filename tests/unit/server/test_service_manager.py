"""What systemd hears."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest

from oracle_server.service_manager import tell_ready, tell_stopping


class Events:
    """A log that keeps what it is given."""

    def __init__(self) -> None:
        self.warnings: list[dict[str, Any]] = []

    def warning(self, event: str, **fields: Any) -> None:
        self.warnings.append({"event": event, **fields})


@pytest.mark.parametrize("abstract", [False, True])
def test_ready_and_stopping_reach_the_socket(abstract: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    address = f"@{tmp_path}/notify" if abstract else f"{tmp_path}/notify"
    monkeypatch.setenv("NOTIFY_SOCKET", address)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(address.replace("@", "\0"))
        manager.settimeout(5)
        events = Events()
        tell_ready(events, "ready at unix:/s")
        tell_stopping(events, "draining")
        assert manager.recv(1000) == b"READY=1\nSTATUS=ready at unix:/s"
        assert manager.recv(1000) == b"STOPPING=1\nSTATUS=draining"
    assert events.warnings == []


def test_without_a_service_manager_nothing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    events = Events()
    tell_ready(events, "ready")
    assert events.warnings == []


def test_a_socket_nobody_reads_is_logged_and_ends_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", f"{tmp_path}/gone")
    events = Events()
    tell_stopping(events, "draining")
    (warning,) = events.warnings
    assert warning["event"] == "service_manager_not_told"
    assert (warning["socket"], warning["said"]) == (f"{tmp_path}/gone", "STOPPING=1")
