"""A name server on loopback whose names have the addresses a test gives them, as a headless service has its pods."""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Mapping
from types import TracebackType

_A, _INTERNET = 1, 1
_ANSWER_OK, _NO_SUCH_NAME = 0x8180, 0x8183


class DnsServer:
    """Answers A queries over UDP (RFC 1035), and any other with nothing. Use as a context manager.

    `names` may change at any time; no answer may be remembered (TTL 0).
    """

    def __init__(self, names: Mapping[str, list[str]]) -> None:
        self.names = dict(names)
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.bind(("127.0.0.1", 0))
        self._thread = threading.Thread(target=self._answer_all, daemon=True)

    @property
    def address(self) -> str:
        """HOST:PORT, the authority of a `dns://` target."""
        host, port = self._socket.getsockname()
        return f"{host}:{port}"

    def __enter__(self) -> DnsServer:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # An empty query ends the thread.
        self._socket.sendto(b"", self._socket.getsockname())
        self._thread.join(10)
        self._socket.close()

    def _answer_all(self) -> None:
        while True:
            query, client = self._socket.recvfrom(512)
            if not query:
                return
            self._socket.sendto(self._answer(query), client)

    def _answer(self, query: bytes) -> bytes:
        labels, at = [], 12
        while length := query[at]:
            labels.append(query[at + 1 : at + 1 + length].decode())
            at += 1 + length
        question = query[12 : at + 5]
        (kind,) = struct.unpack(">H", query[at + 1 : at + 3])
        found = self.names.get(".".join(labels))
        addresses = found if found and kind == _A else []
        flags = _NO_SUCH_NAME if found is None else _ANSWER_OK
        header = query[:2] + struct.pack(">HHHHH", flags, 1, len(addresses), 0, 0)
        # Each names the question's name by its place.
        records = [struct.pack(">HHHIH", 0xC00C, _A, _INTERNET, 0, 4) + socket.inet_aton(one) for one in addresses]
        return header + question + b"".join(records)
