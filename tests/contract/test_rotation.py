"""Tokens and certificates change while engines take steps: no step is lost, and what is revoked is let in nowhere."""

from __future__ import annotations

import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import grpc
import pytest
import trustme

from guarantees.shim_engines import WatchedStream
from oracle_calls import TIMEOUT, Calls, Stream, decode, identity, reason_of
from secured_server import OPERATOR, Certificates, SecuredServer, write_secret
from sharded_server import wait_for
from step_oracle.v1 import experiment_pb2, oracle_service_pb2, tenant_pb2
from vllm_shim.config import ShimConfig
from vllm_shim.errors import OracleLost
from vllm_shim.stream import replicas_of

Dirs = dict[str, Path]
EXPERIMENT = "tenants/acme/experiments/default"
ENGINES = 4


@pytest.fixture(params=[(), ("--shards", "2")], ids=["one process", "two shards"])
def server(request: pytest.FixtureRequest, tmp_path: Path, pack_dirs: Dirs) -> Iterator[SecuredServer]:
    """A server with TLS, whose tenant `acme` has an experiment."""
    certificates = Certificates(tmp_path / "tls")
    with SecuredServer(tmp_path / "gated", arguments=request.param, certificates=certificates) as server:
        server.add_tenant("acme")
        with server.calls() as calls:
            calls.create(calls.upload(pack_dirs["constant"], "acme"), tenant="acme")
        yield server


class Fleet:
    """Emulated engines that take steps, each on the shim's own stream, until told to stop."""

    def __init__(self, server: SecuredServer, token: Path) -> None:
        self.steps = [0] * ENGINES
        self.failures: list[BaseException] = []
        self._stop = threading.Event()
        access = {f"STEP_ORACLE_{k.upper()}": v for k, v in asdict(server.access(token)).items() if v}
        self._streams = []
        for number in range(ENGINES):
            engine = identity(f"e{number}", EXPERIMENT)
            variables = {"STEP_ORACLE_TARGET": server.process.target, "STEP_ORACLE_LEASES": "0", **access}
            config = ShimConfig.from_environment(variables, [])
            with server.calls(token) as calls:
                opening = oracle_service_pb2.StreamOpen(engine=engine, incarnation=calls.attach(engine).incarnation)
            self._streams.append(WatchedStream(config, replicas_of(config), opening))
        self._threads = [threading.Thread(target=self._run, args=(number,)) for number in range(ENGINES)]

    def __enter__(self) -> Fleet:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(TIMEOUT)
        for stream in self._streams:
            stream.close()

    def go_on(self) -> None:
        """Wait until each engine has taken 20 more steps, or one has failed."""
        before = list(self.steps)
        wait_for(lambda: bool(self.failures) or all(n >= b + 20 for n, b in zip(self.steps, before, strict=True)))

    def open_again(self, times: int) -> None:
        """Wait until each engine has opened, or tried to open, so many streams, or one has failed."""
        before = [stream.opens for stream in self._streams]
        wait_for(
            lambda: (
                bool(self.failures)
                or all(stream.opens >= b + times for stream, b in zip(self._streams, before, strict=True))
            )
        )

    def _run(self, number: int) -> None:
        try:
            while not self._stop.is_set():
                step = self._streams[number].submit(decode(self.steps[number]))
                reply = self._streams[number].wait(step)
                assert (reply.step_index, reply.latency_ns[0]) == (self.steps[number], 10_000_000)
                self.steps[number] += 1
        except BaseException as error:  # noqa: BLE001 - told to the main thread
            self.failures.append(error)


def steps_of(server: SecuredServer) -> dict[str, tuple[int, int]]:
    """(steps the server answered, reconnects) of each engine."""
    with server.calls() as calls:
        request = experiment_pb2.ListEnginesRequest(parent=EXPERIMENT)
        engines = calls.experiments.ListEngines(request, timeout=TIMEOUT).engines
    return {engine.engine_id: (engine.steps, engine.reconnects) for engine in engines}


def served_certificate(server: SecuredServer) -> str:
    host, _, port = server.process.target.rpartition(":")
    return ssl.get_server_certificate((host, int(port)))


def test_tokens_rotate_under_load_with_no_step_lost(server: SecuredServer) -> None:
    token, name = server.issue("acme", "engine")
    with Fleet(server, token) as fleet:
        fleet.go_on()
        for _ in range(5):
            _, newer = server.issue("acme", "engine")
            fleet.go_on()
            server.revoke(name)
            name = newer
            fleet.go_on()
    assert fleet.failures == []
    print(f"5 rotations, {sum(fleet.steps)} steps, 0 failed")
    # Each revocation ended each stream: the engines came back with the new token.
    wait_for(lambda: all(reconnects >= 5 for _, reconnects in steps_of(server).values()))


def test_an_engine_whose_token_was_not_replaced_ends_with_its_revocation(server: SecuredServer) -> None:
    token, name = server.issue("acme", "engine")
    with Fleet(server, token) as fleet:
        fleet.go_on()
        server.revoke(name)
        wait_for(lambda: len(fleet.failures) == ENGINES)
    for failure in fleet.failures:
        assert isinstance(failure, OracleLost)
        assert "UNAUTHENTICATED" in str(failure)


