"""The server's configuration: one table, read once, at the edge."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from oracle_server.errors import InvalidArgument
from oracle_server.registry_reference import RegistryReference, is_loopback, parse_repository
from oracle_server.scheduling import BATCH, OTHER

DEFAULT_TARGET = "127.0.0.1:8470"
DEFAULT_METRICS = "127.0.0.1:8471"
DEFAULT_EXPERIMENT = "tenants/default/experiments/default"

# Variables of the other processes and of the tests, let through.
_OF_OTHERS = (
    "STEP_ORACLE_TARGET",
    "STEP_ORACLE_EXPERIMENT",
    "STEP_ORACLE_ENGINE_ID",
    "STEP_ORACLE_ENGINE_LABELS",
    "STEP_ORACLE_TOKEN_FILE",
    "STEP_ORACLE_TLS_CA",
    "STEP_ORACLE_BUDGET_SECONDS",
    "STEP_ORACLE_ON_LOST",
    "STEP_ORACLE_WAIT",
    "STEP_ORACLE_TRACE",
    "STEP_ORACLE_ALLOW_MISMATCH",
    "STEP_ORACLE_DEVICE",
    "STEP_ORACLE_DATA",
    "STEP_ORACLE_CACHE",
)
_LISTEN = "STEP_ORACLE_LISTEN"
_METRICS = "STEP_ORACLE_METRICS"
_STATE_DIR = "STEP_ORACLE_STATE_DIR"
_DRAIN_SECONDS = "STEP_ORACLE_DRAIN_SECONDS"
_LEASES = "STEP_ORACLE_LEASES"
_SHARDS = "STEP_ORACLE_SHARDS"
_SCHEDULING = "STEP_ORACLE_SCHEDULING"
_MAX_STREAM_AGE = "STEP_ORACLE_MAX_STREAM_AGE_SECONDS"
_DATABASE = "STEP_ORACLE_DATABASE"
_PACK_FOLDER = "STEP_ORACLE_PACK_FOLDER"
_TLS_CERT = "STEP_ORACLE_TLS_CERT"
_TLS_KEY = "STEP_ORACLE_TLS_KEY"
_TLS_CLIENT_CA = "STEP_ORACLE_TLS_CLIENT_CA"
_PACK_REGISTRY = "STEP_ORACLE_PACK_REGISTRY"
_PACK_REGISTRY_CREDENTIALS = "STEP_ORACLE_PACK_REGISTRY_CREDENTIALS"
_PACK_REGISTRY_CA = "STEP_ORACLE_PACK_REGISTRY_CA"
_OPERATOR_TOKEN_FILE = "STEP_ORACLE_OPERATOR_TOKEN_FILE"  # noqa: S105 - a name

MAX_SHARDS = 64
# Every engine takes part in new replicas within ten minutes, and a stream is opened rarely enough to cost nothing.
MAX_STREAM_AGE_SECONDS = 480.0
_LONGEST_STREAM_SECONDS = 86_400.0


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """Paths of PEM files; an empty `client_ca`: clients need no certificate."""

    cert: str
    key: str
    client_ca: str = ""


@dataclass(frozen=True, slots=True)
class PackRegistryConfig:
    """Where a fleet's packs are; paths of the file of credentials (one line, USER:PASSWORD) and of a PEM bundle."""

    repository: RegistryReference
    credentials: Path | None = None
    ca: Path | None = None


@dataclass(frozen=True, slots=True)
class ServerConfig:
    """A flag goes before its variable, a variable before the default.

    | field, STEP_ORACLE_... | default | meaning |
    | --- | --- | --- |
    | listen | 127.0.0.1:8470 | HOST:PORT (port 0: any free one) or unix:/path; comma-separated |
    | metrics | 127.0.0.1:8471 | HOST:PORT on loopback for Prometheus; "off": none |
    | state_dir | $XDG_STATE_HOME/step-oracle | folder of the database and the packs |
    | drain_seconds | 5 | how long calls in flight may take after SIGTERM, in seconds |
    | leases | 1 | 0: grant no leases, every step is asked for |
    | shards | 1 | processes that answer steps at the same address, 1 to 64; 1: this one alone |
    | scheduling | batch | batch: SCHED_BATCH, nearly half the CPU per step of a full core; other: as it was started |
    | max_stream_age_seconds | 480 | after so long, ± 20 %, engines open their streams anew, maybe elsewhere; 0: never |
    | database | none | file of the URL of a PostgreSQL that the servers of a fleet share; none: a file in state_dir |
    | pack_folder | none | folder all servers of a fleet have mounted; without it or a registry: one server at a time |
    | tls (tls_cert, tls_key) | none | PEM files: TCP addresses speak TLS; read again when they change |
    | tls (tls_client_ca) | none | PEM file: clients must have a certificate that it has signed |
    | operator_token_file | none | file of the operator's token; read again when it changes. Calls need a credential |
    | pack_registry (pack_registry) | none | HOST[:PORT]/REPOSITORY of an OCI registry that keeps every pack |
    | pack_registry (..._credentials) | none | file with one line, USER:PASSWORD; read at each use |
    | pack_registry (..._ca) | none | PEM file of who signs the registry's certificate; read at each use |

    An address beyond loopback needs `tls` and `operator_token_file`; `pack_folder` needs
    `database`, and is given instead of `pack_registry`.
    """

    listen: tuple[str, ...]
    metrics: str
    state_dir: Path
    drain_seconds: float
    leases: bool = True
    shards: int = 1
    scheduling: str = BATCH
    tls: TlsFiles | None = None
    operator_token_file: Path | None = None
    max_stream_age_seconds: float = MAX_STREAM_AGE_SECONDS
    pack_registry: PackRegistryConfig | None = None
    database: Path | None = None
    pack_folder: Path | None = None


