"""What `make closed-loop` is told."""

from __future__ import annotations

import argparse
import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from deploy.closed_loop.steady_device.law import WEIGHTS_MS
from deploy.closed_loop.workloads import QUICK_WORKLOADS, WORKLOADS, Workload


@dataclass(frozen=True)
class Options:
    """What the command line asks for. `minutes`: lengths of plans, a pack of each; `seconds`: of one run on average."""

    workloads: Sequence[Workload]
    repeats: int
    minutes: tuple[float, ...]
    seconds: float
    kind: str
    # Milliseconds in which the steady device reads its weights; 0: the machine's own speed.
    steady: float
    json: Path | None
    csv: Path | None
    keep: Path | None
    check: bool
    # Capture the real runs and trace the emulated ones too.
    explain: bool
    # Of a vLLM with a device of its own; None: one for the CPU, made here.
    vllm: Path | None
    model: str
    serve: Sequence[str]


def read_options() -> Options:
    """Of this process's command line; ends it where they do not go together."""
    parser = argparse.ArgumentParser(
        prog="make closed-loop ARGS='...'",
        description="Capture a real vLLM, build a pack, and set the emulated engine beside the real one.",
    )
    parser.add_argument("--quick", action="store_true", help="two workloads, two repeats, seconds: shows that it works")
    parser.add_argument("--repeats", type=int, default=0, metavar="N", help="runs of each workload on each side (10)")
    parser.add_argument(
        *("--minutes", "--plan-minutes"),
        type=read_minutes,
        default=(),
        metavar="M[,M...]",
        help="time of the capture's plan, in all repeats (3); several: a pack of each length, and the error by length",
    )
    parser.add_argument("--seconds", type=float, default=0.0, metavar="S", help="of one run on average (4)")
    parser.add_argument("--kind", choices=("hybrid", "sampled"), default="hybrid", help="kind of the pack (hybrid)")
    parser.add_argument(
        "--steady",
        type=read_milliseconds,
        nargs="?",
        const=WEIGHTS_MS,
        default=0.0,
        metavar="MS",
        help="the real engine's device holds to a law instead of the machine's speed, so the error left is ours; its "
        f"shortest step ({WEIGHTS_MS:g})",
    )
    parser.add_argument(
        "--vllm",
        type=Path,
        metavar="VENV",
        help="virtual environment of a vLLM for a GPU, which the real engine is then on; without it one for the CPU",
    )
    parser.add_argument("--model", metavar="DIR", help="with --vllm: config.json and tokenizer, or a name (qwen3-8b)")
    parser.add_argument(
        "--serve", type=shlex.split, metavar="FLAGS", help="with --vllm: for each engine, '--tensor-parallel-size 2'"
    )
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write per_rate_deltas.csv")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every run's figures")
    parser.add_argument(
        "--keep", type=Path, metavar="DIR", help="keep logs, capture, packs and runs in this new folder"
    )
    parser.add_argument("--check", action="store_true", help="exit 1 where a mean is beyond its bound (longest plan)")
    parser.add_argument(
        "--explain",
        action="store_true",
        help="capture the real runs and trace the emulated ones too, and tell where the errors come from",
    )
    given = parser.parse_args()
    if given.keep is not None and given.keep.exists():
        parser.error(f"--keep {given.keep}: it exists; name a new folder")
    if given.vllm is None and (given.model or given.serve):
        parser.error("--model and --serve go with --vllm: the loop on the CPU has a model and flags of its own")
    if given.vllm is not None and given.steady:
        parser.error("--steady is a device of the CPU's vLLM; it does not go with --vllm")
    for path in (given.csv, given.json):
        if path is not None and not path.absolute().parent.is_dir():
            parser.error(f"{path}: its folder does not exist; make it first")
    # Many short runs: a shared machine drifts within seconds, and so each is beside parts of the plan of its moments.
    repeats, minutes, seconds = (2, (1.0,), 6.0) if given.quick else (10, (3.0,), 4.0)
    return Options(
        workloads=QUICK_WORKLOADS if given.quick else WORKLOADS,
        repeats=given.repeats or repeats,
        minutes=given.minutes or minutes,
        seconds=given.seconds or seconds,
        kind=given.kind,
        steady=given.steady,
        json=given.json,
        csv=given.csv,
        keep=given.keep,
        check=given.check,
        explain=given.explain,
        vllm=given.vllm,
        model=given.model or "qwen3-8b",
        serve=given.serve or (),
    )


def read_minutes(text: str) -> tuple[float, ...]:
    """Numbers above 0 with commas between, shortest first, each once."""
    try:
        minutes = tuple(sorted({float(part) for part in text.split(",")}))
    except ValueError:
        minutes = ()
    if not minutes or not all(0 < each < math.inf for each in minutes):
        raise argparse.ArgumentTypeError(f"{text!r} is no list of minutes above 0, such as 1,2,4")
    return minutes


def read_milliseconds(text: str) -> float:
    """A number above 0."""
    try:
        found = float(text)
    except ValueError:
        found = 0.0
    if not 0 < found < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of milliseconds above 0, such as {WEIGHTS_MS:g}")
    return found
