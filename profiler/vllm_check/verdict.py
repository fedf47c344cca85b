"""Verdicts of several releases, as text, as a table in Markdown and as data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from profiler.vllm_check.finding import Finding

SCHEMA = "step_oracle.vllm_check/1"
_WORDS = {"fits": "fits", "handled": "fits, differences handled", "breaks": "does not fit"}
_SHORT = {"fits": "fits", "handled": "fits *", "breaks": "**no**"}


@dataclass(frozen=True)
class Verdict:
    """What was found of one release; `moved` is relative to the release `compared_with`, empty where there is none."""

    version: str
    parts: tuple[str, ...]
    findings: tuple[Finding, ...]
    compared_with: str
    moved: tuple[str, ...]

    def of_part(self, part: str) -> str:
        """`fits`, `handled` or `breaks`."""
        return _worst([finding for finding in self.findings if finding.part == part])

    @property
    def whole(self) -> str:
        return _worst(self.findings)


def _worst(findings: Sequence[Finding]) -> str:
    severities = {finding.severity for finding in findings}
    return "breaks" if "breaks" in severities else "handled" if severities else "fits"


def text(verdicts: Sequence[Verdict]) -> str:
    """For a terminal."""
    lines = []
    for verdict in verdicts:
        parts = ", ".join(f"{part} {_WORDS[verdict.of_part(part)]}" for part in verdict.parts)
        lines.append(f"vLLM {verdict.version}: {_WORDS[verdict.whole]} ({parts})")
        lines += [
            f"  {finding.severity:<8} {finding.part}: {finding.what} [{finding.where}]" for finding in verdict.findings
        ]
        if verdict.compared_with:
            count = f"{len(verdict.moved)} interfaces" if verdict.moved else "nothing"
            lines.append(f"  moved since {verdict.compared_with}: {count}")
            lines += [f"    {move}" for move in verdict.moved]
    return "\n".join(lines)


def markdown(verdicts: Sequence[Verdict]) -> str:
    """A table of verdicts, then what differs and what moved, newest release first."""
    parts = verdicts[0].parts if verdicts else ()
    lines = [
        f"| vLLM | {' | '.join(parts)} | differences handled | breaks | moved |",
        "| --- |" + " --- |" * (len(parts) + 3),
    ]
    newest_first = list(reversed(verdicts))
    for verdict in newest_first:
        counts = [
            sum(finding.severity == severity for finding in verdict.findings) for severity in ("handled", "breaks")
        ]
        moved = str(len(verdict.moved)) if verdict.compared_with else ""
        words = [verdict.version, *(_SHORT[verdict.of_part(part)] for part in parts), *map(str, counts), moved]
        lines.append(f"| {' | '.join(words)} |")
    lines += ["", "Differences, each with the releases that have it:", ""]
    versions: dict[Finding, list[str]] = {}
    for verdict in verdicts:
        for finding in verdict.findings:
            versions.setdefault(finding, []).append(verdict.version)
    lines += [
        f"- {'**breaks** ' if finding.severity == 'breaks' else ''}{_span(found)}: {finding.what} (`{finding.where}`)"
        for finding, found in versions.items()
    ]
    for verdict in newest_first:
        if verdict.compared_with:
            lines += ["", f"**{verdict.version}**, since {verdict.compared_with}: {_moves(verdict.moved)}"]
    return "\n".join(lines)


def _span(versions: Sequence[str]) -> str:
    return versions[0] if len(versions) == 1 else f"{versions[0]} to {versions[-1]}"


def _moves(moved: Sequence[str]) -> str:
    return "; ".join(f"`{move}`" for move in moved) + "." if moved else "nothing."


def data(verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """For programs."""
    return {
        "schema": SCHEMA,
        "releases": [
            {
                "version": verdict.version,
                "verdict": _WORDS[verdict.whole],
                "parts": {part: _WORDS[verdict.of_part(part)] for part in verdict.parts},
                "findings": [
                    {"part": f.part, "severity": f.severity, "what": f.what, "where": f.where} for f in verdict.findings
                ],
                "compared_with": verdict.compared_with or None,
                "moved": list(verdict.moved),
            }
            for verdict in verdicts
        ],
    }
