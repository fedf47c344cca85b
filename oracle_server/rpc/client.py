"""A blocking client of the server, for the command line."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import grpc
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2_grpc
from grpc_status import rpc_status

from oracle_server import pack as packs
from oracle_server.errors import OracleError, PackInvalid, Unavailable
from oracle_server.rpc.channel import ANONYMOUS, Access, open_channel
from step_oracle.v1 import (
    experiment_pb2_grpc,
    oracle_service_pb2_grpc,
    pack_pb2,
    pack_pb2_grpc,
    tenant_pb2_grpc,
)

CHUNK_BYTES = 1 << 20


class Unreachable(Unavailable):
    """No server answered."""


class Refused(OracleError):
    """The server answered with an error; `reason` is a name of step_oracle.v1.ErrorReason without its prefix."""

    def __init__(self, message: str, *, code: str, reason: str, metadata: dict[str, str]) -> None:
        super().__init__(message, metadata=metadata)
        self.code = code
        self.reason = reason


class Client:
    """One connection with the four services as stubs; every call goes through `call` or `stream`."""

    def __init__(self, target: str, timeout_seconds: float = 30.0, *, access: Access = ANONYMOUS) -> None:
        self._target = target
        self._timeout_seconds = timeout_seconds
        self._channel = open_channel(target, access)
        self.oracle = oracle_service_pb2_grpc.OracleServiceStub(self._channel)
        self.packs = pack_pb2_grpc.ProfilePackServiceStub(self._channel)
        self.experiments = experiment_pb2_grpc.ExperimentServiceStub(self._channel)
        self.tenants = tenant_pb2_grpc.TenantServiceStub(self._channel)
        self.health = health_pb2_grpc.HealthStub(self._channel)

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._channel.close()

    def call(self, method: Callable[..., Any], request: Any, timeout_seconds: float | None = None) -> Any:
        """The response; Unreachable or Refused."""
        try:
            return method(request, timeout=timeout_seconds or self._timeout_seconds)
        except grpc.RpcError as error:
            raise self._error(error) from None

    def stream(self, method: Callable[..., Any], request: Any) -> Iterator[Any]:
        """The responses, without a limit in time; Unreachable or Refused."""
        try:
            yield from method(request)
        except grpc.RpcError as error:
            raise self._error(error) from None

    def pages(self, method: Callable[..., Any], request: Any, field: str) -> Iterator[Any]:
        """All items of a list call, page by page."""
        while True:
            response = self.call(method, request)
            yield from getattr(response, field)
            if not response.next_page_token:
                return
            request.page_token = response.next_page_token

    def upload(self, parent: str, directory: Path, *, validate_only: bool = False) -> pack_pb2.UploadPackResponse:
        """Upload the pack in a folder; PackInvalid where it is not one, Unreachable or Refused."""
        try:
            manifest_json = (directory / packs.MANIFEST_FILE).read_bytes()
        except OSError as error:
            raise PackInvalid(f"{directory} is not a pack: {error}", where=str(directory)) from None
        manifest = packs.parse_manifest(manifest_json)

        def parts() -> Iterator[pack_pb2.UploadPackRequest]:
            begin = pack_pb2.UploadPackBegin(parent=parent, manifest_json=manifest_json, validate_only=validate_only)
            yield pack_pb2.UploadPackRequest(begin=begin)
            for entry in manifest.files:
                with (directory / entry.name).open("rb") as file:
                    while data := file.read(CHUNK_BYTES):
                        yield pack_pb2.UploadPackRequest(chunk=pack_pb2.UploadPackChunk(file=entry.name, data=data))

        for entry in manifest.files:
            if not (directory / entry.name).is_file():
                raise PackInvalid(f"{directory} has no file {entry.name}", where=entry.name)
        return self.call(self.packs.UploadPack, parts(), timeout_seconds=600.0)  # type: ignore[no-any-return]

    def _error(self, error: grpc.RpcError) -> OracleError:
        status = rpc_status.from_call(error)  # type: ignore[arg-type]
        if status is not None:
            info = error_details_pb2.ErrorInfo()
            for detail in status.details:
                if detail.Unpack(info):
                    code = error.code().name
                    return Refused(status.message, code=code, reason=info.reason, metadata=dict(info.metadata))
        if error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
            return Unreachable(
                f"no oracle server answers at {self._target} ({error.details()}); start one with `step-oracle serve`, "
                "or give --target or STEP_ORACLE_TARGET; STEP_ORACLE_TLS_CA where it speaks TLS"
            )
        return Refused(f"{error.code().name}: {error.details()}", code=error.code().name, reason="", metadata={})
