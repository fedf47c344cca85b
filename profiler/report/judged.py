"""A pack beside measured steps: what it expects of each, what it would have drawn, and how well it is backed."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from oracle_server.errors import InvalidArgument
from oracle_server.pack import CompiledPack, open_oracle, wake_curve
from oracle_server.sampling.answer import SUPPORT_EXACT, SUPPORT_EXTRAPOLATED, SUPPORT_INTERPOLATED
from oracle_server.sampling.shape import StepQuery
from profiler.capture.regions import query_of, region_of, region_order

# Of a longer file evenly spread steps are judged: 32 draws of 3,000 steps take some seconds.
MOST_STEPS: Final = 3000
DRAWS: Final = 32
SUPPORT_NAMES: Final = {
    SUPPORT_EXACT: "exact",
    SUPPORT_INTERPOLATED: "interpolated",
    SUPPORT_EXTRAPOLATED: "extrapolated",
}


@dataclass(frozen=True)
class JudgedSteps:
    """One row per step. `expected_ns` is the mean of the draws, `drawn` their ratio to it, [steps, DRAWS].

    `is_made_of`: the pack names these very steps among those it was made of. `left_out`: runs of a capture that it
    names, left out because others are held out.
    """

    name: str
    is_made_of: bool
    left_out: tuple[str, ...]
    steps_in_file: int
    queries: tuple[StepQuery, ...]
    regions: tuple[str, ...]
    truth_ns: NDArray[np.float64]
    expected_ns: NDArray[np.float64]
    drawn: NDArray[np.float64]
    support: NDArray[np.int64]

    @property
    def error_percent(self) -> NDArray[np.float64]:
        """Signed, of the expected latency."""
        return 100 * (self.expected_ns / self.truth_ns - 1)

    @property
    def mixed(self) -> NDArray[np.bool_]:
        """Steps with prefill work."""
        return np.array([bool(query.chunk_tokens) for query in self.queries], dtype=bool)


@dataclass(frozen=True)
class RegionError:
    """Of one region, percent: mean absolute error, bias of the summed time, and the middle 90 % of errors."""

    region: str
    steps: int
    mape: float
    bias: float
    low: float
    high: float
    extrapolated: float


def judge(compiled: CompiledPack, path: Path) -> JudgedSteps:
    """Asks the pack about the steps of a table, a step trace or a capture's folder."""
    found = _read(path, " ".join(compiled.manifest.provenance.values()))
    queries, latency = found.queries, found.latency_ns
    if not queries:
        raise InvalidArgument(f"{path} holds no step with a latency", field="on")
    chosen = np.unique(np.linspace(0, len(queries) - 1, min(len(queries), MOST_STEPS)).round().astype(int))
    oracle = open_oracle(compiled)
    answers = [
        [oracle.answer(queries[number], 0, position * DRAWS + draw) for draw in range(DRAWS)]
        for position, number in enumerate(chosen)
    ]
    wake = wake_curve(compiled.manifest.latency)
    drawn = np.array([[answer.latency_ns for answer in row] for row in answers], dtype=np.float64)
    drawn += np.array([[wake.extra_ns(found.idle_ns[number])] for number in chosen])
    expected = drawn.mean(axis=1)
    judged = tuple(queries[number] for number in chosen)
    return JudgedSteps(
        name=path.name,
        is_made_of=found.is_made_of,
        left_out=found.left_out,
        steps_in_file=len(queries),
        queries=judged,
        regions=tuple(region_of(query) for query in judged),
        truth_ns=latency[chosen].astype(np.float64),
        expected_ns=expected,
        drawn=drawn / expected[:, None],
        support=np.array([row[0].support for row in answers], dtype=np.int64),
    )


def region_errors(judged: JudgedSteps) -> list[RegionError]:
    """All steps first, then region by region."""
    rows: dict[str, list[int]] = defaultdict(list)
    for number, region in enumerate(judged.regions):
        rows[region].append(number)
    everything = list(range(len(judged.queries)))
    groups = [("all steps", everything), *((name, rows[name]) for name in sorted(rows, key=region_order))]
    return [_error(judged, name, np.array(group)) for name, group in groups]


def _error(judged: JudgedSteps, name: str, group: NDArray[np.int64]) -> RegionError:
    errors, truth, expected = judged.error_percent[group], judged.truth_ns[group], judged.expected_ns[group]
    low, high = np.percentile(errors, (5, 95))
    return RegionError(
        name,
        len(group),
        mape=float(np.abs(errors).mean()),
        bias=float(100 * (expected.sum() / truth.sum() - 1)),
        low=float(low),
        high=float(high),
        extrapolated=float(100 * (judged.support[group] == SUPPORT_EXTRAPOLATED).mean()),
    )


class _Found(NamedTuple):
    queries: Sequence[StepQuery]
    latency_ns: NDArray[np.int64]
    # How long the device had rested before each step, as far as it counts in its latency.
    idle_ns: Sequence[int]
    is_made_of: bool
    left_out: tuple[str, ...]


def _read(path: Path, known: str) -> _Found:
    """Steps of the file, or of a capture's held-out runs where it has any; `known`: digests the pack names."""
    if path.is_dir():
        from profiler.capture.build import run_digest, run_folder
        from profiler.capture.steps import idle_ns, read_capture

        runs = read_capture(path)
        held_out = [run for run in runs if run_digest(run_folder(path, run), run.name) not in known]
        rested = [
            (step, pause)
            for run in held_out or runs
            for step, pause in zip(run.steps, idle_ns(run.steps), strict=True)
            if not step.warm_up and step.latency_ns > 0
        ]
        left_out = tuple(run.name for run in runs if held_out and run not in held_out)
        latency = np.array([step.latency_ns for step, _ in rested], dtype=np.int64)
        pauses = [pause for _, pause in rested]
        return _Found([query_of(step) for step, _ in rested], latency, pauses, not held_out, left_out)
    from profiler.hybrid_samples import read_samples

    samples = read_samples(path).steps
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return _Found(list(samples.queries), samples.latency_ns, [0] * len(samples), digest in known, ())
