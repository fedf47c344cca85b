"""The process: addresses, health, reflection, metrics, logs, the end."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from oracle_calls import EXPERIMENT, TIMEOUT, Calls, decode, identity, reason_of
from oracle_process import OracleProcess
from step_oracle.v1 import experiment_pb2, oracle_service_pb2

Dirs = dict[str, Path]
SERVICES = ("OracleService", "ProfilePackService", "ExperimentService", "TenantService")


def test_tcp_and_a_unix_socket_answer_at_once(
    new_server: Callable[..., OracleProcess], pack_dirs: Dirs, tmp_path: Path
) -> None:
    server = new_server(listen=("127.0.0.1:0", f"unix:{tmp_path}/s.sock"))
    assert server.target.startswith("127.0.0.1:")
    assert not server.target.endswith(":0")
    with Calls(server.targets[0]) as tcp, Calls(server.targets[1]) as local:
        tcp.create(tcp.upload(pack_dirs["constant"]))
        assert local.sample(identity("e"), [decode(0)]) == tcp.sample(identity("e"), [decode(0)])


def test_a_killed_server_comes_back_on_its_unix_socket(
    new_server: Callable[..., OracleProcess], tmp_path: Path
) -> None:
    server = new_server(listen=(f"unix:{tmp_path}/s.sock",))
    server.kill()
    server.start()
    assert server.is_serving()


@pytest.mark.parametrize("service", ["", *(f"step_oracle.v1.{name}" for name in SERVICES)])
def test_every_service_has_a_health_of_its_own(service: str, shared_server: OracleProcess) -> None:
    assert shared_server.is_serving(service)


def test_reflection_names_the_services(shared_server: OracleProcess) -> None:
    with shared_server.channel() as channel:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        request = reflection_pb2.ServerReflectionRequest(list_services="")
        (response,) = list(stub.ServerReflectionInfo(iter([request]), timeout=TIMEOUT))
    names = {service.name for service in response.list_services_response.service}
    assert {f"step_oracle.v1.{name}" for name in SERVICES} <= names


def test_sigterm_drains_streams_and_ends_with_zero(server: OracleProcess, pack_dirs: Dirs) -> None:
    with Calls(server.target) as calls:
        calls.create(calls.upload(pack_dirs["constant"]))
        stream = calls.join("e")
        stream.ask(decode(0))
        watch = calls.experiments.WatchExperiment(experiment_pb2.WatchExperimentRequest(name=EXPERIMENT))
        next(watch)
        begin = time.monotonic()
        assert server.terminate() == 0
        assert time.monotonic() - begin < 10
        for call in (stream.receive, lambda: next(watch)):
            with pytest.raises(grpc.RpcError) as caught:
                call()
            assert reason_of(caught.value) == ("UNAVAILABLE", "DRAINING")


def test_a_client_that_does_not_read_does_not_hold_up_the_end(server: OracleProcess, pack_dirs: Dirs) -> None:
    with Calls(server.target) as calls:
        calls.create(calls.upload(pack_dirs["constant"]))
        engine = identity("deaf")
        incarnation = calls.attach(engine).incarnation

        def flood() -> object:
            opening = oracle_service_pb2.StreamOpen(engine=engine, incarnation=incarnation)
            yield oracle_service_pb2.StreamStepsRequest(open=opening)
            for i in range(5000):
                yield oracle_service_pb2.StreamStepsRequest(steps=[decode(100 * i + j) for j in range(100)])

        call = calls.oracle.StreamSteps(flood(), timeout=60)
        next(call)
        time.sleep(1)
        assert server.terminate() == 0
        call.cancel()


def test_pings_that_come_close_together_close_no_connection(shared_server: OracleProcess) -> None:
    """Those of engines on a busy machine, which live from leases, so that the server has nothing to send meanwhile.

    gRPC answers the fourth ping in a row that comes too soon with GOAWAY (too_many_pings).
    """
    host, port = shared_server.targets[0].split(":")
    with socket.create_connection((host, int(port)), timeout=TIMEOUT) as connection:
        connection.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + _frame(_SETTINGS))
        frames = _frames(connection)
        for number in range(5):
            connection.sendall(_frame(_PING, number.to_bytes(8, "big")))
            for kind, payload in frames:
                assert kind != _GOAWAY, payload
                if kind == _PING and payload == number.to_bytes(8, "big"):
                    break
            # Not what is waited for: how far apart they are.
            time.sleep(1.1)


_SETTINGS, _PING, _GOAWAY = 4, 6, 7


def _frame(kind: int, payload: bytes = b"") -> bytes:
    """A frame of HTTP/2 on the connection itself (RFC 9113, 4.1)."""
    return len(payload).to_bytes(3, "big") + bytes((kind, 0)) + bytes(4) + payload


def _frames(connection: socket.socket) -> Iterator[tuple[int, bytes]]:
    """(type, payload) of each frame that comes."""
    with connection.makefile("rb") as file:
        while head := file.read(9):
            yield head[3], file.read(int.from_bytes(head[:3], "big"))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--listen", "0.0.0.0:8470"], "give --tls-cert, --tls-key and --operator-token-file"),
        (["--listen", "somewhere:8470"], "without credentials"),
        (["--listen", "8470"], "is not HOST:PORT"),
        (["--listen", "unix:"], "needs a path"),
        (["--metrics", "0.0.0.0:1"], "metrics are plaintext"),
    ],
)
def test_an_address_reachable_from_outside_is_refused(arguments: list[str], sentence: str, tmp_path: Path) -> None:
    done = serve(tmp_path, *arguments)
    assert done.returncode == 2
    assert sentence in done.stderr


def test_an_unknown_variable_is_refused(tmp_path: Path) -> None:
    done = serve(tmp_path, STEP_ORACLE_STATEDIR="x")
    assert done.returncode == 2
    assert "did you mean STEP_ORACLE_STATE_DIR?" in done.stderr


def test_a_port_in_use_is_told(shared_server: OracleProcess, tmp_path: Path) -> None:
    done = serve(tmp_path, "--listen", shared_server.target)
    assert done.returncode == 1
    assert "cannot be bound" in done.stderr


def test_a_newer_database_is_refused(server: OracleProcess) -> None:
    import sqlite3

    server.terminate()
    with sqlite3.connect(server.state_dir / "oracle.db") as db:
        db.execute("UPDATE schema_version SET version = 99")
    db.close()
    done = serve(server.state_dir)
    assert done.returncode == 1
    assert "schema version 99" in done.stderr


def serve(state_dir: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """A `serve` that is expected to end by itself."""
    command = [str(Path(sys.executable).with_name("step-oracle")), "serve", "--state-dir", str(state_dir), *arguments]
    if "--listen" not in arguments:
        command += ["--listen", "127.0.0.1:0"]
    if "--metrics" not in arguments:
        command += ["--metrics", "off"]
    environment = {**os.environ, **variables}
    return subprocess.run(command, capture_output=True, text=True, timeout=30, env=environment)


def test_metrics_count_steps_by_support(shared: Calls, shared_server: OracleProcess) -> None:
    def read() -> dict[str, float]:
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        text = opener.open(shared_server.metrics_url, timeout=10).read().decode()
        lines = [line for line in text.splitlines() if not line.startswith("#")]
        return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines}

    before = read()
    stream = shared.join("measured")
    stream.ask(decode(0), decode(1))
    after = read()
    stream.close()
    key = 'step_oracle_steps_total{support="interpolated",tenant="default"}'
    assert after[key] - before.get(key, 0) == 2
    assert after["step_oracle_step_handling_seconds_count"] - before["step_oracle_step_handling_seconds_count"] == 1
    assert after["step_oracle_streams"] == 1
    assert after[f'step_oracle_experiment_generation{{experiment="{EXPERIMENT}"}}'] == 1
    assert not any("measured" in line for line in after)


def test_the_log_is_json_and_says_nothing_per_step(shared: Calls, shared_server: OracleProcess) -> None:
    stream = shared.join("quiet")
    before = len(shared_server.log.splitlines())
    for i in range(50):
        stream.ask(decode(i))
    # What streams of the tests before have left to tell may come meanwhile.
    assert len(shared_server.log.splitlines()) - before < 10
    stream.close()
    events = [json.loads(line)["event"] for line in shared_server.log.splitlines()]
    assert {"started", "ready", "uploaded", "activated", "attached"} <= set(events)


def test_a_full_log_pipe_does_not_stop_the_server(pack_dirs: Dirs, tmp_path: Path) -> None:
    command = [str(Path(sys.executable).with_name("step-oracle")), "serve", "--state-dir", str(tmp_path / "state")]
    command += ["--listen", "127.0.0.1:0", "--metrics", "off"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stderr is not None
    try:
        target = process.stdout.readline().split(" at ")[1].split(";")[0]
        with Calls(target) as calls:
            calls.create(calls.upload(pack_dirs["constant"]))
            # Each line is some 300 bytes: far more than the 64 KiB of a pipe nobody reads.
            for i in range(600):
                with pytest.raises(grpc.RpcError):
                    calls.attach(identity(f"e{i}" + "x" * 200), device_generation=9)
            assert calls.sample(identity("e"), [decode(0)])
        process.send_signal(signal.SIGTERM)
        assert process.wait(15) == 0
    finally:
        process.kill()
        process.stdout.close()
        process.stderr.close()


def test_it_is_not_serving_before_it_is_ready(server: OracleProcess, pack_dirs: Dirs) -> None:
    """A server that has many packs to compile listens at once, refuses calls and says NOT_SERVING."""
    with Calls(server.target) as calls:
        calls.create(calls.upload(pack_dirs["constant"]))
    server.terminate()
    for entry in (server.state_dir / "compiled").iterdir():
        (entry / "layout.json").write_text("{}")
    server.start(wait=False)
    seen: set[str] = set()

    def ask() -> None:
        with Calls(server.target) as calls:
            while "OK" not in seen:
                try:
                    calls.sample(identity("e"), [decode(0)])
                    seen.add("OK")
                except grpc.RpcError as error:
                    seen.add(error.code().name)

    thread = threading.Thread(target=ask)
    thread.start()
    server.wait_ready()
    thread.join(TIMEOUT)
    assert seen == {"UNAVAILABLE", "OK"}
