"""TLS and mTLS: who gets a connection, which address is plaintext, and where the server may listen."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import grpc
import pytest

from oracle_calls import Calls, decode, identity
from oracle_server import doctor_oracle
from oracle_server.rpc.channel import ANONYMOUS, Access
from secured_server import OPERATOR, Certificates, SecuredServer, write_secret
from vllm_shim.config import ShimConfig
from vllm_shim.errors import ConfigurationError
from vllm_shim.stream import call_unary, replicas_of

EXPERIMENT = "tenants/default/experiments/default"
COMMAND = str(Path(sys.executable).with_name("step-oracle"))


class Mutual:
    """A server that wants a certificate of its clients, and one of theirs."""

    def __init__(self, folder: Path, pack: Path) -> None:
        self.certificates = Certificates(folder / "tls")
        client = self.certificates.ca.issue_cert("client@example.org")
        self.cert, self.key = folder / "client.pem", folder / "client.key"
        client.cert_chain_pems[0].write_to_path(str(self.cert))
        client.private_key_pem.write_to_path(str(self.key))
        self.server = SecuredServer(
            folder / "mutual",
            certificates=self.certificates,
            arguments=("--tls-client-ca", str(self.certificates.ca_file)),
            listen=("127.0.0.1:0", f"unix:{folder}/s"),
            client=Access(tls_cert=str(self.cert), tls_key=str(self.key)),
        )
        self.server.process.start()
        self.target, self.socket = self.server.process.targets
        self.operator = self.server.access(self.server.operator_file)
        with self.server.calls() as calls:
            calls.create(calls.upload(pack))


@pytest.fixture(scope="module")
def mutual(tmp_path_factory: pytest.TempPathFactory, pack_dirs: dict[str, Path]) -> Iterator[Mutual]:
    made = Mutual(tmp_path_factory.mktemp("mtls"), pack_dirs["constant"])
    yield made
    made.server.process.stop()


def answers(target: str, access: Access) -> bool:
    """Whether a step is answered; False where there is no connection."""
    with Calls(target, access) as calls:
        try:
            return bool(calls.sample(identity("e"), [decode(0)]))
        except grpc.RpcError as error:
            assert error.code() is grpc.StatusCode.UNAVAILABLE  # noqa: PT017 - anything else fails the test
            return False


def test_a_client_needs_a_certificate_that_the_servers_authority_signed(mutual: Mutual, tmp_path: Path) -> None:
    assert answers(mutual.target, mutual.operator)
    assert not answers(mutual.target, replace(mutual.operator, tls_cert="", tls_key=""))
    other = Certificates(tmp_path / "other")
    stranger = replace(mutual.operator, tls_cert=str(other.cert), tls_key=str(other.key))
    assert not answers(mutual.target, stranger)
    # Nor is the server taken for another.
    assert not answers(mutual.target, replace(mutual.operator, tls_ca=str(other.ca_file)))


def test_plaintext_gets_no_answer_at_a_tls_address_and_is_what_a_unix_socket_speaks(mutual: Mutual) -> None:
    token = Access(token_file=mutual.operator.token_file)
    assert not answers(mutual.target, token)
    assert answers(mutual.socket, token)
    # A client with TLS in its environment speaks plaintext there, too.
    assert answers(mutual.socket, mutual.operator)
    # A socket is no way around the credentials.
    with Calls(mutual.socket, ANONYMOUS) as calls, pytest.raises(grpc.RpcError) as caught:
        calls.sample(identity("e"), [decode(0)])
    assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED


def test_the_shim_and_the_command_line_speak_mtls(mutual: Mutual, tmp_path: Path) -> None:
    from step_oracle.v1 import oracle_service_pb2 as pb

    token, _ = mutual.server.issue("default", "engine")
    variables = {
        "STEP_ORACLE_TARGET": mutual.target,
        "STEP_ORACLE_TLS_CA": mutual.operator.tls_ca,
        "STEP_ORACLE_TLS_CERT": mutual.operator.tls_cert,
        "STEP_ORACLE_TLS_KEY": mutual.operator.tls_key,
        "STEP_ORACLE_TOKEN_FILE": str(token),
    }
    config = ShimConfig.from_environment(variables, [])
    request = pb.GetDeviceRequest(engine=identity("e"))
    answer = call_unary(replicas_of(config), config, "GetDevice", request, pb.GetDeviceResponse)
    assert answer.device.name == "Test Device"
    # What the doctor says is what an engine would be told.
    call = doctor_oracle._channel_call(asdict(config), 10.0)
    findings = [doctor_oracle.health(call, mutual.target), *doctor_oracle.experiment(asdict(config), call, None)]
    assert [finding.status for finding in findings] == ["ok", "ok", "ok", "warning"]
    assert "scope engine" in findings[-1].message

    def run(*words: str, **more: str) -> subprocess.CompletedProcess[str]:
        clean = {name: value for name, value in os.environ.items() if not name.startswith("STEP_ORACLE_")}
        environment = {**clean, **variables, **more}
        return subprocess.run([COMMAND, *words], capture_output=True, text=True, timeout=60, env=environment)

    refused = run("experiment", "list")
    assert (refused.returncode, refused.stdout) == (1, "")
    assert "has the scope engine and ListExperiments needs admin" in refused.stderr
    operator = run("experiment", "list", STEP_ORACLE_TOKEN_FILE=mutual.operator.token_file)
    assert operator.returncode == 0, operator.stderr
    assert EXPERIMENT in operator.stdout
    nothing = run("experiment", "list", STEP_ORACLE_TOKEN_FILE=str(tmp_path / "nothing"))
    assert nothing.returncode == 2
    assert "STEP_ORACLE_TOKEN_FILE" in nothing.stderr
    plain = run("experiment", "list", STEP_ORACLE_TLS_CA="")
    assert plain.returncode == 3
    assert "STEP_ORACLE_TLS_CA where it speaks TLS" in plain.stderr


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    variables = {"STEP_ORACLE_TARGET": "127.0.0.1:1", "STEP_ORACLE_TLS_CA": str(tmp_path / "nothing")}
    config = ShimConfig.from_environment(variables, [])
    with pytest.raises(ConfigurationError, match="nothing"):
        replicas_of(config)
    with pytest.raises(OSError, match="nothing"):
        doctor_oracle._channel_call(asdict(config), 1.0)


def serve(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A `serve` that is expected to end by itself."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("STEP_ORACLE_")}
    command = [COMMAND, "serve", "--state-dir", str(folder / "state"), "--metrics", "off", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env=clean)


@pytest.mark.parametrize("shards", ["1", "2"])
def test_files_that_cannot_be_used_keep_the_server_from_starting(shards: str, tmp_path: Path) -> None:
    good = Certificates(tmp_path / "good")
    other = Certificates(tmp_path / "other")
    operator = write_secret(tmp_path / "operator", OPERATOR)
    short = write_secret(tmp_path / "short", "short")
    faults = {
        ("--tls-cert", str(good.cert)): "give --tls-key too",
        ("--tls-cert", str(good.cert), "--tls-key", str(other.key)): "cannot be used",
        ("--tls-cert", str(tmp_path / "none"), "--tls-key", str(good.key)): "No such file",
        (*good.arguments(), "--tls-client-ca", str(good.key)): "cannot be used",
        ("--operator-token-file", str(tmp_path / "none")): "cannot be read",
        ("--operator-token-file", str(short)): "has 1 tokens, the shortest of 5 characters",
        ("--listen", "0.0.0.0:0", "--operator-token-file", str(operator)): "plaintext",
        ("--listen", "0.0.0.0:0", *good.arguments()): "without credentials",
    }
    for arguments, what in faults.items():
        done = serve(tmp_path, "--shards", shards, *arguments)
        assert (done.returncode, what in done.stderr) == (2, True), (arguments, done.stderr)
        assert "Traceback" not in done.stderr
        assert OPERATOR not in done.stderr
