"""`step-oracle health`: is the server there, and is it ready? For probes of containers, and for what waits for it.

Runs from the bare core, standard library and grpc, so that it starts quickly and is in an engine's environment too.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from oracle_server.config import DEFAULT_TARGET

SERVICE = "step_oracle.v1.OracleService"
READY, NOT_READY, USAGE, UNREACHABLE = 0, 1, 2, 3
_METHOD = "/grpc.health.v1.Health/Check"
# HealthCheckResponse.status is field 1, a varint; zero is not written.
_STATUSES = {b"": "UNKNOWN", b"\x08\x01": "SERVING", b"\x08\x02": "NOT_SERVING", b"\x08\x03": "SERVICE_UNKNOWN"}
_BETWEEN_TRIES_SECONDS = 0.25


@dataclass(frozen=True)
class Health:
    """What one check found: whether anything answered, and the status it named or the error it gave."""

    answered: bool
    status: str

    def exit_status(self, *, alive_is_enough: bool) -> int:
        """0: as good as asked for, 1: it answers but is not ready, 3: nothing answers."""
        if not self.answered:
            return UNREACHABLE
        return READY if alive_is_enough or self.status == "SERVING" else NOT_READY


def main(argv: Sequence[str]) -> int:
    """Run the command; 0: healthy, 1: answers but is not ready, 2: bad arguments, 3: nothing answers."""
    arguments = _parser().parse_args(list(argv))
    health = wait(
        lambda: best(arguments.target, arguments.service, arguments.timeout, alive_is_enough=arguments.alive),
        alive_is_enough=arguments.alive,
        seconds=arguments.wait,
    )
    status = health.exit_status(alive_is_enough=arguments.alive)
    print(f"{arguments.target}: {health.status}", file=sys.stdout if status == READY else sys.stderr)
    return status


def wait(
    ask: Callable[[], Health],
    *,
    alive_is_enough: bool,
    seconds: float,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> Health:
    """The first healthy check, or the last one when the time is over; without time, the only one."""
    end = clock() + seconds
    while True:
        health = ask()
        if health.exit_status(alive_is_enough=alive_is_enough) == READY or clock() >= end:
            return health
        sleep(_BETWEEN_TRIES_SECONDS)


def best(target: str, service: str, timeout_seconds: float, *, alive_is_enough: bool) -> Health:
    """The best health among the replicas a target names: engines need one of them."""
    checks = (check(one.strip(), service, timeout_seconds) for one in target.split(","))
    return min(checks, key=lambda health: health.exit_status(alive_is_enough=alive_is_enough))


def check(target: str, service: str, timeout_seconds: float) -> Health:
    """One standard health check, spoken without its generated code, which the core does not have."""
    import grpc

    name = service.encode()
    request = b"\x0a" + bytes([len(name)]) + name if name else b""
    # A probe of this machine goes to no proxy, and a fresh channel knows nothing of the last probe's back-off.
    options = [("grpc.enable_http_proxy", 0), ("grpc.use_local_subchannel_pool", 1)]
    with grpc.insecure_channel(target, options=options) as channel:
        unary = channel.unary_unary(_METHOD, request_serializer=bytes, response_deserializer=bytes)
        try:
            response: bytes = unary(request, timeout=timeout_seconds)
        except grpc.RpcError as error:
            code = error.code().name
            return Health(code not in ("UNAVAILABLE", "DEADLINE_EXCEEDED"), f"{code} {error.details() or ''}".strip())
    return Health(answered=True, status=_STATUSES.get(response, f"an answer of {len(response)} bytes"))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="step-oracle health",
        description="Ask an oracle server for its health. Exit status: 0 serving, 1 not serving, 3 nothing answers.",
    )
    parser.add_argument(
        "--target",
        default=os.environ.get("STEP_ORACLE_TARGET") or DEFAULT_TARGET,
        help=f"HOST:PORT or unix:/path; one of several will do ($STEP_ORACLE_TARGET, else {DEFAULT_TARGET})",
    )
    parser.add_argument("--service", default=SERVICE, type=_service, help=f"gRPC service to ask about ({SERVICE})")
    parser.add_argument("--alive", action="store_true", help="any answer will do: loading and draining are fine")
    parser.add_argument("--timeout", type=_seconds, default=3.0, metavar="SECONDS", help="for each check (3)")
    parser.add_argument("--wait", type=_seconds, default=0.0, metavar="SECONDS", help="try until then (0: once)")
    return parser


def _service(text: str) -> str:
    if len(text.encode()) > 127:
        raise argparse.ArgumentTypeError("a service name of at most 127 bytes is allowed")
    return text


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds from 0 on")
    return value


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
