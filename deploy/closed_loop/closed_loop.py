"""What `make closed-loop` runs: a real vLLM on this machine's CPU, captured, rebuilt as a pack, and set beside itself.

Or one on a GPU: --vllm names its environment.

The process that is captured is the one that serves as the real engine: two processes of one engine differ in speed.
The first part of the plan is driven on it; then each repeat lets it serve the workloads, with a part of the plan
before, between and after them: some of the regions that every repeat measures, some of new ones. It builds a pack of
all parts, and lets the emulated engine serve the same workloads, each at the speed of the parts beside the real run.
While the real engine serves, the capture rests; engines that do not serve are stopped, and on a CPU one core belongs to
the model alone. With several lengths of plan there are parts and a pack of each, activated in turn on the one emulated
engine, and all are set beside the same runs of the real one.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from deploy.closed_loop.comparison import (
    Comparison,
    as_json,
    compare,
    print_comparisons,
    verdict,
    write_deltas,
)
from deploy.closed_loop.explain import Explanation, captured_periods, explain, print_explanations, traced_periods
from deploy.closed_loop.machine import Machine, cpu_machine, device_machine, model_of, small_model
from deploy.closed_loop.options import Options, read_options
from deploy.closed_loop.plans import FIRST_SHARE, KEEP, Planner, PlanPack, PlanPart, print_errors_by_plan
from deploy.closed_loop.steady import (
    STEADY_MODEL,
    STEADY_WORKER,
    install_steady_device,
    overruns,
    steady_variables,
)
from deploy.closed_loop.stolen import Undisturbed
from deploy.closed_loop.workloads import BenchClient, Workload, seconds_of
from deploy.demo.interrupt import Interrupt
from deploy.demo.progress import DemoFailed, Progress, step_oracle, tail
from engine_process import EngineFailed, EngineProcess
from environments import shim_site
from oracle_process import OracleProcess
from oracle_server.rpc.recompute import read_trace
from profiler.capture.evaluate import expected_ns
from profiler.capture.launch import capture_command
from profiler.capture.steps import CapturedStep
from step_oracle.v1.trace_pb2 import TraceStep

SEED = 20260921
REAL = "real"
_TRACE = "emulated-steps-"


def main() -> int:
    """0: done; 1: something failed, or with --check an error is beyond its bound; 130: interrupted."""
    options = read_options()
    progress = Progress()
    Interrupt()
    try:
        with _working_folder(options.keep) as folder:
            loop = _run(options, folder, progress)
            packs, comparisons = loop.packs, loop.comparisons()
            for plan in packs:
                print(f"\n{plan.built}\n{plan.told}:")
                print_comparisons([each for each in comparisons if each.plan_minutes == plan.minutes])
                if options.explain:
                    print_explanations(
                        [(each.name, loop.explanations[each.name, plan.name]) for each in loop.workloads]
                    )
            if len(packs) > 1:
                print_errors_by_plan(packs, comparisons)
            _write(options, loop, comparisons)
    except DemoFailed as failure:
        print(f"\nerror: {failure}\nnext:  {failure.next_step}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted: everything it started has ended", file=sys.stderr)
        return 130
    longest = [each for each in comparisons if each.plan_minutes == max(options.minutes)]
    of = f" with the plan of {max(options.minutes):g} minutes" if len(options.minutes) > 1 else ""
    for line in verdict(longest, of):
        print(line)
    print(f"it took {progress.seconds / 60:.1f} minutes in all")
    is_beyond = any(not figure.is_within for each in longest for figure in each.figures)
    return 1 if is_beyond and options.check else 0


def _run(options: Options, folder: Path, progress: Progress) -> _Loop:
    """One loop from nothing to the last run; whatever it starts has ended when it returns or raises."""
    machine, model = _machine(options, folder, progress)
    site = shim_site(folder / "site")
    worker: Sequence[str] = ()
    variables = dict(machine.real_variables)
    if options.steady:
        install_steady_device(site)
        worker = ("--worker-cls", STEADY_WORKER)
        variables |= steady_variables(options.steady)
    progress.say("2/4 the oracle server, and the real engine, which is captured")
    with contextlib.ExitStack() as running:
        with machine.beside_the_model():
            server = running.enter_context(OracleProcess(folder / "state"))
        captured = capture_command(("vllm", *machine.serve, *worker), folder / "capture", variables)
        real = running.enter_context(
            _engine(machine, model, site, folder / "real.log", captured.arguments[1:], captured.environment)
        )
        _wait_ready(real, "real", machine)
        progress.say("3/4 how much the full real engine serves")
        planner = Planner(machine, real.base_url, captured.run, folder, options.kind, progress)
        with machine.beside_the_model():
            client = running.enter_context(BenchClient(machine.vllm, site, model, folder / "client.log"))
            capacity = client.capacity(
                real.base_url, users=machine.users, folder=folder / "runs" / "capacity", seed=SEED
            )
        workloads = [workload.on(capacity) for workload in options.workloads]
        runs = options.repeats * len(workloads) * (1 + len(options.minutes))
        seconds = seconds_of(workloads, options.seconds)
        told = " and ".join(f"{minutes:g}" for minutes in options.minutes)
        progress.say(
            f"4/4 {runs} runs of about {options.seconds:g} s, the real engine and the emulated one in turn, beside a "
            f"plan of {told} minutes; the full real engine serves {capacity:.2f} requests/s"
        )
        loop = _Loop(
            options,
            workloads,
            seconds,
            machine,
            model,
            site,
            folder,
            progress,
            planner,
            client,
            real,
            server.target,
            running,
            Undisturbed(progress.say),
        )
        loop.measure()
        for line in (*planner.summary(), loop.undisturbed.told()):
            progress.say(line.strip())
    if options.steady:
        progress.say(f"the steady device of the real engine: {overruns(folder / 'real.log')}")
    return loop


@dataclass
class _Loop:
    """The real engine, which is ready, and what the runs need."""

    options: Options
    workloads: Sequence[Workload]
    # Of a run of each.
    seconds: Sequence[float]
    machine: Machine
    model: Path
    site: Path
    folder: Path
    progress: Progress
    planner: Planner
    client: BenchClient
    real: EngineProcess
    target: str
    # Ends what is started.
    running: contextlib.ExitStack
    undisturbed: Undisturbed
    # Started once there is a pack.
    emulated: EngineProcess | None = None
    # Of the last repeat, one for each length of plan.
    packs: list[PlanPack] = field(default_factory=list)
    # What was driven of each, and the last part of what goes on from repeat to repeat.
    parts: dict[float, list[PlanPart]] = field(default_factory=lambda: defaultdict(list))
    farthest: dict[float, PlanPart] = field(default_factory=dict)
    # By workload and side, of each repeat.
    results: dict[tuple[str, str], list[dict[str, Any]]] = field(default_factory=lambda: defaultdict(list))
    explanations: dict[tuple[str, str], list[Explanation]] = field(default_factory=lambda: defaultdict(list))

    def measure(self) -> None:
        """All runs."""
        with _stopped(self.emulated):
            for minutes in self.options.minutes:
                self.parts[minutes].append(self.planner.next_part(minutes, FIRST_SHARE))
        self.farthest = {minutes: parts[0] for minutes, parts in self.parts.items()}
        for repeat in range(self.options.repeats):
            with _stopped(self.emulated):
                steps = self._real_runs(repeat)
            self.packs = self._packs()
            with _stopped(self.real):
                for number, workload in enumerate(self.workloads):
                    # Which is first takes turns.
                    first = (repeat + number) % len(self.packs)
                    for plan in (*self.packs[first:], *self.packs[:first]):
                        self._emulated_run(workload, repeat, plan, steps[number])

    def _real_runs(self, repeat: int) -> list[tuple[CapturedStep, ...]]:
        """All workloads, with a part of each plan before the first and after each; the steps of each run.

        Every other part is of the same regions in every repeat; those between get farther.
        """
        steps: list[tuple[CapturedStep, ...]] = []
        for place in range(len(self.workloads) + 1):
            if place:
                steps.append(self._real_run(self.workloads[place - 1], repeat))
            for minutes in self.options.minutes:
                if place % 2:
                    self.farthest[minutes] = self._next_part(minutes, self.farthest[minutes])
                else:
                    self._next_part(minutes, self.parts[minutes][-2] if place else None)
        return steps

    def _next_part(self, minutes: float, last: PlanPart | None) -> PlanPart:
        """Drive the next part of this plan, from its beginning or from where the `last` one ended."""
        share = (1 - FIRST_SHARE) / (self.options.repeats * (len(self.workloads) + 1))
        part = self.planner.next_part(minutes, share, last)
        self.parts[minutes].append(part)
        return part

    def comparisons(self) -> list[Comparison]:
        """Of each workload for each length of plan."""
        return [
            compare(workload, self.results[workload.name, REAL], self.results[workload.name, plan.name], plan.minutes)
            for plan in self.packs
            for workload in self.workloads
        ]

    def _real_run(self, workload: Workload, repeat: int) -> tuple[CapturedStep, ...]:
        """One run, and its steps where errors are explained."""

        def run(number: int) -> tuple[dict[str, Any], tuple[CapturedStep, ...]]:
            if not self.options.explain:
                return self._result(workload, repeat, None, number), ()
            result, found = self.planner.captured(lambda: self._result(workload, repeat, None, number))
            return result, found.run.steps

        result, steps = self.undisturbed.run(f"{workload.name}, repeat {repeat + 1}, {REAL}", run)
        self.results[workload.name, REAL].append(result)
        return steps

    def _emulated_run(self, workload: Workload, repeat: int, plan: PlanPack, steps: Sequence[CapturedStep]) -> None:
        """One run; with the real one's `steps`, where they are asked for, its explanation."""

        def run(number: int) -> tuple[int, dict[str, Any]]:
            return time.monotonic_ns(), self._result(workload, repeat, plan, number)

        begin_ns, result = self.undisturbed.run(f"{workload.name}, repeat {repeat + 1}, {plan.name}", run)
        self.results[workload.name, plan.name].append(result)
        if self.options.explain:
            real, counted = captured_periods(steps)
            emulated = traced_periods(self._traced_since(begin_ns))
            (expected,) = expected_ns(plan.pack, [steps])
            explanation = explain(real, plan.speeds[self.workloads.index(workload)] * expected[counted], emulated)
            self.explanations[workload.name, plan.name].append(explanation)

    def _traced_since(self, begin_ns: int) -> list[TraceStep]:
        """Steps of the emulated engine from this time of CLOCK_MONOTONIC on."""
        (path,) = self.folder.glob(f"{_TRACE}*")
        return [record.step for record in read_trace(path) if record.step.dispatch_ns >= begin_ns]

    def _packs(self) -> list[PlanPack]:
        """Of all parts of each plan its pack, uploaded; the emulated engine is ready."""
        with _stopped(self.real, self.emulated):
            found = [
                self.planner.pack_of(self.parts[minutes], runs=len(self.workloads)) for minutes in self.options.minutes
            ]
        at = ("--target", self.target)
        for plan in found:
            step_oracle("pack", "upload", str(plan.pack), *at, next_step=KEEP)
        if self.emulated is not None:
            return found
        create = ("experiment", "create", "default", "--pack", str(found[0].pack), "--seed", "1", *at)
        step_oracle(*create, next_step=KEEP)
        arguments = (*self.machine.serve, *self.machine.emulated_serve)
        # The real engine's core process spins and gives way while its device computes, so this one does too.
        variables = {"STEP_ORACLE_ENGINE_ID": "emulated", "STEP_ORACLE_WAIT": "yield"}
        if self.options.explain:
            variables["STEP_ORACLE_TRACE"] = str(self.folder / _TRACE)
        log_path = self.folder / "emulated.log"
        with _stopped(self.real):
            self.emulated = self.running.enter_context(
                _engine(self.machine, self.model, self.site, log_path, arguments, variables, self.target)
            )
            _wait_ready(self.emulated, "emulated", self.machine)
        return found

    def _activate(self, plan: PlanPack, speed: float) -> None:
        served = ("--pack", str(plan.pack), "--time-scale", f"{speed:.4f}")
        step_oracle("experiment", "activate", "default", *served, "--target", self.target, next_step=KEEP)

    def _result(self, workload: Workload, repeat: int, plan: PlanPack | None, number: int) -> dict[str, Any]:
        """One try of a run on the engine emulated from this pack, or on the real one; the other is stopped."""
        engine = self.real if plan is None else self.emulated
        assert engine is not None  # noqa: S101  there is one as soon as there is a pack
        side, place = plan.name if plan else REAL, self.workloads.index(workload)
        if plan is not None:
            self._activate(plan, plan.speeds[place])
        folder = self.folder / "runs" / f"{place}-{repeat}-{side}-{number}"
        # The same requests every time.
        result = self.client.run(
            workload, engine.base_url, folder=folder, seconds=self.seconds[place], seed=SEED + place
        )
        self.progress.say(
            f"    {workload.name}, repeat {repeat + 1}, {side}: TPOT {result['mean_tpot_ms']:.2f} ms, "
            f"E2E {result['mean_e2el_ms']:.0f} ms"
        )
        return result


