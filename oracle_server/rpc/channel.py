"""A blocking channel to a server, with TLS and a token where the caller has them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any, NamedTuple

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

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
_SERVICE = "step_oracle.v1.OracleService"
_SERVING = health_pb2.HealthCheckResponse.SERVING
# Of several replicas, calls go to those that are connected and say that they serve.
_SPREAD = (
    (
        "grpc.service_config",
        json.dumps(
            {
                "loadBalancingConfig": [{"round_robin": {}}],
                "healthCheckConfig": {"serviceName": _SERVICE},
            }
        ),
    ),
)
# How long a client looks for a replica that serves.
_CHOICE_SECONDS = 5.0


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
    """Connects lazily; of several replicas, with commas between them, to the first that says it serves.

    InvalidArgument where a file of `access` cannot be read, or the target names nothing.
    """
    targets = split_targets(target)
    if len(targets) == 1:
        return _open(target, access, _SPREAD if target.startswith("dns:") else ())
    return _first_to_serve([_open(one, access, _SPREAD) for one in targets])


def split_targets(target: str) -> tuple[str, ...]:
    """The targets of all replicas; InvalidArgument where one of them is empty."""
    targets = tuple(map(str.strip, target.split(",")))
    if not all(targets):
        raise InvalidArgument(
            f"the target is {target!r}; give HOST:PORT or unix:/path of the server, or of each of its replicas with "
            "commas between them",
            field="target",
        )
    return targets


def _first_to_serve(channels: Sequence[grpc.Channel]) -> grpc.Channel:
    """The first in time; where none does, the first in order, whose calls then say why."""
    answers: SimpleQueue[grpc.Channel | None] = SimpleQueue()
    request = health_pb2.HealthCheckRequest(service=_SERVICE)
    for channel in channels:

        def note(call: Any, channel: grpc.Channel = channel) -> None:
            serves = call.code() is grpc.StatusCode.OK and call.result().status == _SERVING
            answers.put(channel if serves else None)

        check: Any = health_pb2_grpc.HealthStub(channel).Check
        check.future(request, timeout=_CHOICE_SECONDS, wait_for_ready=True).add_done_callback(note)
    chosen = next((channel for channel in (answers.get() for _ in channels) if channel is not None), channels[0])
    for channel in channels:
        if channel is not chosen:
            channel.close()
    return chosen


def _open(target: str, access: Access, more: Sequence[tuple[str, str]]) -> grpc.Channel:
    """A Unix socket speaks plaintext."""
    options = (*_OPTIONS, *more)
    if access.tls_ca and not target.startswith("unix:"):
        credentials = grpc.ssl_channel_credentials(
            _read(access.tls_ca, TLS_CA),
            _read(access.tls_key, TLS_KEY) if access.tls_key else None,
            _read(access.tls_cert, TLS_CERT) if access.tls_cert else None,
        )
        channel = grpc.secure_channel(target, credentials, options)
    else:
        channel = grpc.insecure_channel(target, options)
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
