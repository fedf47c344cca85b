"""Parts of plans of one length or several on the captured engine, their packs, and how much a longer plan buys.

The first part of a plan comes before everything, the others between the real engine's runs. A pack is of all parts up
to now, and each run is served at the speed of the two parts beside the real one: the speed of a machine that others use
too drifts by more within minutes than a model is wrong.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from rich import box
from rich.console import Console
from rich.table import Table

from deploy.closed_loop.comparison import COLUMNS, DELTAS, Comparison
from deploy.closed_loop.machine import Machine
from deploy.demo.progress import DemoFailed, Progress, step_oracle
from oracle_server.errors import InvalidArgument
from profiler.capture.command import summary_lines
from profiler.capture.driver import Coverage, PlanOptions, PlanResult, drive, limits_of
from profiler.capture.evaluate import expected_ns
from profiler.capture.pause import pause, resume
from profiler.capture.plan import visits
from profiler.capture.step_times import settled_of
from profiler.capture.steps import CapturedRun, CapturedStep, Overhead, read_capture

KEEP = "ARGS='--keep DIR' keeps every log, the capture and the packs"
# As the command does where it is not told: percent.
_TARGET = 1.0
# Of a plan's minutes, before everything: most regions are known from there.
FIRST_SHARE = 0.4
Result = TypeVar("Result")
# Label of a row and key of LLM-Emu's columns.
_ERRORS = (("TTFT", "ttft"), ("TPOT", "tpot"), ("ITL", "itl"), ("E2E", "e2e"), ("tokens/s", "tps"))


@dataclass(frozen=True)
class PlanPack:
    """The pack of all parts up to now of a plan of this length.

    `speeds`: for each run of the last repeat, how many times as long as usual the steps of the two parts beside it
    took; `seconds`: all parts took to drive; `steps`: what they hold beside a warm-up.
    """

    minutes: float
    pack: Path
    speeds: tuple[float, ...]
    seconds: float
    steps: int
    parts: int
    # Regions of the plan that are known to its target, measured at all, and that it has.
    tight: int
    measured: int
    regions: int
    # What `build` says of it.
    built: str

    @property
    def name(self) -> str:
        return f"emulated-{self.minutes:g}m"

    @property
    def told(self) -> str:
        """For people, in one line."""
        return (
            f"plan of {self.minutes:g} minutes in {self.parts} parts: {self.steps} steps; {self.measured} of "
            f"{self.regions} regions measured, {self.tight} tight; driven for {self.seconds / 60:.1f} minutes"
        )


@dataclass(frozen=True)
class PlanPart:
    """One part that was driven: of which plan, and where its steps are in the capture."""

    minutes: float
    seconds: float
    result: PlanResult
    slice: Slice


@dataclass(frozen=True)
class Slice:
    """What a run that goes on got in one stretch: those steps and their overhead, and their numbers for `build`."""

    run: CapturedRun
    begin: int
    end: int


def slice_of(whole: CapturedRun, before: CapturedRun | None) -> Slice:
    """What was captured since the run was read as `before`; None: since its beginning."""
    earlier = before.steps if before else ()
    steps = whole.steps[len(earlier) :]
    overhead = _since(whole, before) if before and steps else whole.overhead
    begin = sum(not step.warm_up for step in earlier)
    end = begin + sum(not step.warm_up for step in steps)
    return Slice(replace(whole, steps=steps, overhead=overhead), begin, end)


def _since(whole: CapturedRun, before: CapturedRun) -> Overhead:
    """Each figure is a mean over the steps of its run."""
    count, earlier = len(whole.steps), len(before.steps)
    means = {
        field.name: (count * getattr(whole.overhead, field.name) - earlier * getattr(before.overhead, field.name))
        / (count - earlier)
        for field in fields(Overhead)
    }
    return Overhead(**means)


@dataclass(frozen=True)
class _DrivenEngine:
    """Where the plan finds the real engine; the loop gives it no key, so it takes any."""

    base_url: str
    api_key: str = "none"


class Planner:
    """Drives the captured engine through the parts of plans, and builds packs of them.

    Otherwise the capture rests. Used by the main thread.
    """

    def __init__(self, machine: Machine, base_url: str, run: Path, folder: Path, kind: str, progress: Progress) -> None:
        """`run`: the folder the engine is captured into. Raises DemoFailed."""
        self._machine, self._engine, self._run, self._folder = machine, _DrivenEngine(base_url), run, folder
        self._kind, self._progress = kind, progress
        self._drives = self._packs = 0
        # The run as it was when the last part had been driven.
        self._captured = self._rest()

    def next_part(self, minutes: float, share: float, last: PlanPart | None = None) -> PlanPart:
        """This share of the plan of this length, from its beginning or from where the `last` part ended. Afterwards all
        of it is in the files.
        """
        begin = time.monotonic()
        self._drives += 1
        options = PlanOptions(
            minutes * share,
            _TARGET,
            is_further_part=self._drives > 1,
            first_visit=last.result.next_visit if last else 0,
        )
        log = (self._folder / f"plan-{self._drives}.log").open("w", encoding="utf-8")

        def driven() -> PlanResult:
            with log, contextlib.redirect_stdout(log), self._machine.beside_the_model():
                return drive(self._engine, self._run, options)

        try:
            result, found = self.captured(driven)
        except InvalidArgument as error:
            raise DemoFailed(f"the plan was not driven: {error.message}", KEEP) from None
        if found.begin == found.end:
            raise DemoFailed(f"{options.minutes:.2g} minutes of a plan gave no step", "give the plan more --minutes")
        part = PlanPart(minutes, time.monotonic() - begin, result, found)
        self._progress.say(
            f"    part {self._drives}, {60 * options.minutes:.0f} s of the plan of {minutes:g} minutes: "
            f"{found.end - found.begin} steps, {result.measured} of {result.regions} regions, {part.seconds:.0f} s"
        )
        return part

    def summary(self) -> list[str]:
        """What the capture got in all, and what it cost."""
        return summary_lines(self._captured)

    def captured(self, work: Callable[[], Result]) -> tuple[Result, Slice]:
        """What the work returns, and what the engine's capture got meanwhile. Raises as it does, and DemoFailed."""
        self._resume()
        result = work()
        whole = self._rest()
        found, self._captured = slice_of(whole, self._captured), whole
        return result, found

    def _resume(self) -> None:
        try:
            resume(self._run)
        except InvalidArgument as error:
            raise DemoFailed(f"the capture does not go on: {error.message}", KEEP) from None

    def _rest(self) -> CapturedRun:
        """Nothing is captured any more; all there is."""
        try:
            pause(self._run)
            runs = read_capture(self._run)
        except InvalidArgument as error:
            raise DemoFailed(f"the capture does not rest: {error.message}", KEEP) from None
        if len(runs) > 1:
            raise DemoFailed(f"the engine has {len(runs)} data-parallel ranks", "the loop compares engines of one")
        return runs[0]

    def pack_of(self, parts: Sequence[PlanPart], *, runs: int) -> PlanPack:
        """The pack of these parts of one plan. The last of them, one before the `runs` of a repeat and one after each,
        tell at which speeds it is served. Raises DemoFailed.
        """
        minutes, self._packs = parts[0].minutes, self._packs + 1
        pack = self._folder / f"pack-{minutes:g}m-{self._packs}"
        spans = [("--steps", f"{part.slice.begin}:{part.slice.end}") for part in parts]
        command = ("build", str(self._run), "--kind", self._kind, "-o", str(pack))
        built = step_oracle(*command, *(argument for span in spans for argument in span), next_step=KEEP)
        limits = limits_of(parts[0].slice.run.engine["engine"])
        coverage = Coverage(visits(limits))
        for part in parts:
            coverage.take(part.slice.run.steps)
        found = PlanPack(
            minutes,
            pack,
            speeds_of(_ratios(pack, [part.slice.run.steps for part in parts]), runs),
            sum(part.seconds for part in parts),
            sum(part.slice.end - part.slice.begin for part in parts),
            len(parts),
            coverage.tight(_TARGET),
            coverage.measured(),
            len(coverage.plan),
            built,
        )
        times = ", ".join(f"{speed:.3f}" for speed in found.speeds)
        self._progress.say(f"    {found.told}; beside this repeat's runs, steps took {times} times as long as usual")
        return found


