"""`step-oracle pack`: packs on the server, and the server's check of a local one."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from oracle_server.cli.console import (
    FAILED,
    TARGET,
    TENANT,
    USAGE,
    Json,
    Target,
    Tenant,
    as_dict,
    connect,
    exits,
    fail,
    print_json,
    print_table,
)

if TYPE_CHECKING:
    from oracle_server.rpc.client import Client

app = typer.Typer(
    name="pack", help="Profile packs: check, show, upload, list.", no_args_is_help=True, rich_markup_mode=None
)

_Digest = Annotated[str, typer.Argument(help="Digest of a stored pack, or the beginning of one.")]


@app.command()
def check(directories: Annotated[list[Path], typer.Argument(help="Local packs.")], json_output: Json = False) -> None:
    """Say whether the server would take these packs: the same code, in the same child process."""
    from oracle_server.errors import OracleError
    from oracle_server.pack import check_pack

    results: list[dict[str, Any]] = []
    for directory in directories:
        try:
            report = check_pack(directory)
        except OracleError as error:
            where = f"{error.metadata['field']}: " if error.metadata.get("field") else ""
            results.append({"pack": str(directory), "taken": False, "why": f"{where}{error.message}"})
        else:
            results.append(
                {"pack": str(directory), "taken": True, "digest": report.digest, "warnings": list(report.warnings)}
            )
    if json_output:
        print_json(results)
    else:
        for result in results:
            typer.echo(f"{result['pack']}: {result['digest'] if result['taken'] else 'refused: ' + result['why']}")
            for warning in result.get("warnings", ()):
                typer.echo(f"  warning: {warning}")
    if not all(result["taken"] for result in results):
        raise typer.Exit(FAILED)


@app.command()
def upload(
    directories: Annotated[list[Path], typer.Argument(help="Local packs.")],
    tenant: Tenant = TENANT,
    dry_run: Annotated[bool, typer.Option(help="Let the server check it and store nothing.")] = False,
    target: Target = TARGET,
    json_output: Json = False,
) -> None:
    """Store packs on the server; a pack that is there already is no error."""
    with connect(target) as client:
        for directory in directories:
            response = client.upload(f"tenants/{tenant}", directory, validate_only=dry_run)
            if json_output:
                print_json(as_dict(response))
                continue
            how = "checked, not stored" if dry_run else "was stored already" if response.existed else "stored"
            typer.echo(f"{response.pack.digest}  {directory} {how}")
            for warning in response.warnings:
                typer.echo(f"  warning: {warning}", err=True)


@app.command("list")
def list_packs(tenant: Tenant = TENANT, target: Target = TARGET, json_output: Json = False) -> None:
    """Packs on the server."""
    with connect(target) as client:
        found = _all(client, tenant)
    if json_output:
        print_json([_shown(pack) for pack in found])
        return
    rows = []
    for pack in found:
        manifest = json.loads(pack.manifest_json)
        device = manifest["device"]["name"]
        created = datetime.fromtimestamp(pack.create_time.seconds, UTC).strftime("%Y-%m-%d %H:%M")
        rows.append((pack.digest[:19], manifest["name"], manifest["kind"], manifest["model"]["id"], device, created))
    print_table(("DIGEST", "NAME", "KIND", "MODEL", "DEVICE", "STORED"), rows)


@app.command()
def get(digest: _Digest, tenant: Tenant = TENANT, target: Target = TARGET, json_output: Json = False) -> None:
    """The manifest of a stored pack."""
    from step_oracle.v1 import pack_pb2 as pb

    with connect(target) as client:
        name = f"tenants/{tenant}/packs/{resolve(client, tenant, digest)}"
        pack = client.call(client.packs.GetPack, pb.GetPackRequest(name=name)).pack
    print_json(_shown(pack)) if json_output else typer.echo(json.dumps(json.loads(pack.manifest_json), indent=2))


@app.command()
def download(
    digest: _Digest,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the pack; must not exist.")],
    tenant: Tenant = TENANT,
    target: Target = TARGET,
) -> None:
    """Copy a stored pack to a local folder."""
    from step_oracle.v1 import pack_pb2 as pb

    if output.exists():
        fail(f"{output} exists; give a folder that does not", USAGE)
    with connect(target) as client:
        name = f"tenants/{tenant}/packs/{resolve(client, tenant, digest)}"
        output.mkdir(parents=True)
        for part in client.stream(client.packs.DownloadPack, pb.DownloadPackRequest(name=name)):
            with (output / Path(part.file).name).open("ab") as file:
                file.write(part.data)
    typer.echo(str(output))


@app.command()
def delete(digest: _Digest, tenant: Tenant = TENANT, target: Target = TARGET) -> None:
    """Remove a pack no experiment answers from."""
    from step_oracle.v1 import pack_pb2 as pb

    with connect(target) as client:
        full = resolve(client, tenant, digest)
        client.call(client.packs.DeletePack, pb.DeletePackRequest(name=f"tenants/{tenant}/packs/{full}"))
    typer.echo(f"{full} deleted")


def resolve(client: Client, tenant: str, given: str) -> str:
    """The digest meant by a digest, its beginning (with or without "sha256:"), or a local pack, which is uploaded."""
    if len(given) == 71 and given.startswith("sha256:"):
        return given
    if (Path(given) / "manifest.json").is_file():
        return str(client.upload(f"tenants/{tenant}", Path(given)).pack.digest)
    beginning = given.removeprefix("sha256:")
    found = [pack.digest for pack in _all(client, tenant) if pack.digest.removeprefix("sha256:").startswith(beginning)]
    if len(found) != 1 or len(beginning) < 4:
        which = f"{len(found)} packs of tenants/{tenant}" if len(beginning) >= 4 else "too short a beginning"
        with exits():
            fail(
                f"{given!r} is {which}; give a digest, at least 4 digits of one, or the folder of a local pack", FAILED
            )
    return str(found[0])


def _all(client: Client, tenant: str) -> list[Any]:
    from step_oracle.v1 import pack_pb2 as pb

    return list(client.pages(client.packs.ListPacks, pb.ListPacksRequest(parent=f"tenants/{tenant}"), "packs"))


def _shown(pack: Any) -> dict[str, Any]:
    shown = as_dict(pack)
    shown["manifest"] = json.loads(shown.pop("manifest_json"))
    return shown
