"""An experiment's engines as plain values, for commands that work on what a server says."""

from __future__ import annotations

import json
from dataclasses import dataclass

from oracle_server.cli.console import connect, experiment_name


@dataclass(frozen=True)
class FleetEngine:
    """One attached engine; `overlays` are the numbers of those that touch it."""

    engine_id: str
    pack_digest: str
    pack_name: str
    labels: dict[str, str]
    steps: int
    extrapolated_steps: int
    leased_steps: int
    late_answers: int
    overlays: tuple[int, ...]


@dataclass(frozen=True)
class Fleet:
    """The engines attached now, under the experiment's present generation."""

    experiment: str
    generation: int
    engines: tuple[FleetEngine, ...]


def read_fleet(name: str, tenant: str, target: str) -> Fleet:
    """Ask the server; ends the command where it does not answer or refuses."""
    full = experiment_name(name, tenant)
    with connect(target) as client:
        from oracle_server.rpc import wire
        from oracle_server.state.identity import EngineIdentity
        from oracle_server.state.overlays import touches
        from step_oracle.v1 import experiment_pb2, pack_pb2

        experiment = client.call(
            client.experiments.GetExperiment, experiment_pb2.GetExperimentRequest(name=full)
        ).experiment
        found = client.call(client.experiments.ListEngines, experiment_pb2.ListEnginesRequest(parent=full)).engines
        parent = full.partition("/experiments/")[0]
        packs = {
            digest: client.call(client.packs.GetPack, pack_pb2.GetPackRequest(name=f"{parent}/packs/{digest}")).pack
            for digest in {engine.pack_digest for engine in found}
        }
        overlays = wire.read_binding(experiment.binding).overlays
        engines = []
        for engine in found:
            identity = EngineIdentity(full, engine.engine_id, dict(engine.labels), engine.model, 0)
            engines.append(
                FleetEngine(
                    engine.engine_id,
                    engine.pack_digest,
                    str(json.loads(packs[engine.pack_digest].manifest_json).get("name", "")),
                    dict(engine.labels),
                    engine.steps,
                    engine.extrapolated_steps,
                    engine.leased_steps,
                    engine.late_answers,
                    tuple(i for i, overlay in enumerate(overlays) if touches(overlay, identity)),
                )
            )
    return Fleet(full, experiment.generation, tuple(engines))
