"""How a capture's plan went, from the events its driver wrote: what was known when, and what was left out."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from profiler.capture.launch import runs_of
from profiler.capture.steps import PLAN_FILE


@dataclass(frozen=True)
class PlanProgress:
    """One run of a plan. `points`: minutes since its first visit, regions known to the target, regions measured."""

    run: str
    regions: int
    # Known from earlier runs of the capture.
    known: int
    visits: int
    points: tuple[tuple[float, int, int], ...]
    # Label of a region and why it was not visited, the last word on each.
    left_out: dict[str, str]
    ended: bool


def read_plans(capture: Path) -> list[PlanProgress]:
    """Of each run of a capture that a plan drove, or of the one run that the folder is; oldest first."""
    plans = ((run, run / PLAN_FILE) for run in runs_of(capture) or [capture])
    found = (_progress(run.name, _events(path)) for run, path in plans if path.exists())
    return [progress for progress in found if progress is not None]


def _events(path: Path) -> Iterable[dict[str, Any]]:
    """Whole lines: a killed driver may have left a part of one."""
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if isinstance(event, dict):
            yield event


def _progress(run: str, events: Iterable[dict[str, Any]]) -> PlanProgress | None:
    begin: dict[str, Any] | None = None
    begin_ns, visits, ended = 0, 0, False
    points: list[tuple[float, int, int]] = []
    left_out: dict[str, str] = {}
    for event in events:
        kind, minutes = event.get("event"), (event.get("monotonic_ns", 0) - begin_ns) / 60e9
        if kind == "plan begins":
            begin = event
        elif begin is None:
            continue
        elif kind == "warm-up ends":
            begin_ns = event["monotonic_ns"]
            points.append((0.0, begin["known"], begin["measured"]))
        elif kind == "visit ends":
            visits += 1
            left_out.pop(event["visit"], None)
            points.append((minutes, event["regions_tight"], event["regions_measured"]))
        elif kind == "left out":
            left_out[event["visit"]] = event["reason"]
        elif kind == "plan ends":
            points.append((minutes, event["tight"], event["measured"]))
            ended = True
    if begin is None or not points:
        return None
    return PlanProgress(run, begin["regions"], begin["known"], visits, tuple(points), left_out, ended)
