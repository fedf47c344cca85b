"""`step-oracle pack push` and `pack pull`: packs from folder to registry and back, with no server between."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from oracle_server.cli.console import FAILED, UNREACHABLE, USAGE, Json, exits, fail, print_json

if TYPE_CHECKING:
    from oracle_server.registry_reference import RegistryReference
    from oracle_server.state.pack_registry import PackRegistry

_T = TypeVar("_T")

_Credentials = Annotated[
    Path | None,
    typer.Option(envvar="STEP_ORACLE_PACK_REGISTRY_CREDENTIALS", help="File with one line, USER:PASSWORD."),
]
_Ca = Annotated[
    Path | None,
    typer.Option(envvar="STEP_ORACLE_PACK_REGISTRY_CA", help="PEM file of who signs the registry's certificate."),
]


def push(
    pack: Annotated[Path, typer.Argument(help="Local pack.")],
    reference: Annotated[str, typer.Argument(metavar="REF", help="HOST[:PORT]/REPOSITORY, with :TAG for an alias.")],
    credentials: _Credentials = None,
    ca: _Ca = None,
    json_output: Json = False,
) -> None:
    """Check a pack and store it in an OCI registry under its digest. Exit 3 where the registry does not answer."""
    from oracle_server.pack import check_pack

    with exits():
        place = _parse(reference, ca)
        if place.digest:
            fail(f"{reference!r} names an image by its digest; give the repository, with :TAG for an alias", USAGE)
        report = check_pack(pack)
        with _registry(place, credentials, ca) as registry:
            pushed = _wait(registry.push_as(pack, place.tag))
        if pushed.digest != report.digest:
            fail(f"{pack} was changed while it was pushed: {report.digest} was checked, {pushed.digest} sent", FAILED)
    name = f"{place.place}:{_tag(pushed.digest)}"
    if json_output:
        print_json(
            {
                "digest": pushed.digest,
                "reference": name,
                "alias": f"{place.place}:{place.tag}" if place.tag else "",
                "image": f"{place.place}@{pushed.image_digest}",
                "warnings": list(report.warnings),
            }
        )
        return
    typer.echo(f"{pushed.digest}  {name}")
    for warning in report.warnings:
        typer.echo(f"  warning: {warning}", err=True)


def pull(
    reference: Annotated[
        str,
        typer.Argument(metavar="REF", help="HOST[:PORT]/REPOSITORY with :sha256-HEX, :TAG or @sha256:IMAGE-DIGEST."),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the pack; must not exist.")],
    credentials: _Credentials = None,
    ca: _Ca = None,
    json_output: Json = False,
) -> None:
    """Copy a pack from an OCI registry to a local folder and check it as a server would."""
    from oracle_server.errors import StoreFailed
    from oracle_server.pack import check_pack

    if output.exists() or output.is_symlink():
        fail(f"{output} exists; give a folder that does not", USAGE)
    with exits():
        place = _parse(reference, ca)
        if not place.tag and not place.digest:
            fail(f"{reference!r} names no pack; give :sha256-HEX, :TAG or @sha256:IMAGE-DIGEST behind it", USAGE)
        try:
            output.parent.mkdir(parents=True, exist_ok=True)
            partial = Path(tempfile.mkdtemp(prefix=f".{output.name}.", suffix=".partial", dir=output.parent))
        except OSError as error:
            raise StoreFailed(f"the disk refused: {error}; nothing was changed") from error
        try:
            with _registry(place, credentials, ca) as registry:
                pulled = _wait(registry.fetch_as(place.digest or place.tag, partial, _digest(place.tag)))
            report = check_pack(partial)
            partial.chmod(0o755)
            partial.rename(output)
        except OSError as error:
            raise StoreFailed(f"the disk refused: {error}; nothing was changed") from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    if json_output:
        print_json(
            {
                "digest": pulled.digest,
                "pack": str(output),
                "image": f"{place.place}@{pulled.image_digest}",
                "warnings": list(report.warnings),
            }
        )
        return
    typer.echo(f"{pulled.digest}  {output}")
    for warning in report.warnings:
        typer.echo(f"  warning: {warning}", err=True)


def _parse(reference: str, ca: Path | None) -> RegistryReference:
    from oracle_server.registry_reference import parse_reference

    return parse_reference(reference, tls=ca is not None)


@contextmanager
def _registry(place: RegistryReference, credentials: Path | None, ca: Path | None) -> Iterator[PackRegistry]:
    """The repository; 3 where it does not answer, 1 where it refuses."""
    from oracle_server.errors import PackRegistryUnavailable

    try:
        from oracle_server.state.pack_registry import PackRegistry
    except ModuleNotFoundError as error:
        fail(f"registries need the extra oci ({error.name} is not installed): pip install 'step-oracle[oci]'", FAILED)
    registry = PackRegistry(
        place.authority, place.repository, plaintext=place.plaintext, credentials=credentials, ca=ca
    )
    try:
        yield registry
    except PackRegistryUnavailable as error:
        fail(error.message, FAILED if error.answered else UNREACHABLE)
    finally:
        registry.close()


def _wait(work: Coroutine[Any, Any, _T]) -> _T:
    return asyncio.run(work)


def _tag(digest: str) -> str:
    from oracle_server.state.pack_artifact import tag_of

    return tag_of(digest)


def _digest(tag: str) -> str:
    """The digest of the pack that a tag made of one promises; empty for other tags."""
    hexadecimal = tag.removeprefix("sha256-")
    is_digest = tag != hexadecimal and len(hexadecimal) == 64 and set(hexadecimal) <= set("0123456789abcdef")
    return f"sha256:{hexadecimal}" if is_digest else ""
