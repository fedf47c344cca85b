"""The shim's configuration: one table of environment variables, read once at the edge."""

from __future__ import annotations

import os
import re
import socket
import sys
from collections.abc import Mapping
from dataclasses import dataclass, fields

from vllm_shim.errors import ConfigurationError

WAIT_MODES = ("hybrid", "sleep", "spin", "yield")
LOST_POLICIES = ("fail", "hold")
_EXPERIMENT = re.compile(r"tenants/[a-z0-9][a-z0-9-]{0,62}/experiments/[a-z0-9][a-z0-9-]{0,62}")
# Set by the shim itself, or owned by the oracle server, the tests and the development tools.
_PASSED_THROUGH = {
    f"STEP_ORACLE_{name}"
    for name in (
        "DEVICE DATA_PARALLEL_SIZE LAST_WORDS LISTEN METRICS STATE_DIR DRAIN_SECONDS SHARDS SCHEDULING DATA CACHE "
        "MAX_STREAM_AGE_SECONDS CAPTURE TLS_CLIENT_CA OPERATOR_TOKEN_FILE"
    ).split()
}


@dataclass(frozen=True)
class ShimConfig:
    """One field per variable STEP_ORACLE_<FIELD>.

    | field | default | meaning |
    | --- | --- | --- |
    | target | required | oracle server: host:port or unix:/path; its replicas with commas, or dns:///name:port |
    | experiment | tenants/default/experiments/default | whose fleet this engine joins |
    | engine_id | host name and port of the vLLM server | unique in the fleet; "/dp<rank>" is appended for DP ranks |
    | engine_labels | none | k=v,k=v for the experiment's rules |
    | token_file | none | file with the tenant's bearer token; read at each stream |
    | tls_ca | none | PEM file: speak TLS, with an oracle whose certificate it has signed |
    | tls_cert, tls_key | none | PEM files: this client's own certificate, where the oracle asks for one |
    | budget_seconds | 10 | how long a step may wait for a lost oracle |
    | on_lost | fail | fail: error and exit after the budget; hold: wait without limit |
    | wait | hybrid | hybrid: sleep to 0.2 ms before the deadline, then spin; sleep; spin; yield: spin and give way |
    | trace | none | path prefix of the step trace; "<engine id>.trace" is appended |
    | leases | 1 | 0: every step is asked for, none is answered from a lease |
    | allow_mismatch | none | cold fields that may differ from the pack, comma separated |
    """

    target: str
    experiment: str
    engine_id: str
    engine_labels: Mapping[str, str]
    token_file: str
    tls_ca: str
    tls_cert: str
    tls_key: str
    budget_seconds: float
    on_lost: str
    wait: str
    trace: str
    leases: bool
    allow_mismatch: tuple[str, ...]

    @staticmethod
    def from_environment(environ: Mapping[str, str] = os.environ, argv: list[str] | None = None) -> ShimConfig:
        """Reads and checks every variable; raises ConfigurationError naming the one at fault."""
        known = {f"STEP_ORACLE_{field.name.upper()}" for field in fields(ShimConfig)} | _PASSED_THROUGH
        unknown = sorted(name for name in environ if name.startswith("STEP_ORACLE_") and name not in known)
        if unknown:
            raise ConfigurationError(
                f"unknown variable {unknown[0]}; allowed are {', '.join(sorted(known - _PASSED_THROUGH))}"
            )

        def read(name: str, default: str = "") -> str:
            return environ.get(f"STEP_ORACLE_{name}", "") or default

        target = read("TARGET")
        if not all(map(str.strip, target.split(","))):
            raise ConfigurationError(
                f"STEP_ORACLE_TARGET is {target!r}; give host:port or unix:/path of the oracle server, or of each of "
                "its replicas with commas between them"
            )
        experiment = read("EXPERIMENT", "tenants/default/experiments/default")
        if not _EXPERIMENT.fullmatch(experiment):
            raise ConfigurationError(
                f"STEP_ORACLE_EXPERIMENT is {experiment!r}; it has the form tenants/<tenant>/experiments/<experiment>"
            )
        return ShimConfig(
            target=target,
            experiment=experiment,
            engine_id=read("ENGINE_ID", _default_engine_id(sys.argv if argv is None else argv)),
            engine_labels=_labels(read("ENGINE_LABELS")),
            token_file=read("TOKEN_FILE"),
            tls_ca=read("TLS_CA"),
            tls_cert=read("TLS_CERT"),
            tls_key=read("TLS_KEY"),
            budget_seconds=_positive("BUDGET_SECONDS", read("BUDGET_SECONDS", "10")),
            on_lost=_one_of("ON_LOST", read("ON_LOST", "fail"), LOST_POLICIES),
            wait=_one_of("WAIT", read("WAIT", "hybrid"), WAIT_MODES),
            trace=read("TRACE"),
            leases=_one_of("LEASES", read("LEASES", "1"), ("0", "1")) == "1",
            allow_mismatch=tuple(name for name in read("ALLOW_MISMATCH").split(",") if name),
        )


def _default_engine_id(argv: list[str]) -> str:
    """Host name and the vLLM server's port; the process id where there is no server (the offline LLM class)."""
    port = "8000" if "serve" in argv or any("api_server" in word for word in argv) else f"pid{os.getpid()}"
    for word, following in zip(argv, [*argv[1:], ""], strict=False):
        if word == "--port" and following:
            port = following
        elif word.startswith("--port="):
            port = word.removeprefix("--port=")
    return f"{socket.gethostname()}:{port}"


def _labels(text: str) -> dict[str, str]:
    labels = {}
    for pair in filter(None, text.split(",")):
        name, separator, value = pair.partition("=")
        if not separator or not name:
            raise ConfigurationError(f"STEP_ORACLE_ENGINE_LABELS has {pair!r}; it has the form name=value,name=value")
        labels[name.strip()] = value.strip()
    return labels


def _positive(name: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value < float("inf"):
        raise ConfigurationError(f"STEP_ORACLE_{name} is {text!r}; a number of seconds above 0 is allowed")
    return value


def _one_of(name: str, text: str, allowed: tuple[str, ...]) -> str:
    if text not in allowed:
        raise ConfigurationError(f"STEP_ORACLE_{name} is {text!r}; allowed are {', '.join(allowed)}")
    return text
