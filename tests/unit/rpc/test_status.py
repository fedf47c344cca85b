"""Errors keep within what gRPC carries and name what a caller can act on."""

from __future__ import annotations

import pytest
from google.rpc import code_pb2, error_details_pb2

from oracle_server import errors
from oracle_server.errors import BadStep, Draining, EngineMismatch, OracleError
from oracle_server.rpc.status import to_status
from step_oracle.v1 import error_reason_pb2


def all_errors(root: type[OracleError] = OracleError) -> list[type[OracleError]]:
    found = []
    for kind in root.__subclasses__():
        if kind.__module__ == errors.__name__:
            found += [kind, *all_errors(kind)]
    return found


@pytest.mark.parametrize("kind", all_errors(), ids=lambda kind: kind.__name__)
def test_every_error_has_a_code_and_a_reason_of_the_protocol(kind: type[OracleError]) -> None:
    assert kind.code in code_pb2.Code.keys()  # noqa: SIM118
    if kind not in (errors.NotFound, errors.AlreadyExists, errors.FailedPrecondition, errors.Unavailable):
        assert f"ERROR_REASON_{kind.reason}" in error_reason_pb2.ErrorReason.keys()  # noqa: SIM118


def details(error: OracleError) -> list[str]:
    return [detail.TypeName().rpartition(".")[2] for detail in to_status(error).details]


def test_details_say_what_to_do() -> None:
    assert details(BadStep("m", field="shape")) == ["ErrorInfo", "BadRequest"]
    assert details(Draining("m")) == ["ErrorInfo", "RetryInfo"]


def test_a_status_keeps_within_the_metadata_a_peer_takes() -> None:
    """8 KiB by default: the message twice, the details once, as base64."""
    error = EngineMismatch("m" * 100_000, [f"field_{i}: " + "x" * 1000 for i in range(1000)])
    status = to_status(error)
    assert len(status.message.encode()) + len(status.SerializeToString()) * 4 / 3 < 7000
    info = error_details_pb2.ErrorInfo()
    status.details[0].Unpack(info)
    assert int(info.metadata["omitted"]) == 1000 - (len(info.metadata) - 1)
