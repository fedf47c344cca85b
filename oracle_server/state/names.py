"""Resource names: tenants/{tenant}, and below it experiments/{experiment}, packs/{digest}, tokens/{number}."""

from __future__ import annotations

import re

from oracle_server.errors import InvalidArgument

_ID = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_ID_RULE = "1 to 63 of a-z, 0-9 and -, beginning with a letter or digit"

MAX_ENGINE_ID_BYTES = 256
MAX_COMMENT = 1000


def tenant_name(tenant: str) -> str:
    """The name of a tenant."""
    return f"tenants/{tenant}"


def experiment_name(tenant: str, experiment: str) -> str:
    """The name of an experiment."""
    return f"tenants/{tenant}/experiments/{experiment}"


def pack_name(tenant: str, digest: str) -> str:
    """The name of a stored pack."""
    return f"tenants/{tenant}/packs/{digest}"


def token_name(tenant: str, number: int) -> str:
    """The name of a token."""
    return f"tenants/{tenant}/tokens/{number}"


def parse_tenant(name: str, field: str) -> str:
    """The tenant in tenants/{tenant}."""
    parts = name.split("/")
    if len(parts) != 2 or parts[0] != "tenants" or not _ID.fullmatch(parts[1]):
        raise InvalidArgument(f"{field} is {_shown(name)}; a tenant is named tenants/TENANT, {_ID_RULE}", field=field)
    return parts[1]


def parse_experiment(name: str, field: str) -> tuple[str, str]:
    """Tenant and experiment in tenants/{tenant}/experiments/{experiment}."""
    parts = name.split("/")
    well_formed = len(parts) == 4 and parts[0] == "tenants" and parts[2] == "experiments"
    if not well_formed or not _ID.fullmatch(parts[1]) or not _ID.fullmatch(parts[3]):
        raise InvalidArgument(
            f"{field} is {_shown(name)}; an experiment is named tenants/TENANT/experiments/EXPERIMENT, {_ID_RULE}",
            field=field,
        )
    return parts[1], parts[3]


def parse_pack(name: str, field: str) -> tuple[str, str]:
    """Tenant and digest in tenants/{tenant}/packs/{digest}."""
    parts = name.split("/")
    well_formed = len(parts) == 4 and parts[0] == "tenants" and parts[2] == "packs"
    if not well_formed or not _ID.fullmatch(parts[1]):
        raise InvalidArgument(f"{field} is {_shown(name)}; a pack is named tenants/TENANT/packs/DIGEST", field=field)
    return parts[1], check_digest(parts[3], field)


def parse_token(name: str, field: str) -> tuple[str, int]:
    """Tenant and number in tenants/{tenant}/tokens/{number}."""
    parts = name.split("/")
    well_formed = len(parts) == 4 and parts[0] == "tenants" and parts[2] == "tokens"
    if not well_formed or not _ID.fullmatch(parts[1]) or not re.fullmatch(r"[1-9][0-9]{0,17}", parts[3]):
        raise InvalidArgument(
            f"{field} is {_shown(name)}; a token is named tenants/TENANT/tokens/NUMBER, {_ID_RULE}", field=field
        )
    return parts[1], int(parts[3])


def check_tenant_id(tenant: str, field: str) -> str:
    """The id itself, if it can be the second part of a name."""
    if not _ID.fullmatch(tenant):
        raise InvalidArgument(f"{field} is {_shown(tenant)}; allowed: {_ID_RULE}", field=field)
    return tenant


def check_comment(comment: str, field: str) -> str:
    """The comment itself, if it is short enough to be kept."""
    if len(comment) > MAX_COMMENT:
        raise InvalidArgument(f"{field} has {len(comment)} characters; allowed: {MAX_COMMENT}", field=field)
    return comment


def check_experiment_id(experiment: str, field: str) -> str:
    """The id itself, if it can be the last part of a name."""
    if not _ID.fullmatch(experiment):
        raise InvalidArgument(f"{field} is {_shown(experiment)}; allowed: {_ID_RULE}", field=field)
    return experiment


def check_digest(digest: str, field: str) -> str:
    """The digest itself, if it is one."""
    if not _DIGEST.fullmatch(digest):
        raise InvalidArgument(
            f"{field} is {_shown(digest)}; a digest is sha256: and 64 hexadecimal digits in lower case", field=field
        )
    return digest


def check_engine_id(engine_id: str, field: str) -> str:
    """The id itself, if it is 1 to 256 bytes of printable text."""
    if not 0 < len(engine_id.encode()) <= MAX_ENGINE_ID_BYTES or not engine_id.isprintable():
        raise InvalidArgument(
            f"{field} is {_shown(engine_id)}; allowed: 1 to {MAX_ENGINE_ID_BYTES} bytes of printable text", field=field
        )
    return engine_id


def _shown(text: str) -> str:
    return repr(text if len(text) <= 80 else text[:77] + "...")
