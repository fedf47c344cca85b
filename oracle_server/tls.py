"""The server's certificate: read from its files, and again when they change, without a restart."""

from __future__ import annotations

import logging
import ssl
import threading
from pathlib import Path

import grpc

from oracle_server.config import TlsFiles
from oracle_server.errors import InvalidArgument

_log = logging.getLogger("step_oracle.tls")
_Stamp = tuple[tuple[int, int, int], ...]


class Certificates:
    """Gives gRPC the newest certificate that can be used. Called on gRPC's threads, once per handshake."""

    def __init__(self, files: TlsFiles) -> None:
        """InvalidArgument, naming the option, where the files cannot be used."""
        self._files = files
        self._reading = threading.Lock()
        try:
            self._stamp, self._first = _stamp(files), _read(files)
        except (OSError, ValueError) as error:
            raise InvalidArgument(
                f"the certificate {files.cert} with the key {files.key} cannot be used: {error}; give PEM files that "
                "belong together in --tls-cert and --tls-key",
                field="tls_cert",
            ) from error

    def credentials(self) -> grpc.ServerCredentials:
        """For a port; connections that are open keep the certificate they began with."""
        return grpc.dynamic_ssl_server_credentials(
            self._first,
            self._newer,  # type: ignore[arg-type]  # None is allowed, and said to be in grpc's documentation
            require_client_authentication=bool(self._files.client_ca),
        )

    def _newer(self) -> grpc.ServerCertificateConfiguration | None:
        """What to use from now on; None: what is in use. A change that cannot be used is told once and tried again."""
        with self._reading:
            try:
                stamp = _stamp(self._files)
                if stamp == self._stamp:
                    return None
                self._stamp = stamp
                return _read(self._files)
            except (OSError, ValueError) as error:
                _log.warning("the changed certificate cannot be used, the one before stays: %s", error)
                return None


def _read(files: TlsFiles) -> grpc.ServerCertificateConfiguration:
    """OSError and ValueError (ssl.SSLError is one of each) where they cannot be used."""
    cert, key = Path(files.cert).read_bytes(), Path(files.key).read_bytes()
    client_ca = Path(files.client_ca).read_bytes() if files.client_ca else None
    # Says what is wrong in words; gRPC would say it at the handshake, to the client.
    checked = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    checked.load_cert_chain(files.cert, files.key)
    if client_ca is not None:
        checked.load_verify_locations(cadata=client_ca.decode("ascii"))
    return grpc.ssl_server_certificate_configuration([(key, cert)], root_certificates=client_ca)


def _stamp(files: TlsFiles) -> _Stamp:
    """Changes when one of the files does; a file replaced by renaming has another inode."""
    found = [Path(name).stat() for name in (files.cert, files.key, files.client_ca) if name]
    return tuple((status.st_mtime_ns, status.st_size, status.st_ino) for status in found)
