"""`step-oracle tenant`: whose experiments and packs there are, what each may use, and the tokens that act for it."""

from __future__ import annotations

import os
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from oracle_server.cli.console import (
    FAILED,
    TARGET,
    USAGE,
    Json,
    Target,
    as_dict,
    connect,
    fail,
    print_json,
    print_table,
)

if TYPE_CHECKING:
    from step_oracle.v1 import tenant_pb2 as pb

app = typer.Typer(name="tenant", help="Tenants: quotas and tokens.", no_args_is_help=True, rich_markup_mode=None)
tokens = typer.Typer(name="token", help="The tokens of a tenant.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(tokens)

_Name = Annotated[str, typer.Argument(help="Id of the tenant.")]
_Limit = Annotated[int | None, typer.Option(min=0, max=2**63 - 1, help="0: no limit.")]
_Small = Annotated[int | None, typer.Option(min=0, max=2**32 - 1, help="0: no limit.")]
_OverRate = Annotated[
    str | None, typer.Option(help="Over max-steps-per-second: mark its engines, or detach them as well.")
]
_POLICIES = ("mark", "detach")
_SCOPES = ("engine", "admin")


@app.command()
def create(
    name: _Name,
    max_engines: _Small = None,
    max_streams: _Small = None,
    max_steps_per_second: _Limit = None,
    max_packs: _Small = None,
    max_pack_bytes: _Limit = None,
    over_rate: _OverRate = None,
    target: Target = TARGET,
    json_output: Json = False,
) -> None:
    """Add a tenant; the operator's credential is needed."""
    with connect(target) as client:
        from step_oracle.v1 import tenant_pb2 as pb

        quota = _quota(
            pb.TenantQuota(), max_engines, max_streams, max_steps_per_second, max_packs, max_pack_bytes, over_rate
        )
        request = pb.CreateTenantRequest(tenant_id=name, quota=quota)
        _print(client.call(client.tenants.CreateTenant, request).tenant, json_output)


@app.command()
def update(
    name: _Name,
    max_engines: _Small = None,
    max_streams: _Small = None,
    max_steps_per_second: _Limit = None,
    max_packs: _Small = None,
    max_pack_bytes: _Limit = None,
    over_rate: _OverRate = None,
    target: Target = TARGET,
    json_output: Json = False,
) -> None:
    """Change a quota; what is not given stays as it is. The operator's credential is needed."""
    with connect(target) as client:
        from step_oracle.v1 import tenant_pb2 as pb

        full = _tenant_name(name)
        known = client.call(client.tenants.GetTenant, pb.GetTenantRequest(name=full)).tenant.quota
        quota = _quota(known, max_engines, max_streams, max_steps_per_second, max_packs, max_pack_bytes, over_rate)
        request = pb.UpdateTenantRequest(name=full, quota=quota)
        _print(client.call(client.tenants.UpdateTenant, request).tenant, json_output)


@app.command("list")
def list_tenants(target: Target = TARGET, json_output: Json = False) -> None:
    """Every tenant the credential may see, with its limits; 0 means no limit."""
    with connect(target) as client:
        from step_oracle.v1 import tenant_pb2 as pb

        tenants = list(client.pages(client.tenants.ListTenants, pb.ListTenantsRequest(), "tenants"))
    if json_output:
        print_json([as_dict(tenant) for tenant in tenants])
        return
    print_table(
        ("TENANT", "MAX ENGINES", "MAX STREAMS", "MAX STEPS/S", "OVER RATE", "MAX PACKS", "MAX PACK BYTES"),
        [
            (
                t.name,
                t.quota.max_engines,
                t.quota.max_streams,
                t.quota.max_steps_per_second,
                _policy(t.quota.over_rate),
                t.quota.max_packs,
                t.quota.max_pack_bytes,
            )
            for t in tenants
        ],
    )


@app.command()
def show(name: _Name, target: Target = TARGET, json_output: Json = False) -> None:
    """One tenant."""
    with connect(target) as client:
        from step_oracle.v1 import tenant_pb2 as pb

        request = pb.GetTenantRequest(name=_tenant_name(name))
        _print(client.call(client.tenants.GetTenant, request).tenant, json_output)


@app.command()
def delete(name: _Name, target: Target = TARGET) -> None:
    """Forget a tenant without experiments and packs, and end its tokens; the operator's credential is needed."""
    with connect(target) as client:
        from step_oracle.v1 import tenant_pb2 as pb

        full = _tenant_name(name)
        client.call(client.tenants.DeleteTenant, pb.DeleteTenantRequest(name=full))
    typer.echo(f"{full} deleted")


@tokens.command()
def issue(
    name: _Name,
    scope: Annotated[str, typer.Option(help="engine: steps alone; admin: the tenant's packs and experiments too.")],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Put the secret into this file (mode 600), replacing it whole."),
    ] = None,
    comment: Annotated[str, typer.Option(help="What it is for.")] = "",
    target: Target = TARGET,
    json_output: Json = False,
) -> None:
    """Make a token. Its secret is shown here and never again; two of a scope may be valid at once."""
    if scope not in _SCOPES:
        fail(f"--scope is {scope!r}; allowed: {', '.join(_SCOPES)}", USAGE)
    if output is not None and not output.parent.is_dir():
        fail(f"--output is {output}; its folder is not there, make it first", USAGE)
    with connect(target) as client:
        from step_oracle.v1 import tenant_pb2 as pb

        request = pb.IssueTokenRequest(parent=_tenant_name(name), scope=f"TOKEN_SCOPE_{scope.upper()}", comment=comment)
        response = client.call(client.tenants.IssueToken, request)
    if output is not None:
        _write_secret(output, response.secret, response.token.name)
        response.secret = ""
    if json_output:
        print_json(as_dict(response))
    elif output is not None:
        typer.echo(f"{response.token.name} is in {output}")
    else:
        typer.echo(f"{response.token.name}: the next line is its secret, shown this once", err=True)
        typer.echo(response.secret)


