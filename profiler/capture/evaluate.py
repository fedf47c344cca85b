"""A pack against measured steps it was not made of: error by region and by run, intervals, support.

Where a capture holds runs the pack was made of beside others, only the others count in the sum and in the regions.
"""

from __future__ import annotations

import tempfile
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from oracle_server import pack
from oracle_server.sampling.answer import SUPPORT_EXACT, SUPPORT_EXTRAPOLATED, SUPPORT_INTERPOLATED
from oracle_server.sampling.oracle import Oracle
from oracle_server.sampling.shape import StepQuery
from oracle_server.sampling.wake import WakeCurve
from profiler.capture.build import run_digest, run_folder
from profiler.capture.regions import query_of, region_of, region_order
from profiler.capture.steps import CapturedRun, CapturedStep, idle_ns, read_capture

# Answers drawn for each step: the mean is what is expected of it, the middle 90 % its interval.
DRAWS: Final = 64
_INTERVAL: Final = (5.0, 95.0)
# Rank i of n draws stands for the quantile i / (n + 1), so 90 % of further draws lie between the ends. NumPy's linear
# quantiles stand at (i - 1) / (n - 1) and of 64 draws hold 87.5 % (Hyndman and Fan 1996, definitions 6 and 7).
_QUANTILES: Final = "weibull"
SUPPORT_NAMES: Final = {
    SUPPORT_EXACT: "exact",
    SUPPORT_INTERPOLATED: "interpolated",
    SUPPORT_EXTRAPOLATED: "extrapolated",
}


# Column of what is expected in the rows of `_judge`.
_EXPECTED: Final = 1


@dataclass(frozen=True)
class Errors:
    """Of a group of steps. Percent; bias is that of the summed time, coverage the share inside the 90 % interval."""

    group: str
    steps: int
    mape: float
    median: float
    bias: float
    coverage: float
    # Share of steps by support, percent.
    support: Mapping[str, float]


@dataclass(frozen=True)
class Evaluation:
    """`held_out`: for each run, whether the pack was made without it.

    `overall` and `regions` are of the held-out runs; of all runs where none is held out.
    """

    pack: str
    digest: str
    overall: Errors
    runs: tuple[Errors, ...]
    regions: tuple[Errors, ...]
    held_out: Mapping[str, bool]
    notes: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def evaluate(directory: Path, capture: Path, *, skip_steps: int = 0) -> Evaluation:
    """Ask the pack about every step of a capture but its warm-up. Raises PackInvalid and InvalidArgument."""
    with tempfile.TemporaryDirectory() as scratch:
        report, oracle, wake = _opened(directory, Path(scratch))
        runs = read_capture(capture)
        judged = [(run, _judge(oracle, wake, _usable(run, skip_steps))) for run in runs]
    known = " ".join(report.manifest.provenance.values())
    held_out = {run.name: run_digest(run_folder(capture, run), run.name) not in known for run in runs}
    told = [(run, answers) for run, answers in judged if held_out[run.name]] or judged
    everything = np.concatenate([answers for _, answers in told])
    regions: dict[str, list[NDArray[np.float64]]] = defaultdict(list)
    for run, answers in told:
        for step, row in zip(_usable(run, skip_steps), answers, strict=True):
            regions[region_of(query_of(step))].append(row)
    return Evaluation(
        pack=report.manifest.name,
        digest=report.digest,
        overall=_errors(_group(held_out), everything),
        runs=tuple(_errors(run.name, answers) for run, answers in judged),
        regions=tuple(_errors(name, np.array(regions[name])) for name in sorted(regions, key=region_order)),
        held_out=held_out,
        notes=(*_cautions(held_out), *(f"{run.name}: {note}" for run in runs for note in run.notes)),
    )


def expected_ns(directory: Path, stretches: Sequence[Sequence[CapturedStep]]) -> list[NDArray[np.float64]]:
    """What the pack says of each step on average. Steps of a stretch follow each other. Raises PackInvalid."""
    with tempfile.TemporaryDirectory() as scratch:
        _, oracle, wake = _opened(directory, Path(scratch))
        return [_judge(oracle, wake, steps)[:, _EXPECTED] for steps in stretches]