def _ratios(pack: Path, stretches: Sequence[Sequence[CapturedStep]]) -> list[NDArray[np.float64]]:
    """Of each stretch, how many times as long as this pack says its steps took: of those that a pack is fitted to."""
    found = []
    for steps, expected in zip(stretches, expected_ns(pack, stretches), strict=True):
        latency_ns = np.array([step.latency_ns for step in steps], dtype=np.float64)
        fitted = np.array([not step.warm_up for step in steps]) & np.array(settled_of(steps)) & (latency_ns > 0)
        found.append(latency_ns[fitted] / expected[fitted])
    return found


def speeds_of(ratios: Sequence[NDArray[np.float64]], runs: int) -> tuple[float, ...]:
    """Of each of the last `runs`, how many times as long as usual steps took in the two parts beside it.

    `ratios`: of each part, how many times as long as the pack says its steps took; usual is the median of all, and the
    last parts are the one before those runs and the one after each. Medians, as a stall says nothing of the speed.
    """
    usual = np.median(np.concatenate(ratios))
    beside = pairwise(ratios[-runs - 1 :])
    return tuple(float(np.median(np.concatenate(pair)) / usual) for pair in beside)


def print_errors_by_plan(packs: Sequence[PlanPack], comparisons: Sequence[Comparison]) -> None:
    """A row per length of plan: errors of the means over all workloads, their size on average and the largest."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    for head in ("plan, min", "steps", "tight", "measured"):
        table.add_column(head, justify="right")
    for label, _ in _ERRORS:
        table.add_column(f"{label}\nmean %", justify="right")
        table.add_column("\nlargest %", justify="right")
    for plan in packs:
        own = [each for each in comparisons if each.plan_minutes == plan.minutes]
        row = [f"{plan.minutes:g}", str(plan.steps), f"{plan.tight}/{plan.regions}", f"{plan.measured}/{plan.regions}"]
        for _, key in _ERRORS:
            mean, largest = mean_and_largest_error(own, key)
            row += [f"{mean:.2f}", f"{largest:+.2f}"]
        table.add_row(*row)
    table.add_row("real", "", "", "", *(cell for _, key in _ERRORS for cell in _noise(own, key)))
    print("\nerrors of the means by length of plan: mean size over the workloads, and the largest; real: its spread")
    Console(width=COLUMNS, markup=False, highlight=False).print(table)


def mean_and_largest_error(comparisons: Sequence[Comparison], metric: str) -> tuple[float, float]:
    """Of one metric's mean over the workloads, in percent: mean of the sizes, and the largest with its sign."""
    errors = [comparison.figure(_column(metric)).error_percent for comparison in comparisons]
    return sum(map(abs, errors)) / len(errors), max(errors, key=abs)


def _noise(comparisons: Sequence[Comparison], metric: str) -> tuple[str, str]:
    noises = [comparison.figure(_column(metric)).noise_percent for comparison in comparisons]
    return f"{sum(noises) / len(noises):.2f}", f"{max(noises):.2f}"


def _column(metric: str) -> str:
    return next(key for column, key in DELTAS.items() if column.startswith(metric))
