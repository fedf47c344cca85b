"""One TCP address for all shards, one Unix socket for each."""

from __future__ import annotations

import errno
import socket
import time
from collections.abc import Sequence

from oracle_server.errors import StoreFailed

# The shards of a parent that was killed end soon after it; its successor may be quicker.
ORPHAN_SECONDS = 1.0
# What the address of a family says that this machine, or container, does not have.
_NOT_HERE = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)


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
        lacking: OSError | None = None
        bound = 0
        try:
            for family, kind, protocol, _, place in socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM):
                try:
                    port = self._hold(family, kind, protocol, place[0], port)
                    bound += 1
                except OSError as error:
                    # /etc/hosts may give localhost an address of a family that is off here; gRPC passes over it, too.
                    if error.errno not in _NOT_HERE:
                        raise
                    lacking = error
            if not bound and lacking is not None:
                raise lacking
        except OSError as error:
            self.close()
            raise StoreFailed(
                f"the address {address} cannot be bound: {error}; is another server there? Give another --listen"
            ) from error
        return f"{host}:{port}"

    def _hold(self, family: int, kind: int, protocol: int, host: object, port: int) -> int:
        """Hold one port of one address; the port."""
        _wait_free(family, kind, protocol, (host, port))
        held = socket.socket(family, kind, protocol)
        self._held.append(held)
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        held.bind((host, port))
        return int(held.getsockname()[1])


def _wait_free(family: int, kind: int, protocol: int, place: tuple[object, int]) -> None:
    """Return once nobody listens there, SO_REUSEPORT or not; OSError where somebody goes on doing so."""
    end = time.monotonic() + ORPHAN_SECONDS
    while True:
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(place)
            except OSError as error:
                if error.errno in _NOT_HERE or time.monotonic() > end:
                    raise
            else:
                return
        time.sleep(0.02)
