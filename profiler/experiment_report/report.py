"""The report itself: figures of every arm, differences to the first one, as data and as tables."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from oracle_server.cli.attached import Fleet
from profiler.experiment_report.arms import Arm
from profiler.experiment_report.intervals import (
    CONFIDENCE,
    METRICS,
    RESAMPLES,
    Estimate,
    Metric,
    clusters_of,
    difference,
    estimate,
)

SCHEMA = "step_oracle.experiment_report/1"


@dataclass(frozen=True)
class ArmFigures:
    """One arm: its estimates, and by how many percent it differs from the first arm (empty for that one)."""

    arm: Arm
    clusters: int
    figures: Mapping[Metric, Estimate]
    differences: Mapping[Metric, Estimate]


@dataclass(frozen=True)
class ExperimentReport:
    """All arms, the baseline first; `resampled` says what the intervals are made of."""

    fleet: Fleet
    by: str
    arms: tuple[ArmFigures, ...]
    resampled: str
    # Attached engines nobody gave results of: they are in no arm.
    left_out: tuple[str, ...]


def build_report(fleet: Fleet, arms: Sequence[Arm], by: str, *, resamples: int = RESAMPLES) -> ExperimentReport:
    """Estimate every figure of every arm. Seconds of work."""
    clusters, resampled = clusters_of([arm.runs for arm in arms])
    figures = [
        ArmFigures(
            arm,
            len(mine),
            {metric: estimate(mine, metric, resamples=resamples) for metric in METRICS},
            {metric: difference(clusters[0], mine, metric, resamples=resamples) for metric in METRICS if number},
        )
        for number, (arm, mine) in enumerate(zip(arms, clusters, strict=True))
    ]
    known = {engine.engine_id for arm in arms for engine in arm.engines}
    left_out = tuple(engine.engine_id for engine in fleet.engines if engine.engine_id not in known)
    return ExperimentReport(fleet, by, tuple(figures), resampled, left_out)


def as_json(report: ExperimentReport) -> dict[str, Any]:
    """For programs. Numbers without a value are null."""
    return {
        "schema": SCHEMA,
        "experiment": report.fleet.experiment,
        "generation": report.fleet.generation,
        "by": report.by,
        "confidence": CONFIDENCE,
        "resampled": report.resampled,
        "baseline": report.arms[0].arm.name,
        "left_out": list(report.left_out),
        "arms": [
            {
                "name": each.arm.name,
                "engines": [engine.engine_id for engine in each.arm.engines],
                "packs": sorted({engine.pack_digest for engine in each.arm.engines}),
                "requests": sum(len(run.ttft) for run in each.arm.runs),
                "failed_requests": sum(run.failed for run in each.arm.runs),
                "steps": each.arm.steps,
                "extrapolated_share": _plain(each.arm.extrapolated_share),
                "late_answers": sum(engine.late_answers for engine in each.arm.engines),
                "clusters": each.clusters,
                "figures": {metric.name: _estimate(found) for metric, found in each.figures.items()},
                "differences_percent": {metric.name: _estimate(found) for metric, found in each.differences.items()},
            }
            for each in report.arms
        ],
    }


def tables(report: ExperimentReport) -> list[tuple[Sequence[str], list[Sequence[str]]]]:
    """(Header, rows) of what each arm is, of its figures, and of the differences where there are two arms."""
    names = [each.arm.name for each in report.arms]
    shares = [each.arm.extrapolated_share for each in report.arms]
    facts: list[Sequence[str]] = [
        ("engines", *(str(len(each.arm.engines)) for each in report.arms)),
        ("requests", *(str(sum(len(run.ttft) for run in each.arm.runs)) for each in report.arms)),
        ("failed requests", *(str(sum(run.failed for run in each.arm.runs)) for each in report.arms)),
        ("steps", *(str(each.arm.steps) for each in report.arms)),
        ("extrapolated steps", *("-" if math.isnan(share) else f"{100 * share:.2f} %" for share in shares)),
        ("late answers", *(str(sum(e.late_answers for e in each.arm.engines)) for each in report.arms)),
        (f"{report.resampled}", *(str(each.clusters) for each in report.arms)),
    ]
    facts += [
        (f"{metric.name}{'' if metric.of == 'tokens' else ', ms'}", *(_range(e.figures[metric]) for e in report.arms))
        for metric in METRICS
    ]
    found: list[tuple[Sequence[str], list[Sequence[str]]]] = [(("", *names), facts)]
    if len(names) > 1:
        rows: list[Sequence[str]] = [
            (metric.name, *(_percent(each.differences[metric]) for each in report.arms[1:])) for metric in METRICS
        ]
        found.append(((f"DIFFERENCE TO {names[0]}", *names[1:]), rows))
    return found


def _estimate(found: Estimate) -> dict[str, float | None]:
    return {"value": _plain(found.value), "low": _plain(found.low), "high": _plain(found.high)}


def _plain(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _range(found: Estimate) -> str:
    if math.isnan(found.value):
        return "-"
    return _number(found.value) + ("" if math.isnan(found.low) else f" ({_number(found.low)} to {_number(found.high)})")


def _number(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _percent(found: Estimate) -> str:
    if math.isnan(found.value):
        return "-"
    return f"{found.value:+.1f} %" + ("" if math.isnan(found.low) else f" ({found.low:+.1f} to {found.high:+.1f})")
