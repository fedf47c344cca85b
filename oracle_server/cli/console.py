"""What every command shares: the server's address, output, exit statuses."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from oracle_server.config import DEFAULT_TARGET
from oracle_server.errors import InvalidArgument, OracleError

if TYPE_CHECKING:
    from google.protobuf.message import Message

    from oracle_server.rpc.client import Client

FAILED = 1
USAGE = 2
UNREACHABLE = 3

Target = Annotated[
    str,
    typer.Option(
        envvar="STEP_ORACLE_TARGET",
        help="HOST:PORT or unix:/path; several replicas with commas.",
        show_default=True,
    ),
]
Tenant = Annotated[str, typer.Option(help="The tenant's id.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
TARGET = DEFAULT_TARGET
TENANT = "default"


@contextmanager
def connect(target: str) -> Iterator[Client]:
    """A client, whose errors end the command: 3 where no server answers, 1 where it refuses."""
    from oracle_server.rpc.channel import read_access
    from oracle_server.rpc.client import Client, Refused, Unreachable

    with exits(), Client(target, access=read_access(os.environ)) as client:
        try:
            yield client
        except Unreachable as error:
            fail(error.message, UNREACHABLE)
        except Refused as error:
            fail(error.message, FAILED)


@contextmanager
def exits() -> Iterator[None]:
    """Errors of the command's own arguments end it with 2, all others with 1."""
    from oracle_server.errors import PackInvalid

    try:
        yield
    except PackInvalid as error:
        fail(f"{error.where}: {error.message}" if error.where else error.message, FAILED)
    except InvalidArgument as error:
        fail(error.message, USAGE)
    except OracleError as error:
        fail(error.message, FAILED)


def fail(message: str, status: int) -> None:
    """Print the message on stderr and end with the status."""
    typer.echo(f"step-oracle: {message}", err=True)
    raise typer.Exit(status)


def experiment_name(name: str, tenant: str) -> str:
    """The full name of an experiment given by its name or its id."""
    return name if "/" in name else f"tenants/{tenant}/experiments/{name}"


def print_message(message: Message) -> None:
    """A message as JSON, field names as in the .proto file."""
    print_json(as_dict(message))


def print_json(value: Any) -> None:
    """JSON on stdout, indented for people, one line in a pipe."""
    typer.echo(json.dumps(value, indent=2 if sys.stdout.isatty() else None))


def as_dict(message: Message) -> dict[str, Any]:
    """A message as plain values; fields without a value too."""
    from google.protobuf.json_format import MessageToDict

    return MessageToDict(message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)


def print_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Columns, aligned by spaces."""
    lines = [list(header), *[[str(value) for value in row] for row in rows]]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    for line in lines:
        typer.echo("  ".join(value.ljust(width) for value, width in zip(line, widths, strict=True)).rstrip())
