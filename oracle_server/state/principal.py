"""Who calls: what a credential stands for, and the caller of the call that is being answered.

A call's tenant comes from its credential; the names in the request are only compared with it.
"""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass

from oracle_server.errors import PermissionDenied
from oracle_server.state import names

# What a credential may do: the data plane of its tenant, everything in its tenant, everything.
SCOPE_ENGINE = "engine"
SCOPE_ADMIN = "admin"
SCOPE_OPERATOR = "operator"


@dataclass(frozen=True, slots=True)
class Principal:
    """Who a credential is of. Immutable; travels to the shards."""

    # As the history of an experiment names it.
    name: str
    scope: str
    # Whose names it may use; empty: those of every tenant.
    tenant: str = ""
    # SHA-256 of the secret; empty where none was asked for.
    credential: bytes = b""

    def check_tenant(self, tenant: str) -> None:
        """PermissionDenied for a tenant that is not its own, in the same words whether that exists or not."""
        if self.tenant not in ("", tenant):
            raise PermissionDenied(
                f"the token {self.name} is of {names.tenant_name(self.tenant)} and {names.tenant_name(tenant)} is "
                "named; use a token of that tenant"
            )


LOCAL = Principal("local", SCOPE_OPERATOR)

# Set by the gate of a server that asks for credentials, in the task of the call; tasks made there inherit it.
CALLER: ContextVar[Principal] = ContextVar("caller", default=LOCAL)
