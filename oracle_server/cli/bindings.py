"""Changes of a running experiment's binding: read, edited, activated as one new generation."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from oracle_server.rpc.client import Client
    from step_oracle.v1 import experiment_pb2 as pb


def read_binding(client: Client, name: str) -> pb.Experiment:
    """The experiment as it is now."""
    from step_oracle.v1 import experiment_pb2 as pb

    return client.call(  # type: ignore[no-any-return]
        client.experiments.GetExperiment, pb.GetExperimentRequest(name=name)
    ).experiment


def edit_binding(
    client: Client,
    name: str,
    edit: Callable[[pb.Binding], None],
    *,
    expected_generation: int = 0,
    dry_run: bool = False,
) -> pb.Experiment:
    """Activate the present binding as `edit` leaves it; the rest of it stays. Warnings go to stderr."""
    from step_oracle.v1 import experiment_pb2 as pb

    current = read_binding(client, name)
    edit(current.binding)
    request = pb.ActivateExperimentRequest(
        name=name,
        binding=current.binding,
        # The binding is of the generation just read: another one in between must not be undone.
        expected_generation=expected_generation or current.generation,
        validate_only=dry_run,
    )
    response = client.call(client.experiments.ActivateExperiment, request)
    for warning in response.warnings:
        typer.echo(f"warning: {warning}", err=True)
    return response.experiment  # type: ignore[no-any-return]
