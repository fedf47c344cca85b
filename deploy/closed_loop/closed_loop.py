"""What `make closed-loop` runs: a real vLLM on this machine's CPU, captured, rebuilt as a pack, and set beside itself.

The real engine serves a plan while it is captured; a pack is built of that; then the real engine and one that is
emulated from the pack serve the same workloads in turn. The engine that does not serve is stopped meanwhile, and one
core belongs to the model alone.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deploy.closed_loop.comparison import (
    Comparison,
    as_json,
    beyond_bounds,
    compare,
    print_comparisons,
    write_deltas,
)
from deploy.closed_loop.cores import MODEL_CORE, leave_core_to_the_model, on_other_cores
from deploy.closed_loop.workloads import QUICK_WORKLOADS, SERVED_MODEL, WORKLOADS, Workload, run_bench
from deploy.demo.interrupt import Interrupt
from deploy.demo.progress import DemoFailed, Progress, step_oracle, tail
from engine_process import EngineFailed, EngineProcess, engine_variables, free_port
from environments import VllmEnvironment, cpu_vllm_environment, shim_site
from model_dir import write_model_dir
from oracle_process import OracleProcess

SEED = 20260921
LIMITS: Sequence[str] = (
    *("--served-model-name", SERVED_MODEL, "--enforce-eager", "--no-enable-prefix-caching"),
    *("--max-model-len", "2048", "--max-num-batched-tokens", "512", "--max-num-seqs", "32"),
)
# The emulated engine is told what the CPU platform decides for itself: no asynchronous scheduling.
EMULATED: Sequence[str] = ("--no-async-scheduling",)
KEEP = "ARGS='--keep DIR' keeps every log, the capture and the pack"


@dataclass(frozen=True)
class Options:
    """What the command line asks for. `minutes` is the time of the plan, `seconds` that of one run of one workload."""

    workloads: Sequence[Workload]
    repeats: int
    minutes: float
    seconds: float
    kind: str
    json: Path | None
    csv: Path | None
    keep: Path | None
    check: bool


def main() -> int:
    """0: done; 1: something failed, or with --check an error is beyond its bound; 130: interrupted."""
    options = _options()
    progress = Progress()
    Interrupt()
    try:
        with _working_folder(options.keep) as folder:
            comparisons = _run(options, folder, progress)
            print_comparisons(comparisons)
            _write(options, comparisons)
    except DemoFailed as failure:
        print(f"\nerror: {failure}\nnext:  {failure.next_step}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted: everything it started has ended", file=sys.stderr)
        return 130
    beyond = beyond_bounds(comparisons)
    print(f"{len(beyond)} of {5 * len(comparisons)} means are beyond their bound" + (":" if beyond else ""))
    for sentence in beyond:
        print(f"  {sentence}")
    return 1 if beyond and options.check else 0


def _run(options: Options, folder: Path, progress: Progress) -> list[Comparison]:
    """One loop from nothing to the figures; whatever it starts has ended when it returns or raises."""
    progress.say("1/5 vLLM for the CPU (the first time: minutes, 3 GB) and a small model with random weights")
    vllm, site = cpu_vllm_environment(), shim_site(folder / "site")
    model = write_model_dir(folder / "tiny", "qwen3-tiny")
    progress.say(f"2/5 capture: a real engine, driven by a plan of {options.minutes:g} minutes")
    _capture(vllm, model, site, folder, options.minutes, progress)
    progress.say(f"3/5 a {options.kind} pack of it")
    pack = folder / "pack"
    print(
        step_oracle("build", str(folder / "capture"), "--kind", options.kind, "-o", str(pack), next_step=KEEP),
        flush=True,
    )
    progress.say("4/5 the oracle server, the real engine and the emulated one")
    with contextlib.ExitStack() as running:
        with on_other_cores():
            server = running.enter_context(OracleProcess(folder / "state"))
        step_oracle("pack", "upload", str(pack), "--target", server.target, next_step=KEEP)
        step_oracle(
            *("experiment", "create", "default", "--pack", str(pack), "--seed", "1", "--target", server.target),
            next_step=KEEP,
        )
        real = running.enter_context(_engine(vllm, model, site, folder / "real.log", None))
        emulated = running.enter_context(_engine(vllm, model, site, folder / "emulated.log", server.target))
        for name, engine in (("real", real), ("emulated", emulated)):
            try:
                engine.wait_ready()
            except EngineFailed:
                raise DemoFailed(f"the {name} engine is not ready:\n{tail(engine.log_path)}", KEEP) from None
            leave_core_to_the_model(engine.pid)
        runs = options.repeats * len(options.workloads) * 2
        progress.say(f"5/5 {runs} runs of about {options.seconds:g} s, real and emulated in turn")
        return _measure(options, folder, progress, vllm, model, site, {"real": real, "emulated": emulated})


def _measure(
    options: Options,
    folder: Path,
    progress: Progress,
    vllm: VllmEnvironment,
    model: Path,
    site: Path,
    engines: dict[str, EngineProcess],
) -> list[Comparison]:
    results: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for repeat in range(options.repeats):
        for number, workload in enumerate(options.workloads):
            # Which side goes first takes turns, so that a machine that slows down slows both.
            order = ("real", "emulated") if (repeat + number) % 2 == 0 else ("emulated", "real")
            for side in order:
                others = [engine for name, engine in engines.items() if name != side]
                with _stopped(others), on_other_cores():
                    result = run_bench(
                        vllm,
                        workload,
                        engines[side].base_url,
                        model=model,
                        site=site,
                        folder=folder / "runs" / f"{number}-{repeat}-{side}",
                        seconds=options.seconds,
                        # The same requests every time.
                        seed=SEED + number,
                    )
                results.setdefault((workload.name, side), []).append(result)
                progress.say(
                    f"    {workload.name}, repeat {repeat + 1}, {side}: TPOT {result['mean_tpot_ms']:.2f} ms, "
                    f"E2E {result['mean_e2el_ms']:.0f} ms"
                )
    return [
        compare(workload, results[workload.name, "real"], results[workload.name, "emulated"])
        for workload in options.workloads
    ]


@contextlib.contextmanager
def _stopped(engines: Sequence[EngineProcess]) -> Iterator[None]:
    """Engines that take no core meanwhile, a worker that spins while it waits included."""
    for engine in engines:
        os.killpg(engine.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for engine in engines:
            os.killpg(engine.pid, signal.SIGCONT)


def _capture(vllm: VllmEnvironment, model: Path, site: Path, folder: Path, minutes: float, progress: Progress) -> None:
    serve = [str(vllm.python), "-m", "vllm.entrypoints.cli.main", "serve", str(model), "--load-format", "dummy"]
    serve += ["--host", "127.0.0.1", "--port", str(free_port()), *LIMITS]
    command = [str(vllm.python), "-m", "profiler.cli", "capture", "-o", str(folder / "capture"), "--plan"]
    log_path = folder / "capture.log"
    with log_path.open("wb") as log:
        capture = subprocess.Popen(
            [*command, "--minutes", f"{minutes:g}", "--", *serve],
            env=engine_variables(site, None) | _cpu_variables(),
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    try:
        while capture.poll() is None:
            if "step-oracle: plan:" in log_path.read_text(encoding="utf-8", errors="replace"):
                leave_core_to_the_model(capture.pid)
                break
            time.sleep(0.2)
        capture.wait()
    finally:
        # The first SIGTERM ends the engine, then the capture.
        capture.terminate()
        capture.wait()
    if capture.returncode:
        raise DemoFailed(f"the capture ended with {capture.returncode}:\n{tail(log_path)}", KEEP)
    for line in log_path.read_text(encoding="utf-8", errors="replace").splitlines():
        if line.startswith(("run-", "  capture took", "  note", "step-oracle: plan:")):
            progress.say(f"    {line.strip()}")


def _engine(vllm: VllmEnvironment, model: Path, site: Path, log_path: Path, target: str | None) -> EngineProcess:
    return EngineProcess(
        vllm,
        model,
        target=target,
        site=site,
        log_path=log_path,
        extra_args=(*LIMITS, *(EMULATED if target else ())),
        extra_env=_cpu_variables() if target is None else {"STEP_ORACLE_ENGINE_ID": "emulated"},
    )


def _cpu_variables() -> dict[str, str]:
    return {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": str(MODEL_CORE)}


def _write(options: Options, comparisons: Sequence[Comparison]) -> None:
    if options.csv is not None:
        write_deltas(options.csv, comparisons)
        print(f"• errors of the means as LLM-Emu tells them: {options.csv}")
    if options.json is not None:
        document = {"schema": "step_oracle.closed_loop/1", "comparisons": as_json(comparisons)}
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


def _options() -> Options:
    parser = argparse.ArgumentParser(
        prog="make closed-loop ARGS='...'",
        description="Capture a real vLLM on the CPU, build a pack, and set the emulated engine beside the real one.",
    )
    parser.add_argument("--quick", action="store_true", help="two workloads, two repeats, seconds: shows that it works")
    parser.add_argument("--repeats", type=int, default=0, metavar="N", help="runs of each workload on each side (3)")
    parser.add_argument("--minutes", type=float, default=0.0, metavar="M", help="time of the capture's plan (3)")
    parser.add_argument("--seconds", type=float, default=0.0, metavar="S", help="of one run of one workload (12)")
    parser.add_argument("--kind", choices=("hybrid", "sampled"), default="hybrid", help="kind of the pack (hybrid)")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write per_rate_deltas.csv")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every run's figures")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="keep logs, capture, pack and runs in this new folder")
    parser.add_argument("--check", action="store_true", help="exit 1 where a mean is beyond its bound")
    given = parser.parse_args()
    if given.keep is not None and given.keep.exists():
        parser.error(f"--keep {given.keep}: it exists; name a new folder")
    for path in (given.csv, given.json):
        if path is not None and not path.absolute().parent.is_dir():
            parser.error(f"{path}: its folder does not exist; make it first")
    repeats, minutes, seconds = (2, 0.5, 6.0) if given.quick else (3, 3.0, 12.0)
    return Options(
        workloads=QUICK_WORKLOADS if given.quick else WORKLOADS,
        repeats=given.repeats or repeats,
        minutes=given.minutes or minutes,
        seconds=given.seconds or seconds,
        kind=given.kind,
        json=given.json,
        csv=given.csv,
        keep=given.keep,
        check=given.check,
    )


if __name__ == "__main__":
    sys.exit(main())
