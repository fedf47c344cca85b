"""Names of places in OCI registries: HOST[:PORT]/REPOSITORY, of one artifact in it also :TAG or @sha256:DIGEST."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass

from oracle_server.errors import InvalidArgument

# As the OCI distribution specification has them.
_PART = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
_NAME = rf"{_PART}(?:/{_PART})*"
_REFERENCE = re.compile(
    r"(?P<host>\[[0-9A-Fa-f:]+\]|[A-Za-z0-9](?:[A-Za-z0-9.-]*[A-Za-z0-9])?)(?::(?P<port>\d{1,5}))?"
    rf"/(?P<repository>{_NAME})"
    r"(?::(?P<tag>[A-Za-z0-9_][A-Za-z0-9._-]{0,127})|@(?P<digest>sha256:[0-9a-f]{64}))?"
)
_REPOSITORY_LIMIT = 255


@dataclass(frozen=True, slots=True)
class RegistryReference:
    """A repository, and one artifact in it where `tag` or `digest` (of its OCI manifest) is not empty."""

    host: str
    port: int
    repository: str
    # HTTP without TLS: on loopback, where nobody listens in.
    plaintext: bool
    tag: str = ""
    digest: str = ""

    @property
    def authority(self) -> str:
        """HOST:PORT."""
        return f"{self.host}:{self.port}"

    @property
    def place(self) -> str:
        """HOST:PORT/REPOSITORY."""
        return f"{self.authority}/{self.repository}"


def parse_reference(text: str, *, tls: bool, field: str = "reference") -> RegistryReference:
    """The reference; InvalidArgument. A registry on loopback is spoken to without TLS unless `tls`, any other with."""
    match = _REFERENCE.fullmatch(text)
    if match is None or len(match["repository"]) > _REPOSITORY_LIMIT or int(match["port"] or 1) not in range(1, 65536):
        raise InvalidArgument(
            f"{text[:300]!r} names no place in a registry; give HOST[:PORT]/REPOSITORY, for example "
            "registry.example.org/oracle/packs, without https://; in lower case behind the host",
            field=field,
        )
    plaintext = is_loopback(match["host"]) and not tls
    port = int(match["port"] or (80 if plaintext else 443))
    return RegistryReference(
        match["host"], port, match["repository"], plaintext, match["tag"] or "", match["digest"] or ""
    )


def parse_repository(text: str, *, tls: bool, field: str = "reference") -> RegistryReference:
    """A reference that names no artifact; InvalidArgument."""
    reference = parse_reference(text, tls=tls, field=field)
    if reference.tag or reference.digest:
        alone = text.partition("@")[0].removesuffix(f":{reference.tag}")
        raise InvalidArgument(f"{text!r} names one artifact; give the repository alone: {alone}", field=field)
    return reference


def is_loopback(host: str) -> bool:
    """True for localhost, 127.0.0.0/8 and ::1."""
    try:
        return host == "localhost" or ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