def read_config(
    environ: Mapping[str, str],
    *,
    listen: Sequence[str] = (),
    metrics: str | None = None,
    state_dir: Path | None = None,
    leases: bool = True,
    shards: int | None = None,
    max_stream_age_seconds: float | None = None,
    tls_cert: Path | None = None,
    tls_key: Path | None = None,
    tls_client_ca: Path | None = None,
    operator_token_file: Path | None = None,
    pack_registry: str | None = None,
    pack_registry_credentials: Path | None = None,
    pack_registry_ca: Path | None = None,
    database: Path | None = None,
    pack_folder: Path | None = None,
) -> ServerConfig:
    """The configuration from flags and environment; InvalidArgument names what is wrong."""
    _refuse_unknown(environ)
    addresses = tuple(listen) or tuple(filter(None, environ.get(_LISTEN, DEFAULT_TARGET).split(",")))
    if not addresses:
        raise InvalidArgument(f"{_LISTEN} names no address; give HOST:PORT or unix:/path", field="listen")
    tls = _read_tls(environ, tls_cert, tls_key, tls_client_ca)
    operator = operator_token_file or environ.get(_OPERATOR_TOKEN_FILE)
    for address in addresses:
        check_address(address, outside=tls is not None and bool(operator))
    metrics_address = environ.get(_METRICS, DEFAULT_METRICS) if metrics is None else metrics
    if metrics_address != "off":
        check_address(metrics_address, outside=True)
        if metrics_address.startswith("unix:"):
            raise InvalidArgument("Prometheus reads TCP; give --metrics HOST:PORT or off", field="metrics")
        if not is_loopback(metrics_address.rpartition(":")[0]):
            raise InvalidArgument(
                f"the metrics address {metrics_address!r} is reachable from outside, and metrics are plaintext without "
                "credentials; give one on loopback, with a proxy before it where others have to read it, or off",
                field="metrics",
            )
    text = environ.get(_DRAIN_SECONDS, "5")
    try:
        drain_seconds = float(text)
    except ValueError:
        drain_seconds = -1.0
    if not 0 <= drain_seconds <= 9:
        raise InvalidArgument(f"{_DRAIN_SECONDS} is {text!r}; allowed: 0 to 9 seconds", field="drain_seconds")
    granted = environ.get(_LEASES) or "1"
    if granted not in ("0", "1"):
        raise InvalidArgument(f"{_LEASES} is {granted!r}; allowed: 0 and 1", field="leases")
    scheduling = environ.get(_SCHEDULING) or BATCH
    if scheduling not in (BATCH, OTHER):
        raise InvalidArgument(f"{_SCHEDULING} is {scheduling!r}; allowed: {BATCH} and {OTHER}", field="scheduling")
    folder = state_dir or Path(environ.get(_STATE_DIR) or _default_state_dir(environ))
    registry = _read_pack_registry(environ, pack_registry, pack_registry_credentials, pack_registry_ca)
    file, shared_folder = _read_shared(environ, database, pack_folder)
    if registry and shared_folder:
        raise InvalidArgument(
            "packs lie in a registry or in a shared folder; give --pack-registry or --pack-folder, not both",
            field="pack_folder",
        )
    return ServerConfig(
        addresses,
        metrics_address,
        folder.expanduser(),
        drain_seconds,
        leases and granted == "1",
        _read_shards(environ.get(_SHARDS) or "1") if shards is None else _read_shards(str(shards)),
        scheduling,
        tls,
        Path(operator).expanduser() if operator else None,
        _read_stream_age(environ.get(_MAX_STREAM_AGE), max_stream_age_seconds),
        registry,
        file,
        shared_folder,
    )


