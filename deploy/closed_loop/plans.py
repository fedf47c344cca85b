"""Parts of plans of one length or several on the captured engine, a pack of each, and how much a longer plan buys.

A plan is driven in parts, one before each repeat of the runs, and a repeat is served from the pack of its part alone:
the speed of a machine that others use too drifts by more within minutes than a model is wrong.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

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
    # Regions of the plan that the last part knows to its target, that it measured at all, and that the plan has.
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
            f"{self.regions} regions the last part measured {self.measured}, {self.tight} tight; driven for "
            f"{self.seconds / 60:.1f} minutes"
        )


@dataclass(frozen=True)
class PlanPart:
    """A part that was driven: which, and where its steps are in the capture."""

    minutes: float
    number: int
    seconds: float
    result: PlanResult
    slice: PartSlice


@dataclass(frozen=True)
class PartSlice:
    """A part of a run that goes on: its own steps and overhead, and what `build` is told to take it alone."""

    run: CapturedRun
    skip_steps: int
    most_steps: int


def slice_of(whole: CapturedRun, before: CapturedRun | None) -> PartSlice:
    """What was captured since the run was read as `before`; None: since its beginning."""
    earlier = before.steps if before else ()
    steps = whole.steps[len(earlier) :]
    overhead = _since(whole, before) if before and steps else whole.overhead
    return PartSlice(
        replace(whole, steps=steps, overhead=overhead),
        skip_steps=sum(not step.warm_up for step in earlier),
        most_steps=sum(not step.warm_up for step in steps),
    )


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
    """Drives the captured engine through the next part of a plan, and builds the pack of that part.

    Between parts the capture rests. Used by the main thread.
    """

    def __init__(
        self, machine: Machine, base_url: str, run: Path, folder: Path, parts: int, kind: str, progress: Progress
    ) -> None:
        """`run`: the folder the engine is captured into; `parts`: of each plan."""
        self._machine, self._engine, self._run, self._folder = machine, _DrivenEngine(base_url), run, folder
        self._parts, self._kind, self._progress = parts, kind, progress
        # The run as it was when the last part had been driven.
        self._captured: CapturedRun | None = None

    def next_part(self, minutes: float, before: PlanPack | None) -> PlanPart:
        """One part more of the plan of this length; None: it is the first. Afterwards all of it is in the files."""
        number, begin = before.parts + 1 if before else 1, time.monotonic()
        options = PlanOptions(minutes / self._parts, _TARGET, is_further_part=self._captured is not None)
        log = (self._folder / f"plan-{minutes:g}m-{number}.log").open("w", encoding="utf-8")
        try:
            resume(self._run)
            with log, contextlib.redirect_stdout(log), self._machine.beside_the_model():
                result = drive(self._engine, self._run, options)
            pause(self._run)
            runs = read_capture(self._run)
        except InvalidArgument as error:
            raise DemoFailed(f"the plan was not driven: {error.message}", KEEP) from None
        if len(runs) > 1:
            raise DemoFailed(f"the engine has {len(runs)} data-parallel ranks", "the loop compares engines of one")
        part = slice_of(runs[0], self._captured)
        if not part.most_steps:
            raise DemoFailed(f"the part of {options.minutes:.2g} minutes holds no step", "give the plan more --minutes")
        self._captured = runs[0]
        seconds = time.monotonic() - begin
        self._tell(minutes, number, seconds, result, part)
        return PlanPart(minutes, number, seconds, result, part)

    def pack_of(self, part: PlanPart, before: PlanPack | None) -> PlanPack:
        """The pack of this part alone, which is the one after the pack `before`."""
        pack = self._folder / f"pack-{part.minutes:g}m-{part.number}"
        steps = ("--skip-steps", str(part.slice.skip_steps), "--most-steps", str(part.slice.most_steps))
        built = step_oracle(*("build", str(self._run), "--kind", self._kind, "-o", str(pack)), *steps, next_step=KEEP)
        if part.number == self._parts:
            print(built, flush=True)
        seconds, count = (before.seconds, before.steps) if before else (0.0, 0)
        return PlanPack(
            part.minutes,
            pack,
            seconds + part.seconds,
            count + part.slice.most_steps,
            part.result.tight,
            part.result.measured,
            part.result.regions,
            part.number,
        )

    def _tell(self, minutes: float, number: int, seconds: float, result: PlanResult, part: PartSlice) -> None:
        self._progress.say(
            f"    part {number} of the plan of {minutes:g} minutes: {result.tight} of {result.regions} regions tight, "
            f"{result.measured} measured, {seconds:.0f} s"
        )
        for line in summary_lines(part.run):
            self._progress.say(f"    {line.strip()}")


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
