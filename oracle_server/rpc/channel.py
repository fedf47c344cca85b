"""A blocking channel to a server, with TLS and a token where the caller has them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import grpc

from oracle_server.errors import InvalidArgument

TLS_CA = "STEP_ORACLE_TLS_CA"
TLS_CERT = "STEP_ORACLE_TLS_CERT"
TLS_KEY = "STEP_ORACLE_TLS_KEY"
TOKEN_FILE = "STEP_ORACLE_TOKEN_FILE"  # noqa: S105 - a name

# A proxy for the web is no way to a server of ours. A channel shares no connection with another: each has its own
# certificate, and the back-off of an address that was down.
_OPTIONS = (
    ("grpc.enable_http_proxy", 0),
    ("grpc.use_local_subchannel_pool", 1),
    # A server that restarts is found again within a second, not after grpc's two minutes.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 1000),
    ("grpc.max_reconnect_backoff_ms", 1000),
)


@dataclass(frozen=True, slots=True)
class Access:
    """How a client reaches a server and who it is: paths of files, empty for none.

    | field, STEP_ORACLE_... | meaning |
    | --- | --- |
    | tls_ca | PEM file: speak TLS, with a server whose certificate it has signed |
    | tls_cert, tls_key | PEM files: the client's own certificate, where the server asks for one |
    | token_file | the bearer token; read at each call |
    """

    tls_ca: str = ""
    tls_cert: str = ""
    tls_key: str = ""
    token_file: str = ""


ANONYMOUS = Access()


def read_access(environ: Mapping[str, str]) -> Access:
    """A client's access from its environment. Without `tls_ca` a certificate is a server's, and of no use here."""
    ca, cert, key = (environ.get(name, "") for name in (TLS_CA, TLS_CERT, TLS_KEY))
    if ca and bool(cert) != bool(key):
        raise InvalidArgument(f"a client's certificate needs its key; give {TLS_CERT} and {TLS_KEY}", field="tls_cert")
    return Access(ca, cert if ca else "", key if ca else "", environ.get(TOKEN_FILE, ""))


def open_channel(target: str, access: Access) -> grpc.Channel:
    """Connects lazily. A Unix socket speaks plaintext. InvalidArgument where a file of `access` cannot be read."""
    if access.tls_ca and not target.startswith("unix:"):
        credentials = grpc.ssl_channel_credentials(
            _read(access.tls_ca, TLS_CA),
            _read(access.tls_key, TLS_KEY) if access.tls_key else None,
            _read(access.tls_cert, TLS_CERT) if access.tls_cert else None,
        )
        channel = grpc.secure_channel(target, credentials, _OPTIONS)
    else:
        channel = grpc.insecure_channel(target, _OPTIONS)
    return grpc.intercept_channel(channel, _Bearer(access.token_file)) if access.token_file else channel


class _Details(NamedTuple):
    """What an interceptor hands on."""

    method: str
    timeout: float | None
    metadata: Any
    credentials: Any
    wait_for_ready: Any
    compression: Any


class _Bearer(
    grpc.UnaryUnaryClientInterceptor,  # type: ignore[type-arg]
    grpc.UnaryStreamClientInterceptor,  # type: ignore[type-arg]
    grpc.StreamUnaryClientInterceptor,  # type: ignore[type-arg]
    grpc.StreamStreamClientInterceptor,  # type: ignore[type-arg]
):
    """Reads the token at each call, so that a rotated one takes effect. Not grpc's call credentials: they want TLS."""

    def __init__(self, token_file: str) -> None:
        self._token_file = token_file

    def _call(self, continuation: Callable[[Any, Any], Any], details: Any, request: Any) -> Any:
        token = _read(self._token_file, TOKEN_FILE).decode(errors="replace").strip()
        metadata = (*(details.metadata or ()), ("authorization", f"Bearer {token}"))
        given = (details.timeout, metadata, details.credentials, details.wait_for_ready, details.compression)
        return continuation(_Details(details.method, *given), request)

    intercept_unary_unary = intercept_unary_stream = _call  # type: ignore[assignment]
    intercept_stream_unary = intercept_stream_stream = _call  # type: ignore[assignment]


def _read(path: str, variable: str) -> bytes:
    try:
        return Path(path).expanduser().read_bytes()
    except OSError as error:
        raise InvalidArgument(
            f"{variable} {path}: {error.strerror}; give a file that can be read", field=variable
        ) from (error)