def _opened(directory: Path, scratch: Path) -> tuple[pack.PackReport, Oracle, WakeCurve]:
    compiled = scratch / "compiled"
    report = pack.compile_pack(directory, compiled)
    return report, pack.open_oracle(pack.load_compiled(compiled)), pack.wake_curve(report.manifest.latency)


def interval_of(drawn: NDArray[np.float64]) -> tuple[float, float]:
    """Where 90 % of further draws from the same distribution lie, whatever it is."""
    low, high = np.percentile(drawn, _INTERVAL, method=_QUANTILES)
    return float(low), float(high)


def _group(held_out: Mapping[str, bool]) -> str:
    if all(held_out.values()):
        return "all"
    return "held-out runs" if any(held_out.values()) else "all (in the pack)"


def _cautions(held_out: Mapping[str, bool]) -> list[str]:
    """What the reader of the first rows has to know."""
    trained = [name for name, held in held_out.items() if not held]
    if not trained:
        return []
    if len(trained) == len(held_out):
        return ["no run is held out: the pack was made of these steps, and its errors say nothing about others"]
    verb = "is" if len(trained) == 1 else "are"
    return [f"{', '.join(trained)} {verb} in the pack: left out of the first row and of the regions"]


def draws(oracle: Oracle, query: StepQuery, first: int) -> tuple[NDArray[np.float64], int]:
    """Latencies of one shape in ns, drawn as an engine would draw them, and the support of the answer."""
    answers = [oracle.answer(query, 0, first + number) for number in range(DRAWS)]
    return np.array([answer.latency_ns for answer in answers], dtype=np.float64), answers[0].support


def _usable(run: CapturedRun, skip: int) -> list[CapturedStep]:
    return [step for step in run.steps if not step.warm_up and step.latency_ns > 0][skip:]


def _judge(oracle: Oracle, wake: WakeCurve, steps: Sequence[CapturedStep]) -> NDArray[np.float64]:
    """A row per step: truth, expected, low and high end of the interval, support."""
    rows = np.zeros((len(steps), 5))
    for number, (step, pause) in enumerate(zip(steps, idle_ns(steps), strict=True)):
        drawn, support = draws(oracle, query_of(step), number * DRAWS)
        # What an engine waits for longer as preparation is in the captured device time.
        drawn += wake.extra_ns(pause)
        low, high = interval_of(drawn)
        rows[number] = step.latency_ns, drawn.mean(), low, high, support
    return rows


def _errors(group: str, rows: NDArray[np.float64]) -> Errors:
    if not len(rows):
        return Errors(group, 0, float("nan"), float("nan"), float("nan"), float("nan"), {})
    truth, expected, low, high, support = rows.T
    relative = np.abs(expected / truth - 1)
    return Errors(
        group=group,
        steps=len(rows),
        mape=float(100 * relative.mean()),
        median=float(100 * np.median(relative)),
        bias=float(100 * (expected.sum() / truth.sum() - 1)),
        coverage=float(100 * ((truth >= low) & (truth <= high)).mean()),
        support={name: float(100 * (support == value).mean()) for value, name in SUPPORT_NAMES.items()},
    )


def table_rows(evaluation: Evaluation) -> Iterable[tuple[str, ...]]:
    """Group, steps, mean error, median error, bias of the sum, coverage, support: as text."""
    for errors in (evaluation.overall, *evaluation.runs, *evaluation.regions):
        support = " / ".join(f"{share:.0f}" for share in errors.support.values())
        yield (
            errors.group + ("" if evaluation.held_out.get(errors.group, True) else " (in the pack)"),
            str(errors.steps),
            f"{errors.mape:.2f}",
            f"{errors.median:.2f}",
            f"{errors.bias:+.2f}",
            f"{errors.coverage:.1f}",
            support,
        )