def _read_tls(
    environ: Mapping[str, str], cert: Path | None, key: Path | None, client_ca: Path | None
) -> TlsFiles | None:
    given = [
        str(path or environ.get(name) or "")
        for path, name in ((cert, _TLS_CERT), (key, _TLS_KEY), (client_ca, _TLS_CLIENT_CA))
    ]
    if not any(given):
        return None
    if not (given[0] and given[1]):
        missing = "--tls-key" if given[0] else "--tls-cert"
        raise InvalidArgument(f"TLS needs a certificate and its key; give {missing} too", field="tls_cert")
    return TlsFiles(*given)


def _read_pack_registry(
    environ: Mapping[str, str], place: str | None, credentials: Path | None, ca: Path | None
) -> PackRegistryConfig | None:
    place = place or environ.get(_PACK_REGISTRY)
    files = [
        Path(given).expanduser() if given else None
        for given in (
            credentials or environ.get(_PACK_REGISTRY_CREDENTIALS),
            ca or environ.get(_PACK_REGISTRY_CA),
        )
    ]
    if not place:
        if any(files):
            raise InvalidArgument(
                "credentials or a CA of a pack registry are given and no registry; give --pack-registry "
                "HOST[:PORT]/REPOSITORY too",
                field="pack_registry",
            )
        return None
    repository = parse_repository(place, tls=files[1] is not None, field="pack_registry")
    return PackRegistryConfig(repository, *files)


def _read_shared(
    environ: Mapping[str, str], database: Path | None, pack_folder: Path | None
) -> tuple[Path | None, Path | None]:
    given = [
        path or Path(environ.get(name) or "") for path, name in ((database, _DATABASE), (pack_folder, _PACK_FOLDER))
    ]
    file, folder = (path.expanduser() if path != Path() else None for path in given)
    if folder and not file:
        raise InvalidArgument(
            "a pack folder is what servers share that have one database; give --database too, or no --pack-folder",
            field="pack_folder",
        )
    return file, folder


def _read_shards(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= MAX_SHARDS:
        raise InvalidArgument(f"shards is {text!r}; allowed: 1 (this process alone) to {MAX_SHARDS}", field="shards")
    return int(text)


def _read_stream_age(variable: str | None, flag: float | None) -> float:
    text = variable or str(MAX_STREAM_AGE_SECONDS) if flag is None else str(flag)
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if seconds != 0 and not 1 <= seconds <= _LONGEST_STREAM_SECONDS:
        raise InvalidArgument(
            f"the greatest age of a stream is {text!r}; allowed: 0 (streams never end by age) and 1 to "
            f"{_LONGEST_STREAM_SECONDS:g} seconds",
            field="max_stream_age_seconds",
        )
    return seconds


def check_address(address: str, *, outside: bool = False) -> None:
    """InvalidArgument unless it is a Unix socket or on loopback; with `outside` any address that is well formed."""
    if address.startswith("unix:"):
        if not address.removeprefix("unix:"):
            raise InvalidArgument("unix: needs a path, for example unix:/run/step-oracle.sock", field="listen")
        return
    host, separator, port = address.rpartition(":")
    if not separator or not port.isdecimal() or int(port) > 65535:
        raise InvalidArgument(f"the address {address!r} is not HOST:PORT or unix:/path", field="listen")
    if not outside and not is_loopback(host):
        raise InvalidArgument(
            f"the address {address!r} is reachable from outside, where plaintext and calls without credentials are "
            "not allowed; give --tls-cert, --tls-key and --operator-token-file, or listen on 127.0.0.1, on ::1 or on "
            "a Unix socket",
            field="listen",
        )


def _refuse_unknown(environ: Mapping[str, str]) -> None:
    secured = (_TLS_CERT, _TLS_KEY, _TLS_CLIENT_CA, _OPERATOR_TOKEN_FILE)
    registry = (_PACK_REGISTRY, _PACK_REGISTRY_CREDENTIALS, _PACK_REGISTRY_CA)
    shared = (_DATABASE, _PACK_FOLDER)
    own = (_LISTEN, _METRICS, _STATE_DIR, _DRAIN_SECONDS, _LEASES, _SHARDS, _SCHEDULING, _MAX_STREAM_AGE)
    known = {*own, *shared, *secured, *registry, *_OF_OTHERS}
    for name in sorted(environ):
        if name.startswith("STEP_ORACLE_") and name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise InvalidArgument(f"the environment variable {name} is unknown{hint}", field=name)


def _default_state_dir(environ: Mapping[str, str]) -> str:
    return f"{environ.get('XDG_STATE_HOME') or '~/.local/state'}/step-oracle"
