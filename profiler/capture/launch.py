"""How an engine is told to be captured: two flags and one variable, all of them public."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from oracle_server.errors import InvalidArgument

# The run's folder; read by the engine's processes.
CAPTURE = "STEP_ORACLE_CAPTURE"
# The classes the user asked for, where the flags were taken: the capture derives from them.
SCHEDULER, WORKER = "STEP_ORACLE_CAPTURE_SCHEDULER", "STEP_ORACLE_CAPTURE_WORKER"
_FLAGS = {
    "--worker-cls": ("profiler.capture.worker.CaptureWorker", WORKER),
    "--scheduler-cls": ("profiler.capture.scheduler.capture_scheduler", SCHEDULER),
}
_RUN = re.compile(r"run-(\d+)")


@dataclass(frozen=True)
class CaptureCommand:
    """What to start: arguments, the whole environment, and where the run is written."""

    arguments: tuple[str, ...]
    environment: Mapping[str, str]
    run: Path


def capture_command(
    command: Sequence[str], folder: Path, environment: Mapping[str, str] | None = None
) -> CaptureCommand:
    """The same vLLM server, captured into a new run of `folder`. `command` is what starts it, `vllm serve MODEL ...`.

    Raises InvalidArgument where there is nothing to measure.
    """
    variables = dict(os.environ if environment is None else environment)
    if not command:
        raise InvalidArgument(
            "nothing to capture: give the command that starts vLLM, as in -- vllm serve MODEL", field="command"
        )
    if variables.get("STEP_ORACLE_TARGET"):
        raise InvalidArgument(
            "STEP_ORACLE_TARGET is set: an emulated engine has no steps to measure; unset it", field="command"
        )
    arguments = [*command]
    for flag, (ours, variable) in _FLAGS.items():
        own = _take_flag(arguments, flag)
        if own and own != "auto":
            variables[variable] = own
        arguments += [flag, ours]
    run = _new_run(folder)
    variables[CAPTURE] = str(run)
    return CaptureCommand(tuple(arguments), variables, run)


def capture_arguments(folder: Path) -> dict[str, str]:
    """Keyword arguments of `vllm.LLM` that capture an engine of this process into a new run of `folder`.

    Sets STEP_ORACLE_CAPTURE for the processes vLLM starts.
    """
    os.environ[CAPTURE] = str(_new_run(folder))
    return {flag.removeprefix("--").replace("-", "_"): ours for flag, (ours, _) in _FLAGS.items()}


def runs_of(folder: Path) -> list[Path]:
    """The runs of a capture, oldest first."""
    found = [path for path in folder.glob("run-*") if _RUN.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("run-")))


def _new_run(folder: Path) -> Path:
    folder = folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    runs = runs_of(folder)
    number = int(runs[-1].name.removeprefix("run-")) + 1 if runs else 1
    run = folder / f"run-{number:03d}"
    run.mkdir()
    return run


def _take_flag(arguments: list[str], flag: str) -> str:
    """Remove `flag VALUE` or `flag=VALUE`; the value, "" where it is not given."""
    for spelling in (flag, flag.replace("-", "_").replace("__", "--", 1)):
        for at, argument in enumerate(arguments):
            if argument.startswith(f"{spelling}="):
                del arguments[at]
                return argument.partition("=")[2]
            if argument == spelling and at + 1 < len(arguments):
                value = arguments[at + 1]
                del arguments[at : at + 2]
                return value
    return ""
