"""The server's commands: serve, recompute, top, and the control plane from a terminal.

Everything heavy is imported inside the commands, so that --help is quick. Exit status: 0 done, 1 refused or a failed
check, 2 wrong arguments, 3 no server answers.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from oracle_server.cli import experiments, overlays, packs, registries, shadows, tenants, top
from oracle_server.cli.console import FAILED, Json, connect, exits, print_json

app = typer.Typer(
    name="step-oracle",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
app.command()(top.top)
app.add_typer(packs.app)
app.add_typer(experiments.app)
app.add_typer(tenants.app)
packs.app.command("push")(registries.push)
packs.app.command("pull")(registries.pull)
experiments.app.command("overlay")(overlays.overlay)
experiments.app.command("shadow")(shadows.shadow)


@app.command()
def serve(
    listen: Annotated[
        list[str] | None,
        typer.Option(
            help="HOST:PORT (port 0: any free one) or unix:/path; may be repeated. Beyond loopback with TLS only."
        ),
    ] = None,
    state_dir: Annotated[Path | None, typer.Option(help="Folder of the database and the packs.")] = None,
    metrics: Annotated[str | None, typer.Option(help="HOST:PORT on loopback for Prometheus, or off.")] = None,
    no_leases: Annotated[bool, typer.Option("--no-leases", help="Answer every step; leave no engine a piece.")] = False,
    shards: Annotated[int | None, typer.Option(help="Processes that answer steps at the same address.")] = None,
    max_stream_age: Annotated[
        float | None, typer.Option(metavar="SECONDS", help="Engines open their streams anew after so long; 0: never.")
    ] = None,
    tls_cert: Annotated[Path | None, typer.Option(help="PEM file: TCP addresses speak TLS.")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="PEM file: the certificate's key.")] = None,
    tls_client_ca: Annotated[Path | None, typer.Option(help="PEM file: clients need a certificate it signed.")] = None,
    operator_token_file: Annotated[
        Path | None, typer.Option(help="The operator's token: every call needs a credential.")
    ] = None,
    pack_registry: Annotated[
        str | None, typer.Option(help="HOST[:PORT]/REPOSITORY of an OCI registry that keeps every pack.")
    ] = None,
    pack_registry_credentials: Annotated[
        Path | None, typer.Option(help="File with one line, USER:PASSWORD, for the registry.")
    ] = None,
    pack_registry_ca: Annotated[
        Path | None, typer.Option(help="PEM file of who signs the registry's certificate.")
    ] = None,
    database: Annotated[
        Path | None, typer.Option(help="File of a PostgreSQL URL: the state of a fleet of servers.")
    ] = None,
    pack_folder: Annotated[
        Path | None, typer.Option(help="With --database: the folder all its servers have mounted, for packs.")
    ] = None,
) -> None:
    """Run the oracle server until SIGTERM."""
    from oracle_server.config import read_config

    with exits():
        config = read_config(
            os.environ,
            listen=listen or (),
            metrics=metrics,
            state_dir=state_dir,
            leases=not no_leases,
            shards=shards,
            max_stream_age_seconds=max_stream_age,
            tls_cert=tls_cert,
            tls_key=tls_key,
            tls_client_ca=tls_client_ca,
            operator_token_file=operator_token_file,
            pack_registry=pack_registry,
            pack_registry_credentials=pack_registry_credentials,
            pack_registry_ca=pack_registry_ca,
            database=database,
            pack_folder=pack_folder,
        )
        from oracle_server.event_loop import without_event_engine

        # Before the import below, which brings grpc.
        without_event_engine(os.environ)
        from oracle_server.server import serve as run

        status = run(config)
    raise typer.Exit(status)


@app.command()
def recompute(
    traces: Annotated[list[Path], typer.Argument(help="Step traces of shims (STEP_ORACLE_TRACE).")],
    state_dir: Annotated[Path | None, typer.Option(help="The server's folder: every generation is recomputed.")] = None,
    database: Annotated[
        Path | None, typer.Option(help="With --state-dir: the file of the database's URL, where the fleet has one.")
    ] = None,
    target: Annotated[
        str | None, typer.Option(help="A running server: only steps of the current generation are recomputed.")
    ] = None,
    json_output: Json = False,
) -> None:
    """Recompute every reply of step traces and compare it with what was answered. Exit 1 where one differs."""
    with exits():
        if (state_dir is None) == (target is None):
            typer.echo("step-oracle: give --state-dir or --target", err=True)
            raise typer.Exit(2)
        from oracle_server.rpc.recompute import recompute_at, recompute_from

        if target is not None:
            with connect(target) as client:
                report = recompute_at(client, traces)
        elif state_dir is not None:
            report = recompute_from(state_dir, traces, database)
    if json_output:
        print_json(report.as_dict())
    else:
        typer.echo(report.summary())
    sys.stdout.flush()
    if report.different:
        raise typer.Exit(FAILED)
