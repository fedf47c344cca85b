"""`step-oracle experiment shadow`: a second pack beside the one that answers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated

import typer

from oracle_server.cli.bindings import edit_binding
from oracle_server.cli.console import (
    TARGET,
    TENANT,
    USAGE,
    Json,
    Target,
    Tenant,
    as_dict,
    connect,
    experiment_name,
    fail,
    print_json,
    print_table,
)
from oracle_server.cli.packs import resolve

if TYPE_CHECKING:
    from step_oracle.v1 import experiment_pb2 as pb

_SUPPORT = ("unknown", "exact", "interpolated", "extrapolated")


def shadow(
    name: Annotated[str, typer.Argument(help="Name or id of the experiment.")],
    pack: Annotated[
        str | None,
        typer.Option(help="Let this pack answer the same steps from now on: digest, its beginning, or a local folder."),
    ] = None,
    stop: Annotated[bool, typer.Option("--stop", help="End it.")] = False,
    generation: Annotated[int, typer.Option(help="Report this generation [default: the newest that compared].")] = 0,
    tenant: Tenant = TENANT,
    target: Target = TARGET,
    json_output: Json = False,
) -> None:
    """Say what a shadow pack would have answered, or begin and end one.

    It has no say in any answer; while it is bound no leases are granted, so that the server sees every step.
    """
    if pack is not None and stop:
        fail("--pack begins and --stop ends; give one of them", USAGE)
    full = experiment_name(name, tenant)
    with connect(target) as client:
        from step_oracle.v1 import experiment_pb2 as pb

        if pack is not None or stop:
            digest = "" if pack is None else resolve(client, full.split("/")[1], pack)

            def edit(binding: pb.Binding) -> None:
                binding.shadow_pack_digest = digest

            experiment = edit_binding(client, full, edit)
            if json_output:
                print_json(as_dict(experiment))
            else:
                typer.echo(f"{full}: generation {experiment.generation}, shadow {digest[:19] or 'none'}")
            return
        request = pb.GetShadowReportRequest(name=full, generation=generation)
        report = client.call(client.experiments.GetShadowReport, request)
    if json_output:
        print_json(as_dict(report))
        return
    typer.echo(f"{full}: generation {report.generation}, shadow {report.shadow_pack_digest[:19]}")
    print_table(_HEADER, [("all", *row) for row in _rows(report.regions)] + _of_engines(report.engines))


_HEADER = (
    *("ENGINE", "STEPS OF", "SUPPORT", "SHADOW'S", "STEPS", "MEAN MS", "SHADOW MS", "DIFFERENCE", "MEAN |D|"),
    *("LEAST MS", "MOST MS", "WITHIN 5 %"),
)


def _of_engines(engines: Iterable[pb.ShadowedEngine]) -> list[tuple[object, ...]]:
    return [(engine.engine_id, *row) for engine in engines for row in _rows(engine.regions)]


def _rows(regions: Iterable[pb.ShadowRegion]) -> list[tuple[object, ...]]:
    return [
        (
            "mixed" if region.mixed else "decode",
            _SUPPORT[region.support],
            _SUPPORT[region.shadow_support],
            region.steps,
            f"{region.latency_ns / region.steps / 1e6:.3f}",
            f"{region.shadow_latency_ns / region.steps / 1e6:.3f}",
            f"{100 * (region.shadow_latency_ns - region.latency_ns) / region.latency_ns:+.2f} %",
            f"{100 * region.absolute_difference_ns / region.latency_ns:.2f} %",
            f"{region.min_difference_ns / 1e6:+.3f}",
            f"{region.max_difference_ns / 1e6:+.3f}",
            f"{100 * sum(region.relative_difference_buckets[:3]) / region.steps:.0f} %",
        )
        for region in regions
    ]
