"""Captures of plans of one length or several, a pack of each, and how much a longer plan buys.

A plan is driven in parts, one before each repeat of the runs, and a pack is made of all parts so far: the speed of a
machine that others use too drifts by more within minutes than a model is wrong.
"""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from deploy.closed_loop.comparison import COLUMNS, DELTAS, Comparison
from deploy.closed_loop.machine import Machine
from deploy.demo.progress import DemoFailed, Progress, step_oracle, tail
from engine_process import engine_variables, free_port
from profiler.capture.launch import runs_of

KEEP = "ARGS='--keep DIR' keeps every log, the captures and the packs"
# Label of a row and key of LLM-Emu's columns.
_ERRORS = (("TTFT", "ttft"), ("TPOT", "tpot"), ("ITL", "itl"), ("E2E", "e2e"), ("tokens/s", "tps"))


@dataclass(frozen=True)
class PlanPack:
    """A pack of the parts so far of a plan of this length.

    `seconds`: of all captures, from the engine's start to its end; `steps`: what they hold.
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
            f"plan of {self.minutes:g} minutes in {self.parts} parts: {self.steps} steps; of {self.regions} regions "
            f"{self.tight} tight in the last part, {self.measured} measured; {self.seconds / 60:.1f} minutes with the "
            "engine's starts and ends"
        )


@dataclass(frozen=True)
class Planner:
    """Captures the next part of a plan, and builds the pack of all parts there are."""

    machine: Machine
    model: Path
    site: Path
    folder: Path
    parts: int
    kind: str
    progress: Progress
    # Further arguments of the engine that is captured.
    serve_arguments: Sequence[str] = ()

    def next_pack(self, minutes: float, before: PlanPack | None) -> PlanPack:
        """The pack of one part more than the one before; None: there is none yet."""
        name, part, begin = f"{minutes:g}m", before.parts + 1 if before else 1, time.monotonic()
        capture, pack = self.folder / f"capture-{name}", self.folder / f"pack-{name}-{part}"
        said = self._capture(self.folder / f"capture-{name}-{part}", minutes / self.parts)
        seconds = time.monotonic() - begin
        capture.mkdir(exist_ok=True)
        # Each part is a folder of its own, so that it visits what the parts before it have visited too.
        for run in runs_of(self.folder / f"capture-{name}-{part}"):
            (capture / f"run-{part:03d}").symlink_to(run)
        built = step_oracle("build", str(capture), "--kind", self.kind, "-o", str(pack), next_step=KEEP)
        if part == self.parts:
            print(built, flush=True)
        tight, regions, measured, steps = _counts(said)
        earlier = (before.seconds, before.steps) if before else (0.0, 0)
        return PlanPack(minutes, pack, earlier[0] + seconds, earlier[1] + steps, tight, measured, regions, part)

    def _capture(self, folder: Path, minutes: float) -> list[str]:
        """Run the command as a user does; what it said about its plan and its run."""
        python = str(self.machine.vllm.python)
        serve = [python, "-m", "vllm.entrypoints.cli.main", "serve", str(self.model), "--load-format", "dummy"]
        serve += ["--host", "127.0.0.1", "--port", str(free_port()), *self.machine.serve, *self.serve_arguments]
        command = [python, "-m", "profiler.cli", "capture", "-o", str(folder), "--plan"]
        log_path = folder.with_suffix(".log")
        with log_path.open("wb") as log:
            capture = subprocess.Popen(
                [*command, "--minutes", f"{minutes:g}", "--", *serve],
                env={**engine_variables(self.site, None), **self.machine.real_variables},
                cwd=folder.parent,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        try:
            while capture.poll() is None:
                if "step-oracle: plan:" in log_path.read_text(encoding="utf-8", errors="replace"):
                    self.machine.settle(capture.pid)
                    break
                time.sleep(0.2)
            capture.wait()
        finally:
            # The first SIGTERM ends the engine, then the capture.
            capture.terminate()
            capture.wait()
        if capture.returncode:
            raise DemoFailed(f"the capture ended with {capture.returncode}:\n{tail(log_path)}", KEEP)
        lines = log_path.read_text(encoding="utf-8", errors="replace").splitlines()
        told = [line for line in lines if line.startswith(("run-", "  capture took", "  note", "step-oracle: plan:"))]
        for line in told:
            self.progress.say(f"    {line.strip()}")
        return told


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


def _counts(told: Sequence[str]) -> tuple[int, int, int, int]:
    """(tight, regions, measured, steps) as the capture says them."""
    text = "\n".join(told)
    plan = re.search(r"(\d+) of (\d+) regions tight, (\d+) measured", text)
    steps = re.search(r"(?m)^run-\d+: (\d+) steps", text)
    if plan is None or steps is None:
        raise DemoFailed(f"the capture does not say what it measured:\n{text}", KEEP)
    return int(plan[1]), int(plan[2]), int(plan[3]), int(steps[1])
