"""One TCP address for all shards, one Unix socket for each."""

from __future__ import annotations

import socket
import time
from collections.abc import Sequence

from oracle_server.errors import StoreFailed

# The shards of a parent that was killed end soon after it; its successor may be quicker.
ORPHAN_SECONDS = 1.0


class Reservation:
    """Holds the TCP ports of the server by sockets that take no connections; the shards listen beside them.

    Owned by the parent. SO_REUSEPORT would let a second server listen at the address of the first without a word, so
    each port is first bound without it.
    """

    def __init__(self, listen: Sequence[str]) -> None:
        self._held: list[socket.socket] = []
        self.addresses = tuple(a if a.startswith("unix:") else self._reserve(a) for a in listen)

    def of_shard(self, number: int) -> tuple[str, ...]:
        """Where a shard listens: at every TCP address, and at sockets of its own, `/path.<number>`."""
        return tuple(f"{a}.{number}" if a.startswith("unix:") else a for a in self.addresses)

    def close(self) -> None:
        """Give the ports free."""
        for held in self._held:
            held.close()

    def _reserve(self, address: str) -> str:
        host, _, text = address.rpartition(":")
        port = int(text)
        try:
            for family, kind, protocol, _, place in socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM):
                _wait_free(family, kind, protocol, (place[0], port))
                held = socket.socket(family, kind, protocol)
                self._held.append(held)
                held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
                held.bind((place[0], port))
                port = held.getsockname()[1]
        except OSError as error:
            self.close()
            raise StoreFailed(
                f"the address {address} cannot be bound: {error}; is another server there? Give another --listen"
            ) from error
        return f"{host}:{port}"


def _wait_free(family: int, kind: int, protocol: int, place: tuple[object, int]) -> None:
    """Return once nobody listens there, SO_REUSEPORT or not; OSError where somebody goes on doing so."""
    end = time.monotonic() + ORPHAN_SECONDS
    while True:
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(place)
            except OSError:
                if time.monotonic() > end:
                    raise
            else:
                return
        time.sleep(0.02)
