"""A port is held at every address of a name that this machine has."""

from __future__ import annotations

import socket

import pytest

from oracle_server.errors import StoreFailed
from oracle_server.shards.addresses import Reservation

# Of a network for documentation (RFC 5737): no machine has it. EADDRNOTAVAIL, as ::1 where IPv6 is off.
ABSENT, PRESENT = "192.0.2.1", "127.0.0.1"


def resolve_to(monkeypatch: pytest.MonkeyPatch, *hosts: str) -> None:
    def found(host: str, port: int, **_: object) -> list[object]:
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (name, port)) for name in hosts]

    monkeypatch.setattr(socket, "getaddrinfo", found)


@pytest.mark.parametrize("hosts", [(ABSENT, PRESENT), (PRESENT, ABSENT)])
def test_an_address_that_is_not_here_is_passed_over(hosts: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    resolve_to(monkeypatch, *hosts)
    reservation = Reservation(["localhost:0"])
    (address,) = reservation.addresses
    port = int(address.rpartition(":")[2])
    assert port
    with socket.socket() as other, pytest.raises(OSError, match="in use"):
        other.bind((PRESENT, port))
    reservation.close()


def test_a_family_that_is_off_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    def found(host: str, port: int, **_: object) -> list[object]:
        unknown = (socket.AF_AX25, socket.SOCK_STREAM, 6, "", ("x", port))
        return [unknown, (socket.AF_INET, socket.SOCK_STREAM, 6, "", (PRESENT, port))]

    monkeypatch.setattr(socket, "getaddrinfo", found)
    Reservation(["localhost:0"]).close()


def test_a_name_with_no_address_that_is_here_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    resolve_to(monkeypatch, ABSENT)
    with pytest.raises(StoreFailed, match="localhost:0 cannot be bound"):
        Reservation(["localhost:0"])
