"""Every error a caller can act on. A message says what was given, what is allowed and what to do.

    OracleError
    ├── InvalidArgument            INVALID_ARGUMENT
    │   ├── PackInvalid            the pack is refused
    │   │   └── PackDigestMismatch
    │   └── BadStep                a step that cannot be
    ├── NotFound                   NOT_FOUND
    │   ├── ExperimentNotFound
    │   ├── GenerationNotFound
    │   ├── PackNotFound
    │   ├── TenantNotFound
    │   └── TokenNotFound
    ├── AlreadyExists              ALREADY_EXISTS
    │   ├── ExperimentExists
    │   ├── EngineIdTaken
    │   └── TenantExists
    ├── FailedPrecondition         FAILED_PRECONDITION
    │   ├── PackInUse
    │   ├── ExperimentInUse
    │   ├── TenantInUse
    │   ├── EngineMismatch         carries the differences
    │   ├── NoRuleMatches
    │   ├── SupportRefused
    │   ├── AcceptanceUnknown
    │   └── StoreFailed
    ├── GenerationConflict         ABORTED
    ├── QuotaExceeded              RESOURCE_EXHAUSTED
    ├── Unauthenticated            UNAUTHENTICATED
    ├── PermissionDenied           PERMISSION_DENIED
    └── Unavailable                UNAVAILABLE
        ├── StaleGeneration
        ├── CredentialRevoked      of an open stream
        ├── DatabaseUnavailable
        ├── PackRegistryUnavailable
        ├── Starting
        └── Draining

`code` is the name of the gRPC status code and `reason` the name in step_oracle.v1.ErrorReason without its prefix; the
rpc layer turns them into google.rpc.Status, the command line into an exit status.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence


class OracleError(Exception):
    """Root of the tree. `metadata` travels as google.rpc.ErrorInfo.metadata."""

    code = "INTERNAL"
    reason = "UNSPECIFIED"

    def __init__(self, message: str, *, metadata: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.metadata = dict(metadata or {})


class InvalidArgument(OracleError):
    """An argument that is not allowed; `field` names it."""

    code = "INVALID_ARGUMENT"
    reason = "INVALID_ARGUMENT"

    def __init__(self, message: str, *, field: str = "") -> None:
        super().__init__(message, metadata={"field": field} if field else None)
        self.field = field


class PackInvalid(InvalidArgument):
    """A pack the server does not take; `where` names the file, column, row or manifest field at fault."""

    reason = "PACK_INVALID"

    def __init__(self, message: str, *, where: str = "") -> None:
        super().__init__(message, field=where)
        self.where = where


class PackDigestMismatch(PackInvalid):
    """Bytes that do not have the digest somebody states for them."""

    reason = "PACK_DIGEST_MISMATCH"


class BadStep(InvalidArgument):
    """A step shape that contradicts itself or exceeds the limits."""

    reason = "BAD_STEP"


class NotFound(OracleError):
    """Something named that is not there."""

    code = "NOT_FOUND"


class ExperimentNotFound(NotFound):
    """No experiment of that name."""

    reason = "EXPERIMENT_NOT_FOUND"


class GenerationNotFound(NotFound):
    """The experiment never had that generation."""

    reason = "GENERATION_NOT_FOUND"


class PackNotFound(NotFound):
    """No pack of that digest is stored for the tenant."""

    reason = "PACK_NOT_FOUND"


class TenantNotFound(NotFound):
    """No such tenant."""

    reason = "TENANT_NOT_FOUND"


class TokenNotFound(NotFound):
    """The tenant never had that token."""

    reason = "TOKEN_NOT_FOUND"


class AlreadyExists(OracleError):
    """Something that is there already."""

    code = "ALREADY_EXISTS"


class ExperimentExists(AlreadyExists):
    """An experiment of that name exists."""

    reason = "EXPERIMENT_EXISTS"


class EngineIdTaken(AlreadyExists):
    """Another live engine has this id."""

    reason = "ENGINE_ID_TAKEN"


class TenantExists(AlreadyExists):
    """A tenant of that name exists."""

    reason = "TENANT_EXISTS"


class FailedPrecondition(OracleError):
    """The request is well formed but the state does not allow it."""

    code = "FAILED_PRECONDITION"


class PackInUse(FailedPrecondition):
    """An experiment still names the pack."""

    reason = "PACK_IN_USE"


class ExperimentInUse(FailedPrecondition):
    """Engines are attached to the experiment."""

    reason = "EXPERIMENT_IN_USE"


class TenantInUse(FailedPrecondition):
    """The tenant has experiments or packs."""

    reason = "TENANT_IN_USE"


class EngineMismatch(FailedPrecondition):
    """Engine and pack differ in cold fields; `items` has one sentence per difference."""

    reason = "ENGINE_MISMATCH"

    def __init__(self, message: str, items: Sequence[str]) -> None:
        super().__init__(message, metadata={f"item_{i}": item for i, item in enumerate(items)})
        self.items = tuple(items)


class NoRuleMatches(FailedPrecondition):
    """No rule fits the engine and the experiment has no default pack."""

    reason = "NO_RULE_MATCHES"


class SupportRefused(FailedPrecondition):
    """The pack has no data for the shape and the experiment refuses such steps."""

    reason = "SUPPORT_REFUSED"


class AcceptanceUnknown(FailedPrecondition):
    """The engine speculates and nobody said how many draft tokens are accepted."""

    reason = "ACCEPTANCE_UNKNOWN"


class StoreFailed(FailedPrecondition):
    """The disk or the database refused the write; nothing was changed."""

    reason = "STORE_FAILED"


class GenerationConflict(OracleError):
    """expected_generation is not the current one."""

    code = "ABORTED"
    reason = "GENERATION_CONFLICT"


class QuotaExceeded(OracleError):
    """A quota or a size limit."""

    code = "RESOURCE_EXHAUSTED"
    reason = "QUOTA_EXCEEDED"


class Unauthenticated(OracleError):
    """No credential, or one that is not valid."""

    code = "UNAUTHENTICATED"
    reason = "UNAUTHENTICATED"


class PermissionDenied(OracleError):
    """The credential is valid, but not for this call or this tenant."""

    code = "PERMISSION_DENIED"
    reason = "PERMISSION_DENIED"


class Unavailable(OracleError):
    """Try again, here or elsewhere."""

    code = "UNAVAILABLE"


class StaleGeneration(Unavailable):
    """This server has not seen the generation the engine has."""

    reason = "STALE_GENERATION"


class CredentialRevoked(Unavailable):
    """The token a stream was opened with is valid no more; a holder of a newer one opens it again."""

    reason = "CREDENTIAL_REVOKED"


class DatabaseUnavailable(Unavailable):
    """The database that the servers of a fleet share does not answer this one; what is in memory goes on answering."""

    reason = "DATABASE_UNAVAILABLE"


class PackRegistryUnavailable(Unavailable):
    """A pack has to come from, or go to, the registry, which cannot be asked now; nothing was changed.

    `answered`: it answered, and did not let this server in.
    """

    reason = "PACK_REGISTRY_UNAVAILABLE"

    def __init__(self, message: str, *, answered: bool = False) -> None:
        super().__init__(message)
        self.answered = answered


class Starting(Unavailable):
    """The server is not ready yet."""

    reason = "STARTING"


class Draining(Unavailable):
    """The server is stopping."""

    reason = "DRAINING"