@contextlib.contextmanager
def _stopped(*engines: EngineProcess | None) -> Iterator[None]:
    """Engines that take no core meanwhile, a worker that spins while it waits included; None: not started yet."""
    started = [engine.pid for engine in engines if engine is not None]
    for pid in started:
        os.killpg(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in started:
            os.killpg(pid, signal.SIGCONT)


def _machine(options: Options, folder: Path, progress: Progress) -> tuple[Machine, Path]:
    """What the engines run on, and their model."""
    if options.vllm is not None:
        progress.say(f"1/4 the vLLM in {options.vllm} and the model {options.model} with random weights")
        return device_machine(options.vllm, options.serve), model_of(folder / "model", options.model)
    progress.say("1/4 vLLM for the CPU (the first time: minutes, 3 GB) and a small model with random weights")
    return cpu_machine(), small_model(folder / "tiny", **(STEADY_MODEL if options.steady else {}))


def _engine(
    machine: Machine,
    model: Path,
    site: Path,
    log_path: Path,
    arguments: Sequence[str],
    variables: Mapping[str, str],
    target: str | None = None,
) -> EngineProcess:
    return EngineProcess(
        machine.vllm,
        model,
        target=target,
        site=site,
        log_path=log_path,
        extra_args=arguments,
        extra_env=variables,
        # The client's and the plan's: Linux shares a core between sessions first, and an engine core that spins beside
        # a client of another session gets less of it (README.md).
        own_session=False,
    )


def _wait_ready(engine: EngineProcess, name: str, machine: Machine) -> None:
    try:
        engine.wait_ready()
    except EngineFailed:
        raise DemoFailed(f"the {name} engine is not ready:\n{tail(engine.log_path)}", KEEP) from None
    machine.settle(engine.pid)


def _write(options: Options, loop: _Loop, comparisons: Sequence[Comparison]) -> None:
    if options.csv is not None:
        write_deltas(options.csv, comparisons)
        print(f"• errors of the means as LLM-Emu tells them: {options.csv}")
    if options.json is not None:
        device = None if options.vllm is None else {"model": options.model, "serve": list(options.serve)}
        described = {"schema": "step_oracle.closed_loop/1", "steady_ms": options.steady, "device": device}
        explained = [
            {"workload": workload, "side": side, "repeats": [asdict(repeat) for repeat in repeats]}
            for (workload, side), repeats in loop.explanations.items()
        ]
        document = {**described, "comparisons": as_json(comparisons), "explanations": explained}
        options.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        print(f"• every run: {options.json}")


@contextlib.contextmanager
def _working_folder(keep: Path | None) -> Iterator[Path]:
    if keep is not None:
        keep.mkdir(parents=True)
        yield keep.absolute()
        return
    with tempfile.TemporaryDirectory(prefix="closed-loop-") as folder:
        yield Path(folder)


if __name__ == "__main__":
    sys.exit(main())