@tokens.command("list")
def list_tokens(name: _Name, target: Target = TARGET, json_output: Json = False) -> None:
    """Every token ever issued to a tenant, oldest first."""
    with connect(target) as client:
        from step_oracle.v1 import tenant_pb2 as pb

        request = pb.ListTokensRequest(parent=_tenant_name(name))
        found = list(client.pages(client.tenants.ListTokens, request, "tokens"))
    if json_output:
        print_json([as_dict(token) for token in found])
        return
    print_table(
        ("TOKEN", "SCOPE", "ISSUED", "REVOKED", "COMMENT"),
        [
            (
                t.name,
                _SCOPES[t.scope - 1],
                _time(t.create_time),
                _time(t.revoke_time) if t.HasField("revoke_time") else "-",
                t.comment,
            )
            for t in found
        ],
    )


@tokens.command()
def revoke(
    token: Annotated[str, typer.Argument(help="tenants/TENANT/tokens/NUMBER, as `token list` shows it.")],
    target: Target = TARGET,
) -> None:
    """End a token: at the return nobody is let in with it, and streams opened with it have been told."""
    with connect(target) as client:
        from step_oracle.v1 import tenant_pb2 as pb

        client.call(client.tenants.RevokeToken, pb.RevokeTokenRequest(name=token))
    typer.echo(f"{token} revoked")


def _quota(
    quota: pb.TenantQuota,
    max_engines: int | None,
    max_streams: int | None,
    max_steps_per_second: int | None,
    max_packs: int | None,
    max_pack_bytes: int | None,
    over_rate: str | None,
) -> pb.TenantQuota:
    """The quota with the options given in their place."""
    from step_oracle.v1 import tenant_pb2 as pb

    changed = pb.TenantQuota()
    changed.CopyFrom(quota)
    limits = {
        "max_engines": max_engines,
        "max_streams": max_streams,
        "max_steps_per_second": max_steps_per_second,
        "max_packs": max_packs,
        "max_pack_bytes": max_pack_bytes,
    }
    for field, value in limits.items():
        if value is not None:
            setattr(changed, field, value)
    if over_rate is not None:
        if over_rate not in _POLICIES:
            fail(f"--over-rate is {over_rate!r}; allowed: {', '.join(_POLICIES)}", USAGE)
        changed.MergeFrom(pb.TenantQuota(over_rate=f"OVER_RATE_POLICY_{over_rate.upper()}"))
    return changed


def _write_secret(path: Path, secret: str, token: str) -> None:
    """Replace the file whole: whoever reads it finds the old secret or the new one, never half of one."""
    try:
        # Made with mode 600.
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(descriptor, "w") as file:
            file.write(secret + "\n")
        Path(name).replace(path)
    except OSError as error:
        fail(f"{token} was made and its secret could not be written to {path}: {error}; revoke it", FAILED)


def _print(tenant: pb.Tenant, json_output: bool) -> None:
    if json_output:
        print_json(as_dict(tenant))
        return
    quota = tenant.quota
    limits = ("max_engines", "max_streams", "max_steps_per_second", "max_packs", "max_pack_bytes")
    shown = ", ".join(f"{name} {getattr(quota, name) or 'unlimited'}" for name in limits)
    typer.echo(f"{tenant.name}: {shown}, over_rate {_policy(quota.over_rate)}")


def _policy(number: int) -> str:
    return _POLICIES[number - 1] if number else _POLICIES[0]


def _tenant_name(name: str) -> str:
    return name if "/" in name else f"tenants/{name}"


def _time(stamp: Any) -> str:
    return datetime.fromtimestamp(stamp.seconds, UTC).strftime("%Y-%m-%d %H:%M:%SZ")