def test_certificates_rotate_under_load_with_no_step_lost(server: SecuredServer) -> None:
    """New engines connect with each certificate, those before go on; files that do not fit change nothing."""
    certificates = server.certificates
    assert certificates is not None
    token, _ = server.issue("acme", "engine")
    seen = [served_certificate(server)]
    with Fleet(server, token) as fleet:
        fleet.go_on()
        for round_number in range(4):
            certificates.rotate()
            seen.append(served_certificate(server))
            with server.calls(token) as calls:
                assert calls.sample(identity(f"new{round_number}", EXPERIMENT), [decode(0)])
            fleet.go_on()
        certificates.cert.write_text("half a certif")
        with server.calls(token) as calls:
            assert calls.sample(identity("while-broken", EXPERIMENT), [decode(0)])
        # Each process keeps the last one it could use, which it read at its last handshake.
        assert served_certificate(server) in seen
        fleet.go_on()
    assert fleet.failures == []
    assert len(set(seen)) == 5
    print(f"4 rotations, {sum(fleet.steps)} steps, 0 failed")
    assert "the changed certificate cannot be used" in server.process.log


def test_an_engine_that_moves_reads_its_certificates_anew_until_they_fit(tmp_path: Path, pack_dirs: Dirs) -> None:
    """Its stream grows old while the files are being replaced: it tries with each state they have."""
    certificates = Certificates(tmp_path / "tls")
    arguments = ("--max-stream-age", "1")
    with SecuredServer(tmp_path / "gated", arguments=arguments, certificates=certificates) as server:
        server.add_tenant("acme")
        with server.calls() as calls:
            calls.create(calls.upload(pack_dirs["constant"], "acme"), tenant="acme")
        token, _ = server.issue("acme", "engine")
        authority = certificates.ca_file.read_bytes()
        with Fleet(server, token) as fleet:
            fleet.go_on()
            for broken in (b"half a certif", trustme.CA().cert_pem.bytes()):
                certificates.ca_file.write_bytes(broken)
                # One old stream may be followed on the files before; the others are tries.
                fleet.open_again(3)
                certificates.ca_file.write_bytes(authority)
                fleet.go_on()
        assert fleet.failures == []


@contextmanager
def streams_of(calls: Calls) -> Iterator[dict[str, Callable[[], object]]]:
    """One open stream of each kind, each with the way to wait for its next message."""
    engine = identity("held", EXPERIMENT)
    stream: Stream = calls.open(engine, calls.attach(engine).incarnation)
    watch = calls.experiments.WatchExperiment(experiment_pb2.WatchExperimentRequest(name=EXPERIMENT), timeout=TIMEOUT)
    next(watch)
    yield {"StreamSteps": stream.receive, "WatchExperiment": lambda: next(watch)}
    watch.cancel()


def test_a_revocation_ends_open_streams_and_watches_at_once(server: SecuredServer) -> None:
    token, name = server.issue("acme", "admin")
    with server.calls(token) as calls, streams_of(calls) as waits:
        server.revoke(name)
        for wait in waits.values():
            with pytest.raises(grpc.RpcError) as caught:
                wait()
            assert reason_of(caught.value) == ("UNAVAILABLE", "CREDENTIAL_REVOKED")
        with pytest.raises(grpc.RpcError) as caught:
            calls.tenants.ListTenants(tenant_pb2.ListTenantsRequest(), timeout=TIMEOUT)
        assert reason_of(caught.value)[1] == "UNAUTHENTICATED"


def test_the_operators_token_changes_with_its_file(server: SecuredServer) -> None:
    """Two at once while holders change over; a file that cannot be used changes nothing."""
    new = "another-operator-" + "1" * 40
    request = tenant_pb2.ListTenantsRequest()

    def answered(token: Path) -> bool:
        with server.calls(token) as calls:
            try:
                return bool(calls.tenants.ListTenants(request, timeout=TIMEOUT))
            except grpc.RpcError as error:
                return reason_of(error)[1] != "UNAUTHENTICATED"

    folder = server.operator_file.parent
    old_file, new_file = write_secret(folder / "old", OPERATOR), write_secret(folder / "new", new)
    assert (answered(old_file), answered(new_file)) == (True, False)
    server.operator_file.write_text(f"{OPERATOR}\n{new}\n")
    wait_for(lambda: answered(new_file))
    assert answered(old_file)
    with server.calls(old_file) as calls:
        watch = calls.experiments.WatchExperiment(
            experiment_pb2.WatchExperimentRequest(name=EXPERIMENT), timeout=TIMEOUT
        )
        next(watch)
        write_secret(server.operator_file, new)
        with pytest.raises(grpc.RpcError) as caught:
            next(watch)
        assert reason_of(caught.value)[1] == "CREDENTIAL_REVOKED"
    assert (answered(old_file), answered(new_file)) == (False, True)
    write_secret(server.operator_file, "short")
    wait_for(lambda: "the operator's tokens stay as they are" in server.process.log)
    assert answered(new_file)
