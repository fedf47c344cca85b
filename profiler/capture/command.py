"""`step-oracle capture`: runs beside the engine, so it needs the core distribution alone (and openai with --plan)."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from oracle_server.errors import InvalidArgument
from profiler.capture.engine import CapturedEngine
from profiler.capture.launch import CaptureCommand, capture_command
from profiler.capture.steps import CapturedRun, read_capture

# Loading a large model from a cold disk takes its time.
_READY_SECONDS = 3600.0


def main(argv: Sequence[str]) -> int:
    """0: steps were captured; 1: the engine failed, or there is no step; 2: wrong arguments; 130: interrupted."""
    options, command = _options(list(argv))
    try:
        capture = capture_command(command, options.output)
        print(f"step-oracle: capturing into {capture.run}", flush=True)
        interrupted, failed = _run(capture, options)
        runs = read_capture(capture.run)
    except InvalidArgument as error:
        print(f"step-oracle: {error.message}", file=sys.stderr)
        return 2 if error.field == "command" else 1
    for run in runs:
        print("\n".join(summary_lines(run)))
    if failed:
        print(f"step-oracle: {failed}", file=sys.stderr)
        return 1
    if interrupted:
        return 130
    return 0 if all(run.steps for run in runs) else 1


def summary_lines(run: CapturedRun) -> list[str]:
    """What a run is and what it cost, for people."""
    steps, cost = run.steps, run.overhead
    mixed = sum(bool(step.chunk_tokens) for step in steps)
    tokens = sum(step.generated_tokens for step in steps)
    took = (
        f"  capture took {cost.scheduler_us:.0f} us of a step in the engine core and {cost.worker_us:.0f} us in the "
        f"worker: {cost.percent:.2f} % of {cost.step_us / 1e3:.2f} ms; beside it {cost.beside_us:.0f} us"
    )
    return [
        f"{run.name}: {len(steps)} steps ({mixed} with prefill chunks), {tokens} tokens out, timed by {run.timing}",
        took,
        *(f"  note: {note}" for note in run.notes),
    ]


def _run(capture: CaptureCommand, options: argparse.Namespace) -> tuple[bool, str]:
    """Serve until told to end, or until the plan is done; whether somebody ended the plan early, and what failed.

    Ctrl-C and SIGTERM end the engine first: what it has left to write is part of the capture.
    """
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        with CapturedEngine(capture) as engine:
            if not options.plan:
                status = engine.wait()
                return False, f"the engine ended by itself with {status}; its output says why" if status else ""
            from profiler.capture.driver import PlanOptions, drive

            if not engine.wait_ready(_READY_SECONDS):
                raise InvalidArgument("the engine ended before it was ready; its output says why", field="engine")
            drive(engine, capture.run, PlanOptions(minutes=options.minutes, target_percent=options.target))
            return False, ""
    except KeyboardInterrupt:
        return bool(options.plan), ""
    finally:
        signal.signal(signal.SIGTERM, before)


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _options(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        prog="step-oracle capture",
        description="Start vLLM as given and record every step: its shape, how long the device was busy, and what a "
        "profile pack's manifest needs. vLLM is not changed: two public flags are added to its command.",
        usage="step-oracle capture -o DIR [--plan] [--minutes M] [--target P] -- vllm serve MODEL ...",
    )
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="DIR", help="folder; gets a new run-NNN")
    parser.add_argument(
        "--plan", action="store_true", help="drive the engine through the shapes a pack needs, then end"
    )
    parser.add_argument("--minutes", type=float, default=15.0, help="time of the plan, after start-up (15)")
    parser.add_argument(
        "--target", type=float, default=1.0, metavar="P", help="a region is done at this standard error, percent (1)"
    )
    at = arguments.index("--") if "--" in arguments else len(arguments)
    options = parser.parse_args(arguments[:at])
    if options.minutes <= 0 or options.target <= 0:
        parser.error("--minutes and --target are above 0")
    return options, arguments[at + 1 :]
