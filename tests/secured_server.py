"""A server that asks for credentials, and the files that tests give it and its clients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType

import trustme

from oracle_calls import TIMEOUT, Calls
from oracle_process import OracleProcess
from oracle_server.rpc.channel import ANONYMOUS, Access
from step_oracle.v1 import tenant_pb2

OPERATOR = "operator-" + "0" * 40


def write_secret(path: Path, secret: str) -> Path:
    """Replace the file whole."""
    new = path.with_name(f".{path.name}.new")
    new.write_text(secret + "\n")
    return new.replace(path)


class Certificates:
    """A certificate authority, and the server's files that it signed."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.ca = trustme.CA()
        self.ca_file, self.cert, self.key = folder / "ca.pem", folder / "cert.pem", folder / "key.pem"
        self.ca.cert_pem.write_to_path(str(self.ca_file))
        self.rotate()

    def rotate(self) -> None:
        """A new certificate of a new key, each file replaced whole, the key first."""
        issued = self.ca.issue_cert("localhost", "127.0.0.1")
        for path, data in (
            (self.key, issued.private_key_pem.bytes()),
            (self.cert, b"".join(blob.bytes() for blob in issued.cert_chain_pems)),
        ):
            new = path.with_name(f".{path.name}.new")
            new.write_bytes(data)
            new.replace(path)

    def arguments(self) -> tuple[str, ...]:
        """The server's options."""
        return ("--tls-cert", str(self.cert), "--tls-key", str(self.key))


class SecuredServer:
    """An OracleProcess with an operator. Owned by the test that made it; use as a context manager."""

    def __init__(
        self,
        folder: Path,
        *,
        arguments: Sequence[str] = (),
        certificates: Certificates | None = None,
        listen: Sequence[str] = ("127.0.0.1:0",),
        metrics: str = "off",
        client: Access = ANONYMOUS,
    ) -> None:
        """`client`: the certificate of its clients, where it wants one."""
        self._folder = folder
        self.certificates = certificates
        folder.mkdir(parents=True, exist_ok=True)
        self.operator_file = write_secret(folder / "operator", OPERATOR)
        self._tls = client if certificates is None else replace(client, tls_ca=str(certificates.ca_file))
        self.process = OracleProcess(
            folder / "state",
            listen=listen,
            metrics=metrics,
            access=self._tls,
            arguments=(
                *arguments,
                *(certificates.arguments() if certificates else ()),
                *("--operator-token-file", str(self.operator_file)),
            ),
        )

    def __enter__(self) -> SecuredServer:
        self.process.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.process.stop()

    def access(self, token_file: Path | None) -> Access:
        """How a client with this token reaches it."""
        return replace(self._tls, token_file=str(token_file or ""))

    def calls(self, token_file: Path | None = None, *, target: str | None = None) -> Calls:
        """A connection; the operator's unless a token is given. Use as a context manager."""
        return Calls(target or self.process.target, self.access(token_file or self.operator_file))

    def anonymous(self) -> Calls:
        """A connection without a credential."""
        return Calls(self.process.target, self.access(None))

    def add_tenant(self, tenant: str, **quota: int) -> None:
        """A new tenant."""
        with self.calls() as calls:
            request = tenant_pb2.CreateTenantRequest(tenant_id=tenant, quota=tenant_pb2.TenantQuota(**quota))  # type: ignore[arg-type]
            calls.tenants.CreateTenant(request, timeout=TIMEOUT)

    def issue(self, tenant: str, scope: str, name: str = "") -> tuple[Path, str]:
        """(file, name) of a new token; an existing file is replaced whole."""
        with self.calls() as calls:
            request = tenant_pb2.IssueTokenRequest(parent=f"tenants/{tenant}", scope=f"TOKEN_SCOPE_{scope.upper()}")
            response = calls.tenants.IssueToken(request, timeout=TIMEOUT)
        path = write_secret(self._folder / (name or f"{tenant}-{scope}"), response.secret)
        return path, response.token.name

    def revoke(self, token: str) -> None:
        """End a token."""
        with self.calls() as calls:
            calls.tenants.RevokeToken(tenant_pb2.RevokeTokenRequest(name=token), timeout=TIMEOUT)
