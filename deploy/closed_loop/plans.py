"""Parts of plans of one length or several on the captured engine, a pack of each, and how much a longer plan buys.

A plan is driven in parts, one for each repeat, half of it before the real engine's runs and half behind them, and the
emulated runs of the repeat are from the pack of that part alone: the speed of a machine that others use too drifts by
more within minutes than a model is wrong, and what drifts evenly is in the two halves as it is in the runs between.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TypeVar

from rich import box
from rich.console import Console
from rich.table import Table

from deploy.closed_loop.comparison import COLUMNS, DELTAS, Comparison
from deploy.closed_loop.machine import Machine
from deploy.demo.progress import DemoFailed, Progress, step_oracle
from oracle_server.errors import InvalidArgument
from profiler.capture.command import summary_lines
from profiler.capture.driver import PlanOptions, PlanResult, drive
from profiler.capture.pause import pause, resume
from profiler.capture.steps import CapturedRun, Overhead, read_capture

KEEP = "ARGS='--keep DIR' keeps every log, the capture and the packs"
# As the command does where it is not told: percent.
_TARGET = 1.0
Result = TypeVar("Result")
# Label of a row and key of LLM-Emu's columns.
_ERRORS = (("TTFT", "ttft"), ("TPOT", "tpot"), ("ITL", "itl"), ("E2E", "e2e"), ("tokens/s", "tps"))


@dataclass(frozen=True)
class PlanPack:
    """The pack of the last part there is of a plan of this length.

    `seconds`: the parts so far took to drive; `steps`: what they hold beside a warm-up.
    """

    minutes: float
    pack: Path
    seconds: float
    steps: int
    # Regions of the plan that the last half of a part knows to its target, measured at all, and that the plan has.
    tight: int
    measured: int
    regions: int
    parts: int = 1

    @property
    def name(self) -> str:
        return f"emulated-{self.minutes:g}m"

    @property
    def told(self) -> str:
        """For people, in one line."""
        return (
            f"plan of {self.minutes:g} minutes in {self.parts} parts, a pack of each: {self.steps} steps; of "
            f"{self.regions} regions the last half of one measured {self.measured}, {self.tight} tight; driven for "
            f"{self.seconds / 60:.1f} minutes"
        )


@dataclass(frozen=True)
class PlanHalf:
    """Half of a part that was driven: of which plan, and where its steps are in the capture."""

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
    """Drives the captured engine through the parts of plans, and builds the pack of each part.

    Otherwise the capture rests. Used by the main thread.
    """

    def __init__(
        self, machine: Machine, base_url: str, run: Path, folder: Path, parts: int, kind: str, progress: Progress
    ) -> None:
        """`run`: the folder the engine is captured into; `parts`: of each plan. Raises DemoFailed."""
        self._machine, self._engine, self._run, self._folder = machine, _DrivenEngine(base_url), run, folder
        self._parts, self._kind, self._progress = parts, kind, progress
        self._halves = 0
        # The run as it was when the last half had been driven.
        self._captured = self._rest()

    def next_half(self, minutes: float, first: PlanHalf | None = None) -> PlanHalf:
        """Half a part more of the plan of this length; the second one goes on where the `first` ended, or the two would
        know half as many regions. Afterwards all of it is in the files.
        """
        begin = time.monotonic()
        self._halves += 1
        options = PlanOptions(
            minutes / self._parts / 2,
            _TARGET,
            is_further_part=self._halves > 1,
            first_visit=first.result.next_visit if first else 0,
        )
        log = (self._folder / f"plan-{self._halves}.log").open("w", encoding="utf-8")

        def driven() -> PlanResult:
            with log, contextlib.redirect_stdout(log), self._machine.beside_the_model():
                return drive(self._engine, self._run, options)

        try:
            result, found = self.captured(driven)
        except InvalidArgument as error:
            raise DemoFailed(f"the plan was not driven: {error.message}", KEEP) from None
        if found.begin == found.end:
            raise DemoFailed(f"{options.minutes:.2g} minutes of a plan gave no step", "give the plan more --minutes")
        half = PlanHalf(minutes, time.monotonic() - begin, result, found)
        self._progress.say(
            f"    {options.minutes:.2g} minutes of the plan of {minutes:g}: {result.tight} of {result.regions} regions "
            f"tight, {result.measured} measured, {half.seconds:.0f} s"
        )
        for line in summary_lines(found.run):
            self._progress.say(f"    {line.strip()}")
        return half

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

    def pack_of(self, halves: Sequence[PlanHalf], before: PlanPack | None) -> PlanPack:
        """The pack of these halves of one part alone, which comes after the pack `before`."""
        minutes, number = halves[0].minutes, before.parts + 1 if before else 1
        pack = self._folder / f"pack-{minutes:g}m-{number}"
        spans = [("--steps", f"{half.slice.begin}:{half.slice.end}") for half in halves]
        command = ("build", str(self._run), "--kind", self._kind, "-o", str(pack))
        built = step_oracle(*command, *(part for span in spans for part in span), next_step=KEEP)
        if number == self._parts:
            print(built, flush=True)
        seconds, steps = (before.seconds, before.steps) if before else (0.0, 0)
        last = halves[-1].result
        return PlanPack(
            minutes,
            pack,
            seconds + sum(half.seconds for half in halves),
            steps + sum(half.slice.end - half.slice.begin for half in halves),
            last.tight,
            last.measured,
            last.regions,
            number,
        )


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
