"""The arms of an experiment: engines grouped by what they were given, with what their clients saw."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from oracle_server.cli.attached import Fleet, FleetEngine
from oracle_server.errors import InvalidArgument
from oracle_server.sampling.draws import server_of
from profiler.experiment_report.runs import EngineRun, read_run

LABEL = "label."


@dataclass(frozen=True)
class Arm:
    """Engines of one kind and their runs. A vLLM server with several ranks has one run and an engine per rank."""

    name: str
    engines: tuple[FleetEngine, ...]
    runs: tuple[EngineRun, ...]

    @property
    def steps(self) -> int:
        """All steps of its engines that the server knows of."""
        return sum(engine.steps for engine in self.engines)

    @property
    def extrapolated_share(self) -> float:
        """Of its steps; NaN where there is none."""
        steps = self.steps
        return sum(engine.extrapolated_steps for engine in self.engines) / steps if steps else float("nan")


def read_results(words: Sequence[str]) -> dict[str, EngineRun]:
    """Runs by engine, from ENGINE_ID=FILE each, in their order."""
    runs: dict[str, EngineRun] = {}
    for word in words:
        engine_id, equals, path = word.partition("=")
        if not engine_id or not equals or not path:
            raise InvalidArgument(
                f"--results is {word!r}; it has the form ENGINE_ID=FILE, for example vllm-0=vllm-0.json",
                field="results",
            )
        if engine_id in runs:
            raise InvalidArgument(
                f"--results names the engine {engine_id!r} twice; give one file each", field="results"
            )
        runs[engine_id] = read_run(engine_id, Path(path))
    return runs


def arms_of(fleet: Fleet, runs: Mapping[str, EngineRun], by: str, baseline: str | None = None) -> list[Arm]:
    """Group the engines that have a run; the baseline, or else the arm of the first run, comes first."""
    grouped: dict[str, list[tuple[EngineRun, list[FleetEngine]]]] = {}
    for engine_id, run in runs.items():
        engines = [engine for engine in fleet.engines if engine_id in (engine.engine_id, server_of(engine.engine_id))]
        if not engines:
            attached = ", ".join(engine.engine_id for engine in fleet.engines[:10]) or "none"
            raise InvalidArgument(
                f"--results names the engine {engine_id!r}, which is not attached to {fleet.experiment}; attached: "
                f"{attached}. The report needs its engines running",
                field="results",
            )
        names = {arm_name(engine, by) for engine in engines}
        if len(names) > 1:
            raise InvalidArgument(
                f"the ranks of {engine_id!r} are of several arms ({', '.join(sorted(names))}), and its results are of "
                "all together; choose another --by",
                field="by",
            )
        grouped.setdefault(names.pop(), []).append((run, engines))
    arms = [
        Arm(name, tuple(engine for _, ranks in members for engine in ranks), tuple(run for run, _ in members))
        for name, members in grouped.items()
    ]
    if baseline is None:
        return arms
    fitting = [arm for arm in arms if baseline in arm.name]
    if len(fitting) != 1:
        raise InvalidArgument(
            f"--baseline is {baseline!r}, which {len(fitting)} arms have in their names; the arms are: "
            f"{'; '.join(arm.name for arm in arms)}",
            field="baseline",
        )
    return fitting + [arm for arm in arms if arm is not fitting[0]]


def arm_name(engine: FleetEngine, by: str) -> str:
    """The arm an engine belongs to."""
    if by == "pack":
        return f"{engine.pack_name} ({engine.pack_digest.removeprefix('sha256:')[:8]})"
    if by == "overlays":
        numbers = ", ".join(map(str, engine.overlays))
        return f"overlay{'s' * (len(engine.overlays) > 1)} {numbers}" if numbers else "no overlay"
    if by == "engine":
        return server_of(engine.engine_id)
    key = by.removeprefix(LABEL)
    if by == key or not key:
        raise InvalidArgument(f"--by is {by!r}; allowed: pack, overlays, engine, {LABEL}KEY", field="by")
    return f"{key}={engine.labels[key]}" if key in engine.labels else f"no label {key}"
