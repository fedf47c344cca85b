"""The command `step-oracle vllm-check`: releases to verdicts, and how they are printed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import typer

from oracle_server.errors import InvalidArgument
from profiler.vllm_check import verdict
from profiler.vllm_check.drift import Snapshot, moves, snapshot_of
from profiler.vllm_check.finding import Finding
from profiler.vllm_check.fit import findings_of
from profiler.vllm_check.ours import Ours
from profiler.vllm_check.own_source import OwnSource
from profiler.vllm_check.releases import is_version, known_versions, open_release

# Reading a release from an index is waiting, most of the time.
_AT_ONCE = 4


@dataclass(frozen=True)
class Reading:
    """What one release says, without another to compare it with."""

    version: str
    findings: tuple[Finding, ...]
    snapshot: Snapshot


def check(what: Sequence[str], *, every: bool = False) -> list[verdict.Verdict]:
    """Verdicts in the order given: a version beside the release before it, a file or folder beside the one before."""
    if every == bool(what):
        raise InvalidArgument("give versions, wheels or environments, or --all", field="version")
    releases = known_versions() if every else list(what)
    ours = Ours(OwnSource())

    def read(release: str) -> Reading:
        with open_release(release, lambda sentence: typer.echo(sentence, err=True)) as vllm:
            return Reading(vllm.version, tuple(findings_of(vllm, ours)), snapshot_of(vllm, ours))

    before = _before(releases, every=every)
    wanted = list(dict.fromkeys(name for pair in zip(before, releases, strict=True) for name in pair if name))
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        readings = dict(zip(wanted, pool.map(read, wanted), strict=True))
    verdicts = []
    for name, earlier in zip(releases, before, strict=True):
        reading = readings[name]
        moved = moves(readings[earlier].snapshot, reading.snapshot) if earlier else []
        told = readings[earlier].version if earlier else ""
        verdicts.append(verdict.Verdict(reading.version, ours.source.parts, reading.findings, told, tuple(moved)))
    return verdicts


def _before(releases: Sequence[str], *, every: bool) -> list[str]:
    """The release each is compared with; empty where none comes before it."""
    given = ["", *releases[:-1]]
    if every or False in [is_version(release) for release in releases]:
        return given
    known = known_versions()
    return [known[known.index(name) - 1] if known.index(name) else "" for name in _checked(releases, known)]


def _checked(releases: Sequence[str], known: Sequence[str]) -> Sequence[str]:
    for name in releases:
        if name not in known:
            raise InvalidArgument(f"pip's index has no vLLM {name}; it has {', '.join(known)}", field="version")
    return releases


def print_verdicts(verdicts: Sequence[verdict.Verdict], *, as_json: bool, as_markdown: bool) -> bool:
    """Prints them and says whether all fit."""
    if as_json:
        typer.echo(json.dumps(verdict.data(verdicts), indent=2))
    else:
        typer.echo(verdict.markdown(verdicts) if as_markdown else verdict.text(verdicts))
    return all(one.whole != "breaks" for one in verdicts)
